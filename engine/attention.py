"""Attention over paged KV: writes a step's keys and values to their slots, then lets each sequence attend to its own.

Each sequence is computed by itself, so a row's result does not depend on its neighbours in the batch. Knows block
tables and positions; knows neither requests nor the model around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class SequenceSpan:
    """The rows of one sequence in a batch."""

    query_start: int  # row of its first token
    query_len: int
    context_len: int  # tokens in KV after this step: the last query's position + 1
    block_table: Tensor  # int64 [ceil(context_len / block_size)], on the model's device


@dataclass(frozen=True)
class ForwardBatch:
    """One step's input; N tokens of several sequences, one span behind the other. All tensors on the model's device."""

    token_ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    slot_mapping: Tensor  # int64 [N], block_id * block_size + offset in the block
    spans: tuple[SequenceSpan, ...]
    logits_indices: Tensor  # int64 [R], the rows whose logits are wanted
