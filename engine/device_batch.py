"""A step's input on its way to a device: packed into one tensor on the host, so that one copy suffices, unpacked there.

Pure, and the same on any device. Knows no graph and no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from engine.attention import ForwardBatch, SequenceSpan

BATCH_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # sequences
MIN_WIDTH = 16  # blocks of a block table; a power of two, as all widths of graphs


@dataclass(frozen=True)
class PagedTables:
    """Block tables and lengths in the form that paged kernels take: S sequences in row order, on the device."""

    query_starts: Tensor  # int32 [S + 1], the first row of each sequence, then their number
    context_lens: Tensor  # int32 [S]
    block_tables: Tensor  # int32 [S, width]; what lies behind a sequence's context is any block
    max_query_len: int
    max_context_len: int  # or more


@dataclass(frozen=True)
class BatchShape:
    """How `pack` lays a batch out."""

    num_tokens: int
    num_logits: int
    num_sequences: int
    width: int  # blocks

    @classmethod
    def of(cls, batch: ForwardBatch, block_size: int) -> BatchShape:
        """The batch's shape, with tables that are just wide enough."""
        width = max(-(-span.context_len // block_size) for span in batch.spans)
        return cls(len(batch.token_ids), len(batch.logits_indices), len(batch.spans), width)

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each part, in the order of `pack`."""
        tables = self.num_sequences * self.width
        return [*3 * (self.num_tokens,), self.num_logits, self.num_sequences + 1, self.num_sequences, tables]


def decode_shape(batch: ForwardBatch, block_size: int) -> BatchShape | None:
    """The bucket of a decode step (one query per sequence); None: not a decode step, or larger than all buckets."""
    num_sequences = len(batch.spans)
    rows = next((bucket for bucket in BATCH_BUCKETS if bucket >= num_sequences), None)
    if rows is None or len(batch.token_ids) != num_sequences:
        return None
    blocks = BatchShape.of(batch, block_size).width
    return BatchShape(rows, rows, rows, max(MIN_WIDTH, 1 << (blocks - 1).bit_length()))


def decode_shapes(max_sequences: int, max_context_len: int, block_size: int) -> list[BatchShape]:
    """All buckets of an engine's decode steps, the smallest first; `max_context_len` in tokens."""
    rows = [bucket for bucket, last in zip(BATCH_BUCKETS, (0, *BATCH_BUCKETS), strict=False) if last < max_sequences]
    widths, max_blocks = [MIN_WIDTH], -(-max_context_len // block_size)
    while widths[-1] < max_blocks:
        widths.append(2 * widths[-1])
    return [BatchShape(count, count, count, width) for count in rows for width in widths]


def pad_decode(batch: ForwardBatch, num_rows: int, spare_block: int, block_size: int) -> ForwardBatch:
    """A decode step padded to `num_rows` with rows that use only `spare_block`; the logits of all rows are computed."""
    num_sequences = len(batch.spans)
    table = torch.tensor([spare_block], dtype=torch.int64)
    spare = tuple(SequenceSpan(row, 1, 1, table) for row in range(num_sequences, num_rows))
    room = (0, num_rows - num_sequences)
    return ForwardBatch(
        token_ids=functional.pad(batch.token_ids, room),
        positions=functional.pad(batch.positions, room),
        slot_mapping=functional.pad(batch.slot_mapping, room, value=spare_block * block_size),
        spans=batch.spans + spare,
        logits_indices=torch.arange(num_rows),
    )


def pack(batch: ForwardBatch, shape: BatchShape, block_size: int) -> Tensor:
    """The batch as one int64 tensor `[sum(shape.sizes)]` on the host."""
    lens = torch.tensor([(span.query_len, span.context_len) for span in batch.spans], dtype=torch.int64)
    starts = functional.pad(lens[:, 0].cumsum(0), (1, 0))
    used = [span.block_table[: -(-span.context_len // block_size)] for span in batch.spans]
    tables = pad_sequence(used, batch_first=True)
    tables = functional.pad(tables, (0, shape.width - tables.shape[1]))
    parts = [batch.token_ids, batch.positions, batch.slot_mapping, batch.logits_indices, starts, lens[:, 1]]
    return torch.cat([*parts, tables.flatten()])


def unpack(
    packed: Tensor, shape: BatchShape, spans: Sequence[SequenceSpan], block_size: int
) -> tuple[ForwardBatch, PagedTables]:
    """The packed batch, on the device of `packed`, with its `spans` (none for single queries in a graph)."""
    tokens, positions, slots, logits, starts, contexts, flat_tables = torch.split(packed, shape.sizes)
    tables = flat_tables.view(shape.num_sequences, shape.width)
    paged = PagedTables(
        query_starts=starts.int(),
        context_lens=contexts.int(),
        block_tables=tables.int(),
        max_query_len=max((span.query_len for span in spans), default=1),
        max_context_len=shape.width * block_size,
    )
    moved = tuple(replace(span, block_table=table) for span, table in zip(spans, tables, strict=False))
    return ForwardBatch(tokens, positions, slots, moved, logits), paged
