"""The figures that benchmarks/handoff.py makes of what it measured."""

from __future__ import annotations

import pytest

from benchmarks.handoff import CHUNK_TOKENS, HandOff, last_chunk, rows_of


def test_last_chunk() -> None:
    assert [last_chunk(n) for n in (1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS)] == [
        1,
        CHUNK_TOKENS,
        1,
        CHUNK_TOKENS,
    ]


def test_rows() -> None:
    one = HandOff(prefill_s=1.02, prefill_alone_s=1.0, ttft_s=1.1, gap_s=0.05, step_s=0.02, copy_s=0.01, late_tokens=0)
    rows = {row.name: (row.unit, row.values) for row in rows_of(1024, [one])}
    assert rows["1024 tokens: publishing costs"] == ("%", (pytest.approx(2.0),))
    assert rows["1024 tokens: gap less step"] == ("ms", (pytest.approx(30.0),))
    assert rows["1024 tokens: last chunk's copy"] == ("ms", (pytest.approx(10.0),))
