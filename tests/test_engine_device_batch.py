"""What a device is sent: batches come out as they went in, and padded rows touch the spare block alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.attention import ForwardBatch, SequenceSpan
from engine.device_batch import BATCH_BUCKETS, MIN_WIDTH, BatchShape, decode_shape, pack, pad_decode, unpack

SIZE = 4  # tokens of a block
SPARE = 99


def make_batch(lens: list[tuple[int, int]]) -> ForwardBatch:
    """Of (queries, context) of each sequence; tables are one block longer than needed."""
    spans, tokens = [], []
    for index, (query_len, context) in enumerate(lens):
        table = 100 * (index + 1) + torch.arange(-(-context // SIZE) + 1)
        spans.append(SequenceSpan(sum(map(len, tokens)), query_len, context, table))
        tokens.append(1000 * (index + 1) + torch.arange(context - query_len, context))
    token_ids = torch.cat(tokens)
    last_rows = torch.tensor([span.query_start + span.query_len - 1 for span in spans])
    return ForwardBatch(token_ids, token_ids % 1000, token_ids + 7, tuple(spans), last_rows)


lens = st.integers(1, 70).flatmap(lambda context: st.tuples(st.integers(1, context), st.just(context)))


@given(st.lists(lens, min_size=1, max_size=9), st.integers(0, 3))
def test_a_batch_comes_out_as_it_went_in(lens: list[tuple[int, int]], slack: int) -> None:
    source = make_batch(lens)
    shape = BatchShape.of(source, SIZE)
    shape = replace(shape, width=shape.width + slack)
    packed = pack(source, shape, SIZE)
    assert packed.dtype == torch.int64 and packed.shape == (sum(shape.sizes),)
    batch, tables = unpack(packed, shape, source.spans, SIZE)
    for name in ("token_ids", "positions", "slot_mapping", "logits_indices"):
        assert torch.equal(getattr(batch, name), getattr(source, name)), name
    assert tables.query_starts.tolist() == [*(span.query_start for span in source.spans), len(source.token_ids)]
    assert tables.context_lens.tolist() == [context for _, context in lens]
    assert tables.max_query_len == max(query_len for query_len, _ in lens)
    assert tables.max_context_len >= max(context for _, context in lens)
    assert {t.dtype for t in (tables.query_starts, tables.context_lens, tables.block_tables)} == {torch.int32}
    for row, (mine, theirs) in enumerate(zip(batch.spans, source.spans, strict=True)):
        used = -(-theirs.context_len // SIZE)
        assert replace(mine, block_table=theirs.block_table) == theirs
        for table in (mine.block_table, tables.block_tables[row]):
            assert table[:used].tolist() == theirs.block_table[:used].tolist()
            assert len(table) == shape.width


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 17, 64, 65, 256])
def test_decode_steps_are_rounded_up_to_buckets(num_sequences: int) -> None:
    shape = decode_shape(make_batch([(1, 5)] * num_sequences), SIZE)
    assert shape is not None
    assert (
        shape.num_sequences
        == shape.num_tokens
        == shape.num_logits
        == min(bucket for bucket in BATCH_BUCKETS if bucket >= num_sequences)
    )
    assert shape.width == MIN_WIDTH


def test_other_steps_have_no_bucket() -> None:
    assert decode_shape(make_batch([(1, 5), (2, 5)]), SIZE) is None
    assert decode_shape(make_batch([(1, 1)] * (BATCH_BUCKETS[-1] + 1)), SIZE) is None


@pytest.mark.parametrize(("blocks", "width"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (1000, 1024)])
def test_widths_double(blocks: int, width: int) -> None:
    for context in (SIZE * (blocks - 1) + 1, SIZE * blocks):
        shape = decode_shape(make_batch([(1, 1), (1, context)]), SIZE)
        assert shape is not None and shape.width == width


@pytest.mark.parametrize("num_sequences", [1, 5, 8])
def test_padded_rows_use_the_spare_block_alone(num_sequences: int) -> None:
    source = make_batch([(1, context + 1) for context in range(num_sequences)])
    padded = pad_decode(source, 8, SPARE, SIZE)
    assert torch.equal(padded.slot_mapping[:num_sequences], source.slot_mapping)
    assert torch.equal(padded.token_ids[:num_sequences], source.token_ids)
    assert padded.spans[:num_sequences] == source.spans
    assert padded.logits_indices.tolist() == list(range(8))
    for row in range(num_sequences, 8):
        span = padded.spans[row]
        assert (span.query_start, span.query_len, span.context_len) == (row, 1, 1)
        assert span.block_table.tolist() == [int(padded.slot_mapping[row]) // SIZE] == [SPARE]
        assert int(padded.positions[row]) == 0
