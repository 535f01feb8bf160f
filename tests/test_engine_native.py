"""The compiled attention against plain torch: random block tables, lengths, groups, head sizes, windows and dtypes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine import attention, native
from engine.native import AttentionBatch

ISAS = [isa for isa in range(len(native.ISA_NAMES)) if isa <= native.isa()]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def reference(q: torch.Tensor, cache: torch.Tensor, table: list[int], context: int, window: int | None) -> torch.Tensor:
    """q `[T, H, D]`, float64 throughout; each query head with its own copy of its KV head."""
    keys, values = (cache[table, part].flatten(0, 1)[:context].double() for part in (0, 1))  # [S, Hkv, D]
    # What no query sees is not a number here, and no weight takes that away.
    first = 0 if window is None else max(0, context - len(q) - window + 1)
    keys, values = (x[first:].repeat_interleave(q.shape[1] // keys.shape[1], 1) for x in (keys, values))
    distance = torch.arange(context - len(q), context)[:, None] - torch.arange(first, context)
    is_seen = (distance >= 0) & (distance < (window or context))
    scores = torch.einsum("qhd,shd->hqs", q.double(), keys) / math.sqrt(q.shape[2])
    return torch.einsum("hqs,shd->qhd", scores.masked_fill(~is_seen, -math.inf).softmax(-1), values)


@dataclass
class Case:
    """Sequences with scattered blocks in one layer of a cache, and queries at scattered rows."""

    q: torch.Tensor
    layer: torch.Tensor
    spans: list[tuple[int, int, int]]
    tables: list[list[int]]
    window: int | None

    def attend(self, isa: int | None = None, chosen: Sequence[int] | None = None) -> torch.Tensor:
        out = torch.full(self.q.shape, 7.0, dtype=self.q.dtype)
        chosen = range(len(self.spans)) if chosen is None else chosen
        tables = [torch.tensor(self.tables[i]) for i in chosen]
        AttentionBatch([self.spans[i] for i in chosen], tables, self.window).attend(self.q, self.layer, out, isa)
        return out

    def check(self, out: torch.Tensor, tolerance: float) -> None:
        is_touched = torch.zeros(len(out), dtype=torch.bool)
        for (start, length, context), table in zip(self.spans, self.tables, strict=True):
            rows = slice(start, start + length)
            expected = reference(self.q[rows], self.layer, table, context, self.window)
            torch.testing.assert_close(out[rows].double(), expected, rtol=tolerance, atol=tolerance)
            is_touched[rows] = True
        assert (out[~is_touched] == 7.0).all()


def make_case(
    lengths: Sequence[tuple[int, int]],  # of each sequence: queries, tokens before them
    seed: int = 0,
    group: int = 3,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    contexts = [queries + prior for queries, prior in lengths]
    counts = [-(-context // block_size) for context in contexts]
    num_blocks = sum(counts) + 2
    # What is not a sequence's own, or is out of its sight, is not a number: reading it shows.
    cache = torch.full((num_blocks, 2, 2, block_size, kv_heads, head_dim), math.nan, dtype=dtype)
    tables = list(torch.randperm(num_blocks, generator=generator)[: sum(counts)].split(counts))
    for table, context, (_, prior) in zip(tables, contexts, lengths, strict=True):
        positions = torch.arange(0 if window is None else max(0, prior - window + 1), context)
        rows = torch.randn(len(positions), 2, kv_heads, head_dim, generator=generator).to(dtype)
        cache[table[positions // block_size], 1, :, positions % block_size] = rows
    spans, row = [(0, 0, 0)] * len(lengths), 1  # a row before, between and behind them is nobody's
    for i in torch.randperm(len(lengths), generator=generator).tolist():
        spans[i] = row, lengths[i][0], contexts[i]
        row += lengths[i][0] + 1
    q = (scale * torch.randn(row, kv_heads * group + 1, head_dim, generator=generator)).to(dtype)[:, 1:]
    return Case(q, cache[:, 1], spans, [table.tolist() for table in tables], window)


decode_lengths = st.lists(st.tuples(st.just(1), st.integers(0, 700)), min_size=1, max_size=5)
prompt_lengths = st.lists(
    st.tuples(st.integers(1, 300), st.one_of(st.just(0), st.integers(0, 300))), min_size=1, max_size=4
)


@pytest.mark.parametrize("isa", ISAS, ids=[native.ISA_NAMES[isa] for isa in ISAS])
@pytest.mark.parametrize("kind", [decode_lengths, prompt_lengths], ids=["decode", "prompt"])
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 32, 64, 80, 96, 128, 256]),
    block_size=st.sampled_from([1, 8, 16, 24, 32]),
    window=st.sampled_from([None, 1, 17, 256, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 20.0]),
)
def test_equals_torch(isa, kind, data, seed, group, kv_heads, head_dim, block_size, window, dtype, scale) -> None:
    assume(native.can_attend(head_dim, dtype, torch.device("cpu")))
    lengths = data.draw(kind)
    case = make_case(lengths, seed, group, kv_heads, head_dim, block_size, window, dtype, scale)
    # Large scores have large errors in float32, and softmax makes relative errors of them.
    case.check(case.attend(isa), 1e-4 if dtype == torch.float32 and scale > 1 else TOLERANCES[dtype])


@pytest.mark.parametrize("isa", ISAS, ids=[native.ISA_NAMES[isa] for isa in ISAS])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    "lengths",
    [[(1, 0), (1, 299), (1, 1499), (1, 699)], [(2, 0), (300, 0), (70, 500), (1, 130)]],
    ids=["decode", "prompt"],
)
def test_a_result_does_not_depend_on_neighbours_or_threads(isa, dtype, window, lengths) -> None:
    """Bit for bit: how work is cut up depends on the sequence alone."""
    case = make_case(lengths, window=window, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    together = case.attend(isa)
    torch.set_num_threads(1)
    for i, (start, length, _) in enumerate(case.spans):
        if lengths[i][0] == 1 and lengths[0][0] > 1:
            continue  # alone, it goes to the other kernel
        rows = slice(start, start + length)
        assert torch.equal(case.attend(isa, [i])[rows], together[rows])
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS, ids=[native.ISA_NAMES[isa] for isa in ISAS])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_a_prompt_in_chunks_gives_the_same_as_in_one_step(isa, dtype, window) -> None:
    """Bit for bit: a hit in the prefix cache or another chunk size changes no token."""
    case = make_case([(400, 0)], window=window, dtype=dtype)
    whole = case.attend(isa)
    for begin, end in ((0, 33), (33, 163), (163, 400)):
        chunk = Case(case.q, case.layer, [(1 + begin, end - begin, end)], case.tables, window)
        assert torch.equal(chunk.attend(isa)[1 + begin : 1 + end], whole[1 + begin : 1 + end])


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("window", [None, 100])
def test_a_step_of_prompts_and_decodes_with_and_without_kernels(monkeypatch, is_compiled, window) -> None:
    if not is_compiled:
        monkeypatch.setattr(attention, "can_attend", lambda *shape: False)
    case = make_case([(1, 0), (1, 299), (300, 0), (70, 500)], block_size=16)
    case.window = window
    rows = torch.cat([torch.arange(start, start + length) for start, length, _ in case.spans])
    slots = torch.cat(
        [
            torch.tensor([table[p // 16] * 16 + p % 16 for p in range(context - length, context)])
            for (_, length, context), table in zip(case.spans, case.tables, strict=True)
        ]
    )
    starts = itertools.accumulate((length for _, length, _ in case.spans), initial=0)
    spans = [
        attention.SequenceSpan(start, length, context, torch.tensor(table))
        for start, (_, length, context), table in zip(starts, case.spans, case.tables, strict=False)
    ]
    batch = attention.ForwardBatch(slots, slots, slots, tuple(spans), slots)  # it looks at slots and spans alone
    k, v = (case.layer[slots // 16, part, slots % 16] for part in (0, 1))
    plan = attention.plan_attention(batch, case.layer[:, None], window)
    out = torch.full(case.q.shape, 7.0)
    out[rows] = attention.attend(case.q[rows], k, v, case.layer, plan)
    case.check(out, 1e-5)


def test_what_it_cannot_do_is_told() -> None:
    cpu = torch.device("cpu")
    assert not native.can_attend(72, torch.float32, cpu)
    assert not native.can_attend(80, torch.bfloat16, cpu)
    assert not native.can_attend(512, torch.float32, cpu)
    assert not native.can_attend(64, torch.float16, cpu)
    assert not native.can_attend(64, torch.float32, torch.device("cuda"))
    assert native.can_attend(64, torch.bfloat16, cpu) == (native.isa() >= 0)
