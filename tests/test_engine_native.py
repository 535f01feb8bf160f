"""The compiled attention against plain torch: random block tables, lengths, groups, head sizes, windows and dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine import native
from engine.native import DecodeBatch

ISAS = [isa for isa in (0, 1, 2) if isa <= native.isa()]


def reference(q: torch.Tensor, cache: torch.Tensor, table: list[int], context: int, window: int | None) -> torch.Tensor:
    """q `[H, D]`, float64 throughout; each query head with its own copy of its KV head."""
    keys, values = (cache[table, part].flatten(0, 1)[:context].double() for part in (0, 1))  # [S, Hkv, D]
    first = 0 if window is None else max(0, context - window)
    group = q.shape[0] // keys.shape[1]
    keys, values = (x[first:].repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("hd,shd->hs", q.double(), keys) / math.sqrt(q.shape[1])
    return torch.einsum("hs,shd->hd", scores.softmax(-1), values)


@pytest.mark.parametrize("isa", ISAS, ids=[native.ISA_NAMES[isa] for isa in ISAS])
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=5),
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    block_size=st.sampled_from([1, 8, 16, 24, 32]),
    window=st.sampled_from([None, 1, 17, 256, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 20.0]),
)
def test_equals_torch(isa, seed, lengths, group, kv_heads, head_dim, block_size, window, dtype, scale) -> None:
    assume(native.can_decode(head_dim, dtype, torch.device("cpu")))
    generator = torch.Generator().manual_seed(seed)
    tables = [-(-length // block_size) for length in lengths]
    num_blocks = sum(tables) + 2
    layers = 2
    # What is not a sequence's own is not a number: reading it shows.
    cache = torch.full((num_blocks, layers, 2, block_size, kv_heads, head_dim), math.nan, dtype=dtype)
    order = torch.randperm(num_blocks, generator=generator).tolist()
    table_of = [[order.pop() for _ in range(count)] for count in tables]
    for table, length in zip(table_of, lengths, strict=True):
        for position in range(length):
            rows = torch.randn(2, kv_heads, head_dim, generator=generator)
            cache[table[position // block_size], 1, :, position % block_size] = rows.to(dtype)
    num_rows = len(lengths) + 2
    q = (scale * torch.randn(num_rows, kv_heads * group + 1, head_dim, generator=generator)).to(dtype)[:, 1:]
    out = torch.full((num_rows, kv_heads * group, head_dim), 7.0, dtype=dtype)
    rows = torch.randperm(num_rows, generator=generator)[: len(lengths)].tolist()
    layer = cache[:, 1]
    DecodeBatch(rows, lengths, [torch.tensor(table) for table in table_of], window).attend(q, layer, out, isa)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for row, table, length in zip(rows, table_of, lengths, strict=True):
        expected = reference(q[row], layer, table, length, window)
        torch.testing.assert_close(out[row].double(), expected, rtol=tolerance, atol=tolerance)
    untouched = sorted(set(range(num_rows)) - set(rows))
    assert (out[untouched] == 7.0).all()


@pytest.mark.skipif(native.isa() < 0, reason="no compiler at installation")
def test_a_result_does_not_depend_on_neighbours_or_threads() -> None:
    """Bit for bit: how work is cut up depends on the sequence alone."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(200, 2, 16, 2, 64, generator=generator)
    lengths = [1, 300, 1500, 700]
    order = torch.randperm(200, generator=generator)
    tables = list(order[: sum(-(-n // 16) for n in lengths)].split([-(-n // 16) for n in lengths]))
    q = torch.randn(4, 6, 64, generator=generator)
    together, alone = torch.empty_like(q), torch.empty_like(q)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    DecodeBatch(range(4), lengths, tables, None).attend(q, cache, together)
    torch.set_num_threads(1)
    for row in range(4):
        DecodeBatch([row], [lengths[row]], [tables[row]], None).attend(q, cache, alone)
    torch.set_num_threads(before)
    assert torch.equal(together, alone)


def test_what_it_cannot_do_is_told() -> None:
    cpu = torch.device("cpu")
    assert not native.can_decode(72, torch.float32, cpu)
    assert not native.can_decode(80, torch.bfloat16, cpu)
    assert not native.can_decode(512, torch.float32, cpu)
    assert not native.can_decode(64, torch.float16, cpu)
    assert not native.can_decode(64, torch.float32, torch.device("cuda"))
    assert native.can_decode(64, torch.bfloat16, cpu) == (native.isa() >= 0)
