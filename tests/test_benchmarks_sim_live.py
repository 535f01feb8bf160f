"""What benchmarks/sim_live.py makes of measurements: a machine, a slice of a trace at a load, and errors."""

from __future__ import annotations

import random

import pytest

from batonpb import inference_pb2
from benchmarks.live_cluster import Served
from benchmarks.sim_live import BLOCK, SCALE, fitting, grouped, outcome_of, rows_of, slice_of, step_gaps
from loadtest.machines import Machine
from loadtest.sim_config import SimConfig
from loadtest.simulator import Simulator
from loadtest.trace import make_trace
from router.speeds import PrefillSpeed

MACHINE = Machine(
    PrefillSpeed(0.002, 4e-6, 1e-11),
    weights_s=0.002,
    kv_token_s=1e-9,
    token_bytes=192,
    wire_bytes_per_s=4e9,
    kv_blocks=4000,
    first_s=0.003,
    handoff_s=0.004,
    chunk_tokens=512 * SCALE,
    stall_s=0.0,
)
TRACE = fitting(make_trace(600, random.Random(1)), 4096)


def served(sent_s: float, times_s: tuple[float, ...], tokens: int = 100) -> Served:
    return Served(sent_s, times_s, tokens, 0, inference_pb2.Timeline(prefill_node="p", first_token_s=0.1))


def test_requests_are_as_long_as_they_are_sent_and_keep_the_node_busy_as_wanted() -> None:
    part = slice_of(TRACE[200:], MACHINE, seconds=5.0, load=0.6)
    assert part[0].arrival_s == 0.0
    assert part[-1].arrival_s == pytest.approx(5.0, rel=0.1)
    assert all(1 <= request.output_tokens <= 2000 / SCALE + 1 for request in part)


def test_steps_are_counted_with_those_beside_them() -> None:
    gaps = step_gaps([served(0.0, (1.0, 2.0, 3.0), 100), served(0.0, (2.5, 2.6), 7), served(0.0, (9.0,), 1)])
    assert gaps == [(2.0, 107.0, 1.0)]


def test_groups_are_means_of_measurements_that_are_alike() -> None:
    rows = [(float(n), 2.0 * n, 1.0) for n in reversed(range(16))]
    assert grouped(rows, 8) == [[3.5, 7.0, 1.0], [11.5, 23.0, 1.0]]


def test_a_cluster_that_is_the_simulator_has_no_errors() -> None:
    part = slice_of(TRACE, MACHINE, seconds=5.0, load=0.6)
    config = SimConfig(MACHINE, 1, 1, arena_blocks=4000, eviction="s3fifo", queue="shortest")
    live = []
    for job in Simulator(config).run(part):
        gap_s = job.tpot_s
        times_s = tuple(job.first_token_s + gap_s * n for n in range(job.request.output_tokens))
        line = inference_pb2.Timeline(first_token_s=job.ttft_s, predicted_ttft_s=job.ttft_s)
        line.tpot_s = line.predicted_tpot_s = gap_s
        tokens = job.request.input_tokens // SCALE
        live.append(Served(job.request.arrival_s, times_s, tokens, min(tokens, BLOCK * job.hit_blocks), line))
    outcome = outcome_of(live, part, MACHINE, 4000)
    rows, peer = rows_of([outcome])
    errors = {row.name: row.values[0] for row in rows if "the simulator's error" in row.name}
    assert len(errors) == 6
    assert all(abs(error) < 1.0 for name, error in errors.items() if "TTFT" in name), errors
    assert {row.name: row.values[0] for row in rows}["TTFT: the router's error, p90"] == 0.0
    assert len(peer.values) == len(rows)


def test_calls_are_in_the_times_and_keep_no_node_busy() -> None:
    part = slice_of(TRACE, MACHINE, seconds=5.0, load=0.3)
    bare = Machine(**{**vars(MACHINE), "first_s": 0.0, "handoff_s": 0.0})
    with_calls, without = (Simulator(SimConfig(machine, 1, 1)).run(part) for machine in (MACHINE, bare))
    for one, other in zip(with_calls, without, strict=True):
        assert one.ttft_s == pytest.approx(other.ttft_s + 0.003)
