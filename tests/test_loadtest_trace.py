"""Traces: what is read, what is refused and by which name, and made ones that look like a real one."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from loadtest.trace import BLOCK_TOKENS, BadTrace, TraceShape, make_trace, read_trace

GOOD = {"timestamp": 3000, "input_length": 1000, "output_length": 7, "hash_ids": [0, 5]}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_line_is_a_request(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", GOOD, "", GOOD | {"timestamp": 0, "input_length": 512, "hash_ids": [0]})
    requests = read_trace(path, random.Random(0), grain_s=0.0)
    assert [(r.arrival_s, r.input_tokens, r.output_tokens, r.blocks) for r in requests] == [
        (0.0, 512, 7, (0,)),
        (3.0, 1000, 7, (0, 5)),
    ]
    assert read_trace(path, random.Random(0), grain_s=0.0, scale=2.0)[1].arrival_s == 1.5


def test_jitter_stays_within_the_grain_and_repeats(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", *[GOOD] * 50)
    requests = read_trace(path, random.Random(1))
    arrivals = [request.arrival_s for request in requests]
    assert arrivals == sorted(arrivals) and len(set(arrivals)) == 50
    assert all(3.0 <= arrival_s < 6.0 for arrival_s in arrivals)
    assert read_trace(path, random.Random(1)) == requests


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "must be an object"),
        (GOOD | {"timestamp": "now"}, "timestamp"),
        (GOOD | {"timestamp": -1}, "timestamp"),
        (GOOD | {"timestamp": True}, "timestamp"),
        (GOOD | {"timestamp": float("nan")}, "timestamp"),
        (GOOD | {"input_length": 0}, "input_length"),
        (GOOD | {"input_length": 1 << 40}, "input_length"),
        (GOOD | {"input_length": 1000.0}, "input_length"),
        ({name: GOOD[name] for name in GOOD if name != "output_length"}, "output_length"),
        (GOOD | {"output_length": True}, "output_length"),
        (GOOD | {"hash_ids": "05"}, "hash_ids"),
        (GOOD | {"hash_ids": [0, "5"]}, "hash_ids"),
        (GOOD | {"hash_ids": [0]}, "hash_ids"),
        (GOOD | {"hash_ids": [0, 5, 6]}, "hash_ids"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: Any, field: str) -> None:
    with pytest.raises(BadTrace, match=rf"^trace, line 2: .*{field}"):
        read_trace(write(tmp_path / "trace", GOOD, line), random.Random(0))


def test_a_made_trace_has_the_shape_of_the_real_one() -> None:
    requests = make_trace(3000, random.Random(0))
    arrivals = [request.arrival_s for request in requests]
    assert len(requests) == 3000 and arrivals == sorted(arrivals) and arrivals[0] >= 0.0
    assert 3000 / arrivals[-1] == pytest.approx(3.4, rel=0.15)
    assert all(len(r.blocks) == -(-r.input_tokens // BLOCK_TOKENS) and r.output_tokens >= 1 for r in requests)
    assert {request.blocks[0] for request in requests if request.input_tokens >= BLOCK_TOKENS} == {0}  # shared root
    assert statistics.fmean(r.input_tokens for r in requests) == pytest.approx(12_000, rel=0.15)
    assert statistics.fmean(r.output_tokens for r in requests) == pytest.approx(343, rel=0.15)


def test_a_later_turn_begins_with_the_one_before_it() -> None:
    ends: dict[int, int] = {}  # last full block of a turn -> how many blocks
    num_later = 0
    for request in make_trace(2000, random.Random(3)):
        full = request.blocks[: request.input_tokens // BLOCK_TOKENS]
        found = [depth for depth, block in enumerate(full) if ends.get(block) == depth + 1 and depth]
        num_later += bool(found)
        assert len(set(request.blocks)) == len(request.blocks)
        if full:
            ends[full[-1]] = len(full)
    assert num_later > 300


def test_a_made_trace_repeats_and_does_as_it_is_told() -> None:
    shape = TraceShape(requests_per_s=10.0, max_input_tokens=4000)
    requests = make_trace(200, random.Random(5), shape)
    assert requests == make_trace(200, random.Random(5), shape) != make_trace(200, random.Random(6), shape)
    assert max(request.input_tokens for request in requests) <= 4000
    assert requests[8].faster(4.0).arrival_s == requests[8].arrival_s / 4
