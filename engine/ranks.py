"""A model on several ranks, as its leader calls it and as its followers run it.

The leader's engine is the only one that schedules and samples. It sends each step to the others as int64 numbers in the
layout of `engine.device_batch.pack`, and computes its own part like any of them. With several stages, a step goes
through them in as many parts, and parts that need no logits are not waited for: each stage has work while another
computes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from engine.attention import ForwardBatch, SequenceSpan
from engine.device_batch import BatchShape, pack
from engine.model import Model
from engine.parallel import RankGroup
from engine.rank_meter import RankWork

logger = logging.getLogger(__name__)

STEP, PING, STOP = 0, 1, 2  # how the leader's message begins; for STEP, a `BatchShape` follows
MAX_PARTS_A_STAGE = 2  # in flight: the one that a stage computes, and the next
HEAD_NUMBERS = 5


class LedModel:
    """Called by the leader, like a `Transformer`."""

    def __init__(self, model: Model, group: RankGroup, vocab_size: int) -> None:
        self._model, self._group, self._vocab_size = model, group, vocab_size
        self.num_told_steps = 0

    def __call__(self, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Logits float32 `[R, vocab]` of `batch.logits_indices`. Raises `RuntimeError` once a rank is lost."""
        pp_size = self._group.shard.pp_size
        parts = split(batch, pp_size)
        logits = []
        for part in parts:
            if pp_size > 1:  # parts without logits are not waited for, so a stage could fall far behind
                self._group.begin_part(MAX_PARTS_A_STAGE * pp_size)
            self._tell(part, cache.shape[3])
            logits.append(self._model(part, cache))
        if pp_size > 1:
            logits = [self._receive(len(part.logits_indices), cache.device) for part in parts]
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def end_step(self, seconds: float) -> None:
        """A call of this model has taken `seconds`, including the device's work."""
        self._group.meter.end_step(self.num_told_steps, seconds)

    @property
    def work(self) -> RankWork:
        return self._group.meter.work

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """Notices, between steps too, that a rank is lost, and calls `on_failure`."""
        self._group.watch(_head(PING), on_failure)

    def close(self) -> None:
        """Ends the other ranks."""
        self._group.tell(_head(STOP), torch.empty(0, dtype=torch.int64))
        self._group.close()

    def _tell(self, batch: ForwardBatch, block_size: int) -> None:
        shape = BatchShape.of(batch, block_size)
        self.num_told_steps += 1
        self._group.tell(_head(STEP, *dataclasses.astuple(shape)), pack(batch, shape, block_size))

    def _receive(self, num_logits: int, device: torch.device) -> Tensor:
        logits = torch.empty(num_logits, self._vocab_size, device=device)
        return self._group.receive_logits(logits) if num_logits else logits


def follow(model: Model, group: RankGroup, cache: Tensor, on_step: Callable[[], None] = lambda: None) -> None:
    """Runs the leader's steps until it stops them. `on_step` is called after each one.

    Raises `RuntimeError` when the leader, or another rank, is lost.
    """
    for index, batch in enumerate(_steps(group)):
        began_s = time.perf_counter()
        logits = model(batch, cache)
        if group.tells_back and len(logits):
            group.send_logits(logits)
        on_step()
        group.meter.end_step(index + 1, time.perf_counter() - began_s)
        if group.tells_back:
            group.acknowledge()
    group.close()


def split(batch: ForwardBatch, num_parts: int) -> list[ForwardBatch]:
    """The batch in up to `num_parts` parts of equally many rows, in order; a sequence may continue in the next part."""
    num_rows = len(batch.token_ids)
    num_parts = min(num_parts, num_rows)
    ends = [num_rows * (part + 1) // num_parts for part in range(num_parts)]
    return (
        [_rows(batch, begin, end) for begin, end in zip([0, *ends], ends, strict=False)] if num_parts > 1 else [batch]
    )


def _rows(batch: ForwardBatch, begin: int, end: int) -> ForwardBatch:
    spans = []
    for span in batch.spans:
        first, last = max(begin, span.query_start), min(end, span.query_start + span.query_len)
        if first < last:
            left_out = span.query_start + span.query_len - last
            spans.append(SequenceSpan(first - begin, last - first, span.context_len - left_out, span.block_table))
    logits = batch.logits_indices[(batch.logits_indices >= begin) & (batch.logits_indices < end)] - begin
    rows = slice(begin, end)
    return ForwardBatch(batch.token_ids[rows], batch.positions[rows], batch.slot_mapping[rows], tuple(spans), logits)


def _steps(group: RankGroup) -> Iterator[ForwardBatch]:
    while True:
        kind, *sizes = group.hear(torch.empty(HEAD_NUMBERS, dtype=torch.int64)).tolist()
        if kind == STOP:
            return
        if kind == STEP:
            shape = BatchShape(*sizes)
            yield _batch(group.hear(torch.empty(sum(shape.sizes), dtype=torch.int64)), shape)


def _batch(packed: Tensor, shape: BatchShape) -> ForwardBatch:
    tokens, positions, slots, logits, starts, contexts, flat_tables = torch.split(packed, shape.sizes)
    tables = flat_tables.view(shape.num_sequences, shape.width)
    begins: Sequence[int] = starts.tolist()
    spans = tuple(
        SequenceSpan(begin, end - begin, context, table)
        for begin, end, context, table in zip(begins, begins[1:], contexts.tolist(), tables, strict=False)
    )
    return ForwardBatch(tokens, positions, slots, spans, logits)


def _head(kind: int, *sizes: int) -> Tensor:
    return torch.tensor([kind, *sizes, *(HEAD_NUMBERS - 1 - len(sizes)) * (0,)])
