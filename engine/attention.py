"""Attention over a paged KV cache: writes a step's keys and values to their slots, then attends, sequence by sequence.

If there is a kernel, it reads blocks in place: a compiled one for CPUs, or one for GPUs, which comes with the batch
(`engine.cuda_attention`). Otherwise blocks are gathered for SDPA. In both SDPA and the compiled kernel each sequence is
computed by itself, so a row's result does not depend on its neighbours in the batch. Knows block tables and positions;
knows neither requests nor the model around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from engine.native import AttentionBatch, can_attend


class Kernel(Protocol):
    """Attention for some sequences of a step, over one window; the same object serves all layers of that window."""

    def attend(self, q: Tensor, cache: Tensor, out: Tensor) -> None:
        """Fills its sequences' rows of `out`. Scores are scaled by 1/sqrt(D).

        q and out are `[N, H, D]`; `cache` is one layer's, `[num_blocks, 2, block_size, Hkv, D]`, with this step's keys
        and values already in it.
        """
        ...


@dataclass(frozen=True)
class SequenceSpan:
    """The rows of one sequence in a batch."""

    query_start: int  # row of its first token
    query_len: int
    context_len: int  # tokens in KV after this step: the last query's position + 1
    block_table: Tensor  # int64 [ceil(context_len / block_size)] or longer, on the model's device


@dataclass(frozen=True)
class ForwardBatch:
    """One step's input: N tokens of several sequences, their spans in order. All tensors are on the model's device."""

    token_ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    slot_mapping: Tensor  # int64 [N], block_id * block_size + offset in the block
    spans: tuple[SequenceSpan, ...]
    logits_indices: Tensor  # int64 [R], the rows whose logits are wanted
    kernels: Mapping[int | None, Kernel] = field(default_factory=dict)  # by window, each for all spans; may be empty


@dataclass(frozen=True)
class _SpanPlan:
    start: int
    end: int
    blocks: Tensor | None  # int64, the blocks to gather; None: all keys are among the span's own rows
    keys: slice  # the gathered tokens that some query sees
    mask: Tensor | None  # bool [query_len, keys], True where a query sees a key; None: each sees all, or causal
    is_causal: bool


@dataclass(frozen=True)
class AttentionPlan:
    """What `attend` needs of a batch. Made once per step and window, as it is the same for all layers of a window."""

    write_blocks: Tensor  # int64 [N]
    write_offsets: Tensor  # int64 [N]
    kernel: Kernel | None
    spans: tuple[_SpanPlan, ...]  # for plain torch, if there is no kernel


def plan_attention(batch: ForwardBatch, cache: Tensor, sliding_window: int | None) -> AttentionPlan:
    """The plan for layers with this `sliding_window` in tokens: a query at p sees keys in (p - window, p]; None: all.

    `cache` is that of all layers, `[num_blocks, num_layers, 2, block_size, Hkv, D]`.
    """
    slots, block_size = batch.slot_mapping, cache.shape[3]
    kernel: Kernel | None = batch.kernels.get(sliding_window)
    if kernel is None and can_attend(cache.shape[-1], cache.dtype, cache.device):
        kernel = _plan_compiled(batch.spans, sliding_window)
    return AttentionPlan(
        write_blocks=torch.div(slots, block_size, rounding_mode="floor"),
        write_offsets=slots % block_size,
        kernel=kernel,
        spans=() if kernel else tuple(_plan_span(span, block_size, sliding_window) for span in batch.spans),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, plan: AttentionPlan) -> Tensor:
    """Writes k and v to their slots and attends; returns `[N, H, D]`.

    q is `[N, H, D]`, k and v are `[N, Hkv, D]`; `cache` is one layer's, `[num_blocks, 2, block_size, Hkv, D]`.
    """
    cache[:, 0].index_put_((plan.write_blocks, plan.write_offsets), k)
    cache[:, 1].index_put_((plan.write_blocks, plan.write_offsets), v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.kernel is not None:
        plan.kernel.attend(q, cache, out)
    for span in plan.spans:
        rows = slice(span.start, span.end)
        if span.blocks is None:
            keys, values = k[rows], v[rows]
        else:
            keys = cache[:, 0].index_select(0, span.blocks).flatten(0, 1)[span.keys]
            values = cache[:, 1].index_select(0, span.blocks).flatten(0, 1)[span.keys]
        out[rows] = _attend_one(q[rows], keys, values, span)
    return out


def _plan_compiled(spans: Sequence[SequenceSpan], window: int | None) -> AttentionBatch:
    return AttentionBatch(
        [(span.query_start, span.query_len, span.context_len) for span in spans],
        [span.block_table for span in spans],
        window,
    )


def _plan_span(span: SequenceSpan, block_size: int, window: int | None) -> _SpanPlan:
    length, context = span.query_len, span.context_len
    prior = context - length
    # No query sees keys before this one, so they are not even gathered.
    first_key = 0 if window is None else max(0, prior - window + 1)
    first_block, last_block = first_key // block_size, -(-context // block_size)
    is_windowed = window is not None and context - first_key > window
    mask = None
    if length > 1 and (prior > 0 or is_windowed):
        mask = _mask(prior, context, first_key, window, span.block_table.device)
    return _SpanPlan(
        start=span.query_start,
        end=span.query_start + length,
        blocks=span.block_table[first_block:last_block] if prior else None,
        keys=slice(first_key - first_block * block_size, context - first_block * block_size),
        mask=mask,
        is_causal=length > 1 and mask is None,
    )


def _mask(prior: int, context: int, first_key: int, window: int | None, device: torch.device) -> Tensor:
    queries = torch.arange(prior, context, device=device)[:, None]
    keys = torch.arange(first_key, context, device=device)[None]
    seen = keys <= queries
    return seen if window is None else seen & (queries - keys < window)


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, span: _SpanPlan) -> Tensor:
    """One sequence: q `[T, H, D]`, keys and values `[S, Hkv, D]` -> `[T, H, D]`. Scores are scaled by 1/sqrt(D)."""
    heads_first = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    if q.shape[0] == 1:
        # A single query sees every key, so the heads that share a KV head become its queries, which saves SDPA a pass
        # over the keys for each of them.
        grouped = q.view(1, keys.shape[1], -1, q.shape[2])
        return functional.scaled_dot_product_attention(grouped, *heads_first).reshape(q.shape)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        *heads_first,
        attn_mask=span.mask,
        is_causal=span.is_causal,
        enable_gqa=q.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)
