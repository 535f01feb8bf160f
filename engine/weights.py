"""Fills a `Transformer` from a Hugging Face folder's safetensors. Knows names and shapes, not what is computed.

Every tensor of the checkpoint must have a place and every parameter a tensor: anything missing, left over or of a
wrong shape is refused by name, because a model with wrong weights just looks like a bad model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.checkpoint import StoredTensor, stored_tensors
from engine.config import ModelConfig
from engine.errors import UnsupportedModel
from engine.model import Transformer
from engine.parallel import Alone, Parallel
from engine.shard import Shard

# Our parameters that stack several of the checkpoint's tensors.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
DERIVED = ".rotary_emb.inv_freq"  # old checkpoints contain what can be derived from config.json
NAMES_SHOWN = 5


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    parallel: Parallel | None = None,
) -> Transformer:
    """A rank's part of the folder's model in `dtype` on `device`; no more than that is read.

    Raises `UnsupportedModel` if tensors do not match the config, including those of other ranks.
    """
    stored = stored_tensors(folder)
    parallel = parallel or Alone()
    with torch.device("meta"):
        whole, model = Transformer(config), Transformer(config, parallel)
    _check_names(stored, config, {name for full, _ in whole.named_parameters() for name in _sources(full)})
    for name, parameter in whole.named_parameters():
        _check_shapes([stored[source] for source in _sources(name)], parameter, config)
    files: dict[Path, Any] = {
        path: safe_open(path, framework="pt") for path in {tensor.path for tensor in stored.values()}
    }
    cuts = Cuts(config, parallel.shard)
    for name, parameter in list(model.named_parameters()):
        sources = [stored[source] for source in _sources(_whole_name(name, config, parallel.shard))]
        parts = [cuts.read(files[source.path], source) for source in sources]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        assert tensor.shape == parameter.shape, f"{name}: {tuple(tensor.shape)}, not {tuple(parameter.shape)}"
        _assign(model, name, tensor.to(device, dtype))
    if config.tie_word_embeddings and model.lm_head is not None and model.embed_tokens is not None:
        model.lm_head.weight = model.embed_tokens.weight
    model.frequencies = model.frequencies.to(device)
    return model.requires_grad_(False).eval()


class Cuts:
    """Which rows and columns of the checkpoint's tensors belong to a rank."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        heads, kv_heads = shard.heads(config), shard.kv_heads(config)
        size = config.intermediate_size // shard.tp_size
        inner = range(shard.tp_rank * size, (shard.tp_rank + 1) * size)
        self._tp_rank = shard.tp_rank
        self._vocab = shard.vocab_rows(config)
        q, kv = (range(part.start * config.head_dim, part.stop * config.head_dim) for part in (heads, kv_heads))
        self._rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": inner, "up_proj": inner}
        self._columns = {"o_proj": q, "down_proj": inner}

    def read(self, file: Any, source: StoredTensor) -> Tensor:
        """The rank's part of a tensor of an open file."""
        owner, leaf = source.name.split(".")[-2:]
        tensor = file.get_slice(source.name)
        if owner in ("embed_tokens", "lm_head"):
            rows: Tensor = tensor[self._vocab.start : self._vocab.stop]
            return torch.nn.functional.pad(rows, (0, 0, 0, len(self._vocab) - len(rows)))
        if owner in self._rows:
            part: Tensor = tensor[self._rows[owner].start : self._rows[owner].stop]
            return part
        if owner in self._columns and leaf == "weight":
            columns: Tensor = tensor[:, self._columns[owner].start : self._columns[owner].stop]
            return columns
        whole: Tensor = tensor[:]
        # The bias of an all-reduced sum is added only once.
        return whole if owner not in self._columns or self._tp_rank == 0 else torch.zeros_like(whole)


def _whole_name(name: str, config: ModelConfig, shard: Shard) -> str:
    """The name, in the whole model, of a rank's parameter."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "embed_tokens.weight"
    kind, _, rest = name.partition(".")
    if kind != "layers":
        return name
    index, _, rest = rest.partition(".")
    return f"layers.{shard.layers(config).start + int(index)}.{rest}"


def _sources(parameter: str) -> tuple[str, ...]:
    """The checkpoint's names of the tensors that one of our parameters holds."""
    full = parameter if parameter.startswith("lm_head.") else f"model.{parameter}"
    for fused, parts in FUSED.items():
        if f".{fused}." in full:
            return tuple(full.replace(fused, part) for part in parts)
    return (full,)


def _check_names(stored: Mapping[str, StoredTensor], config: ModelConfig, wanted: Set[str]) -> None:
    given = {name for name in stored if not name.endswith(DERIVED)}
    if config.tie_word_embeddings:
        given.discard("lm_head.weight")
    for problem, names in (("lacks", wanted - given), ("has, but the config does not ask for,", given - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
            raise UnsupportedModel(f"the checkpoint {problem} {len(names)} tensors of {config.architecture}: {shown}")


def _check_shapes(parts: Sequence[StoredTensor], parameter: Tensor, config: ModelConfig) -> None:
    kv_rows = config.num_kv_heads * config.head_dim
    rows_of = {"q_proj": config.num_heads * config.head_dim, "k_proj": kv_rows, "v_proj": kv_rows}
    rows_of |= {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
    for part in parts:
        rows = rows_of.get(part.name.split(".")[-2], parameter.shape[0])
        if part.shape != (expected := (rows, *parameter.shape[1:])):
            raise UnsupportedModel(f"the config asks for {part.name} of shape {expected}, it is {part.shape}")


def _assign(model: Transformer, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
