"""The weight files of a Hugging Face folder: which they are, what they contain, and a digest that identifies them.

Reads headers and samples only, and needs no torch; `engine.weights` reads the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UnsupportedModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")  # as safetensors spells them
SAMPLE_BYTES = 4096
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: `[begin, end)` are bytes of its file."""

    name: str
    path: Path
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file. Raises `UnsupportedModel` if there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModel(f"{path.parent} is not a Hugging Face model folder: it has no {path.name}") from None
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UnsupportedModel(f"{path} is not a JSON object")
    return raw


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name, from one file or from the shards in the index."""
    tensors = [tensor for path in weight_files(folder) for tensor in _read_header(path)[1]]
    return {tensor.name: tensor for tensor in tensors}


def weight_files(folder: Path) -> list[Path]:
    """The files of this folder's checkpoint. Other files, such as the same weights in another format, do not count."""
    if (folder / INDEX_FILE).exists():
        names = sorted(set(read_json(folder / INDEX_FILE).get("weight_map", {}).values()))
    else:
        names = [SINGLE_FILE]
    for name in names:
        if not (folder / name).is_file():
            raise UnsupportedModel(f"{folder} has no {name}; supported: {SINGLE_FILE}, or shards with {INDEX_FILE}")
    return [folder / name for name in names]


def model_digest(folder: Path) -> str:
    """Hex SHA-256 of config.json and, for each weight file, name, size, header and samples of each tensor.

    The same on every machine that has the same files. It is cheap, reading only some kilobytes of each tensor, and
    reliable, because training, merging or converting a model changes nearly every tensor.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        header, tensors = _read_header(path)
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode() + header)
        with path.open("rb") as file:
            for tensor in tensors:
                last = max(tensor.begin, tensor.end - SAMPLE_BYTES)
                for offset in (tensor.begin, (tensor.begin + last) // 2, last):
                    file.seek(offset)
                    digest.update(file.read(min(SAMPLE_BYTES, tensor.end - offset)))
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[bytes, list[StoredTensor]]:
    """The format: u64 length, then JSON {name: {dtype, shape, data_offsets}}, then the data that offsets count from."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, MAX_HEADER_BYTES))
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = [_stored_tensor(path, 8 + length, name, entry) for name, entry in sorted(entries.items())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"{path} is not a safetensors file, or is cut off: {error!r}") from None
    if (end := max((tensor.end for tensor in tensors), default=0)) > size:
        raise UnsupportedModel(f"{path} is cut off: its header tells of {end} bytes, it has {size}")
    return header, tensors


def _stored_tensor(path: Path, data: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise UnsupportedModel(f"{name} is stored as {entry['dtype']}; supported: {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    return StoredTensor(name, path, tuple(entry["shape"]), data + begin, data + end)
