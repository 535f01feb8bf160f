"""Random tiny models in transformers and here, and how to run them through a paged cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.attention import ForwardBatch, SequenceSpan
from engine.config import ModelConfig
from engine.model import Transformer
from engine.native_model import NativeTransformer
from engine.weights import load_model

BLOCK = 16
NUM_BLOCKS = 24
VOCAB = 97
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


@dataclass(frozen=True)
class Pair:
    """The same random weights in transformers and here, float32."""

    folder: Path
    reference: transformers.PreTrainedModel
    config: ModelConfig
    model: Transformer


def make_reference(name: str, options: dict[str, Any]) -> transformers.PreTrainedModel:
    """Random weights, with norms and biases that are not what they start with."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**(SHAPE | options))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.3) + (parameter.ndim == 1))
    return model


def make_pair(folder: Path, name: str, options: dict[str, Any], **save: Any) -> Pair:
    reference = make_reference(name, options)
    reference.save_pretrained(folder, **save)
    config = ModelConfig.from_pretrained(folder)
    return Pair(folder, reference, config, load_model(folder, config, torch.float32, torch.device("cpu")))


def tokens_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def empty_cache(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nothing that was not written may ever be read: one such number would spoil the logits."""
    shape = (NUM_BLOCKS, config.num_layers, 2, BLOCK, config.num_kv_heads, config.head_dim)
    return torch.full(shape, float("nan"), dtype=dtype)


def batch_of(parts: Sequence[tuple[Tensor, int, int, Tensor]]) -> ForwardBatch:
    """Of (tokens, start, end, block table): tokens[start:end] of each are computed, all their logits are wanted."""
    token_ids, positions, slots, spans = [], [], [], []
    for tokens, start, end, table in parts:
        position = torch.arange(start, end)
        spans.append(SequenceSpan(sum(map(len, token_ids)), end - start, end, table[: -(-end // BLOCK)]))
        token_ids.append(tokens[start:end])
        positions.append(position)
        slots.append(table[position // BLOCK] * BLOCK + position % BLOCK)
    rows = torch.arange(sum(map(len, token_ids)))
    return ForwardBatch(torch.cat(token_ids), torch.cat(positions), torch.cat(slots), tuple(spans), rows)


def logits_in_chunks(
    model: Transformer | NativeTransformer, tokens: Tensor, sizes: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Chunks of these sizes, over and over, until the end; `[tokens, vocab]`."""
    cache = empty_cache(model.config, dtype)
    table = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3))
    outputs, start = [], 0
    for size in itertools.cycle(sizes):
        end = min(start + size, len(tokens))
        outputs.append(model(batch_of([(tokens, start, end, table)]), cache))
        start = end
        if start == len(tokens):
            return torch.cat(outputs)
    raise AssertionError
