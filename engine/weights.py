"""Fills a `Transformer` from a Hugging Face folder's safetensors. Knows names and shapes, not what is computed.

Every tensor of the checkpoint must have a place and every parameter a tensor: what is missing, left over or of a
wrong shape is refused by name, because a model that runs with wrong weights looks like a bad model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.checkpoint import StoredTensor, stored_tensors
from engine.config import ModelConfig
from engine.errors import UnsupportedModel
from engine.model import Transformer

# A parameter of ours that holds several of the checkpoint's, one below the other.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
DERIVED = ".rotary_emb.inv_freq"  # old checkpoints hold what follows from config.json
NAMES_SHOWN = 5


def load_model(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """The folder's model in `dtype` on `device`. Raises `UnsupportedModel` where tensors do not fit the config."""
    stored = stored_tensors(folder)
    with torch.device("meta"):
        model = Transformer(config)
    sources = {name: _sources(name) for name, _ in model.named_parameters()}
    _check_names(stored, sources.values(), config)
    files: dict[Path, Any] = {
        path: safe_open(path, framework="pt") for path in {tensor.path for tensor in stored.values()}
    }
    for name, parameter in list(model.named_parameters()):
        _check_shapes([stored[source] for source in sources[name]], parameter, config)
        parts: list[Tensor] = [files[stored[source].path].get_tensor(source) for source in sources[name]]
        _assign(model, name, (torch.cat(parts) if len(parts) > 1 else parts[0]).to(device, dtype))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.frequencies = model.frequencies.to(device)
    return model.requires_grad_(False).eval()


def _sources(parameter: str) -> tuple[str, ...]:
    """The checkpoint's names of what a parameter of ours holds."""
    full = parameter if parameter.startswith("lm_head.") else f"model.{parameter}"
    for fused, parts in FUSED.items():
        if f".{fused}." in full:
            return tuple(full.replace(fused, part) for part in parts)
    return (full,)


def _check_names(stored: Mapping[str, StoredTensor], sources: Iterable[tuple[str, ...]], config: ModelConfig) -> None:
    wanted = {name for names in sources for name in names}
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
