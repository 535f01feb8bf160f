"""The simulator beside a live cluster: the same slice of a trace through both, and how far apart their times are.

Repeat it with `python -m benchmarks.sim_live TRACE` from the repository's root; it takes about four minutes. (`--quick`
for a look; without TRACE a made one is replayed.) One prefill and one decode node, each with its engine on a core of
its own, a store and a router, all processes of this machine. A trace's block of 512 tokens is sent as 32.

Part of the trace is sent request by request, so that nothing waits, half of it before and half of it after the run
that is judged: what prompts, steps and calls take is fitted to that, as a machine file for `baton simulate --machine`
(`--machine-out FILE` keeps it). Another part, of which the fit has seen nothing, is replayed with its own gaps, at the
speed at which the prefill node is busy for `--load` of the time; and the simulator replays the same part with that
machine. Nothing is fitted to the run that is judged.

Rows: live figures beside the simulator's, and the errors of its mean and percentiles in percent of the live ones. Then
what the live router predicted of each of these requests, beside what became of it, as its metrics have it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.live_cluster import Ask, LiveCluster, Served, live_cluster
from benchmarks.rows import Peer, Row, print_beside
from engine.config import EngineConfig
from loadtest.ideal import leading_run
from loadtest.machines import Machine, fitted
from loadtest.replay import replay_prompts, scaled
from loadtest.report import percentile
from loadtest.sim_config import SimConfig
from loadtest.simulator import Simulator
from loadtest.trace import BLOCK_TOKENS, TracedRequest, make_trace, read_trace
from router.plan import Rates

MODEL = Path(__file__).resolve().parent.parent / "models" / "pocket"
BLOCKS = 2  # of the engine that a trace's block is sent as: prompts long enough to outweigh what calls take
BLOCK = BLOCKS * EngineConfig().block_size  # in tokens
SCALE = BLOCK_TOKENS // BLOCK
GROUP = 8  # prompts whose mean is one measurement for the fit: of single ones the lowest would count the most
GAPS = 64  # likewise of gaps between tokens, of which many are next to nothing: several tokens come in one message
WARM_UP = 8
NUM_BLOCKS, STORE_BYTES = 5120, 1 << 30  # room for all that a burst admits


@dataclass(frozen=True)
class Times:
    """A run's TTFT and TPOT, seconds; TPOT of those with a second token."""

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """One repeat."""

    live: Times
    simulated: Times
    served: Sequence[Served]
    hit_rates: tuple[float, float]  # live, simulated: tokens
    alone: tuple[float, float]  # likewise: requests whose prompt the decode node computed
    load: float  # of the prefill node, by the fit, over the live run


def fitting(trace: Sequence[TracedRequest], max_model_len: int) -> list[TracedRequest]:
    """Those that the model takes once they are scaled, with the lengths of answers that are sent."""
    found = []
    for request in trace:
        num_in, num_out = scaled(request, BLOCK)
        if num_in + num_out <= max_model_len:
            found.append(replace(request, output_tokens=num_out))
    return found


def asks_of(requests: Sequence[TracedRequest], vocab_size: int, nonce: str) -> list[Ask]:
    prompts = replay_prompts(requests, BLOCK, vocab_size, nonce)
    return [Ask(prompt, r.output_tokens, r.arrival_s) for prompt, r in zip(prompts, requests, strict=True)]


def machine_data(served: Sequence[Served], cluster: LiveCluster) -> dict[str, Any]:
    """What was measured, as a machine file in the trace's tokens. `served` came one by one."""
    legs = [one for one in served if one.timeline.prefill_node]
    prefill = [
        (SCALE * (one.prompt_tokens - one.cached_tokens), SCALE * one.cached_tokens, one.prefill_s) for one in legs
    ]
    gaps = step_gaps(served)
    step_s = statistics.fmean(seconds for _, _, seconds in gaps)
    first_gaps = [one.times_s[1] - one.times_s[0] for one in legs if len(one.times_s) > 1]
    return {
        "prefill": grouped(prefill, GROUP),
        "step": grouped([(count, SCALE * cached, seconds) for count, cached, seconds in gaps], GAPS, by=1),
        "token_bytes": max(1, BLOCKS * cluster.block_bytes // BLOCK_TOKENS),
        "wire_bytes_per_s": Rates().memory_bytes_per_s,
        "kv_blocks": cluster.num_blocks // BLOCKS,
        "first_s": statistics.median(one.ttft_s - one.prefill_s for one in legs),
        "handoff_s": max(0.0, statistics.fmean(first_gaps) - step_s),
        "chunk_tokens": EngineConfig().max_num_batched_tokens * SCALE,
        "stall_s": Rates().max_stall_s,
    }


def step_gaps(served: Sequence[Served]) -> list[tuple[float, float, float]]:
    """(requests that decode, tokens in their caches, seconds) of each token but the first two of a request."""
    spans = [(one.times_s[0], one.times_s[-1], one.prompt_tokens) for one in served]
    gaps = []
    for one in served:
        for index in range(2, len(one.times_s)):
            begin_s, end_s = one.times_s[index - 1], one.times_s[index]
            beside = [tokens for first_s, last_s, tokens in spans if first_s < end_s and last_s > begin_s]
            gaps.append((float(len(beside)), float(sum(beside)), end_s - begin_s))
    return gaps


def grouped(rows: Sequence[tuple[float, float, float]], size: int, by: int = 0) -> list[list[float]]:
    """Means of `size` measurements that are alike, by one of their columns; the last group may be smaller."""
    ranked = sorted(rows, key=lambda row: row[by])
    groups = [ranked[start : start + size] for start in range(0, len(ranked), size)]
    means = [[statistics.fmean(column) for column in zip(*group, strict=True)] for group in groups]
    return [row for row in means if row[2] > 0.0]


def slice_of(requests: Sequence[TracedRequest], machine: Machine, seconds: float, load: float) -> list[TracedRequest]:
    """As many requests as keep the prefill node busy for `load` of `seconds`, from 0.0 on, at that speed."""
    seen, work_s, kept = set[int](), 0.0, 0
    for request in requests:
        cached = min(leading_run(request.blocks, seen) * BLOCK_TOKENS, request.input_tokens - 1)
        seen.update(request.blocks)
        work_s += machine.prefill.seconds(request.input_tokens - cached, cached)
        kept += 1
        if work_s >= load * seconds:
            break
    first_s, last_s = requests[0].arrival_s, requests[kept - 1].arrival_s
    speed = max(1e-9, last_s - first_s) / (work_s / load)
    return [replace(request, arrival_s=(request.arrival_s - first_s) / speed) for request in requests[:kept]]


def simulated(requests: Sequence[TracedRequest], machine: Machine, num_slots: int) -> tuple[Times, float, float]:
    """The same requests through the simulator, as they are shipped: shortest first, S3-FIFO. Times, hits, alone."""
    config = SimConfig(
        machine,
        prefill=1,
        decode=1,
        arena_blocks=num_slots,
        eviction="s3fifo",
        queue="shortest",
        chunk_tokens=machine.chunk_tokens,
        is_one_host=True,
    )
    jobs = Simulator(config).run(requests)
    tpot_s = tuple(job.tpot_s for job in jobs if job.request.output_tokens > 1)
    num_hit = sum(job.hit_blocks for job in jobs) * BLOCK_TOKENS
    times = Times(tuple(job.ttft_s for job in jobs), tpot_s)
    num_alone = sum(job.prefilled_by.startswith("decode") for job in jobs)
    return times, num_hit / sum(r.input_tokens for r in requests), num_alone / len(jobs)


async def measure(args: argparse.Namespace, folder: Path) -> list[Outcome]:
    outcomes = []
    async with live_cluster(folder, MODEL, NUM_BLOCKS, STORE_BYTES) as cluster:
        for seed in range(args.repeats):
            trace = trace_of(args, seed)
            requests = fitting(trace, cluster.max_model_len)
            half = len(requests) // 2
            first = asks_of(requests[:half], cluster.vocab_size, f"calibration {seed}")
            await cluster.one_by_one(first[:WARM_UP], args.seconds)
            fit_seconds, middle = args.calibration_seconds / 2, WARM_UP + (half - WARM_UP) // 2
            measured = await cluster.one_by_one(first[WARM_UP:middle], fit_seconds, args.load)
            part = slice_of(requests[half:], fitted(machine_data(measured, cluster)), args.seconds, args.load)
            served = await cluster.replay(asks_of(part, cluster.vocab_size, f"judged {seed}"))
            measured += await cluster.one_by_one(
                first[middle:], fit_seconds, args.load
            )  # the machine's speed may have changed
            data = machine_data(measured, cluster)
            print(f"repeat {seed}: {fitted(data)}", file=sys.stderr)
            if args.machine_out:
                args.machine_out.write_text(json.dumps(data) + "\n")
            outcomes.append(outcome_of(served, part, fitted(data), cluster.num_slots // BLOCKS))
    return outcomes


def outcome_of(
    served: Sequence[Served], requests: Sequence[TracedRequest], machine: Machine, num_slots: int
) -> Outcome:
    """What was live, beside the simulator's run of the same requests."""
    times, hit_rate, alone = simulated(requests, machine, num_slots)
    live_alone = sum(not one.timeline.prefill_node for one in served) / len(served)
    live_rate = sum(one.cached_tokens for one in served) / sum(one.prompt_tokens for one in served)
    tpot_s = tuple(one.tpot_s for one in served if len(one.times_s) > 1)
    live = Times(tuple(one.ttft_s for one in served), tpot_s)
    work_s = sum(
        machine.prefill.seconds(SCALE * (one.prompt_tokens - one.cached_tokens), SCALE * one.cached_tokens)
        for one in served
    )
    load = work_s / max(1e-9, requests[-1].arrival_s)
    return Outcome(live, times, served, (live_rate, hit_rate), (live_alone, alone), load)


def trace_of(args: argparse.Namespace, seed: int) -> list[TracedRequest]:
    """With the names of its times only: each repeat jitters them anew."""
    if args.trace is None:
        return make_trace(args.requests, random.Random(seed))
    return read_trace(args.trace, random.Random(seed))[: args.requests]


def rows_of(outcomes: Sequence[Outcome]) -> tuple[list[Row], Peer]:
    """Live figures with the simulator's beside them, then its errors, then the router's."""
    rows, beside = [], list[tuple[float, ...]]()

    def add(name: str, unit: str, values: Sequence[float], others: Sequence[float] = ()) -> None:
        rows.append(Row(name, unit, tuple(values)))
        beside.append(tuple(others))

    for kind in ("ttft_s", "tpot_s"):
        title = kind[:4].upper()
        for name, figure in (("mean", statistics.fmean), ("p50", _percentile(50)), ("p90", _percentile(90))):
            live = [1e3 * figure(getattr(one.live, kind)) for one in outcomes]
            ours = [1e3 * figure(getattr(one.simulated, kind)) for one in outcomes]
            add(f"{title} {name}", "ms", live, ours)
            errors = [100 * (a / b - 1) for a, b in zip(ours, live, strict=True)]
            add(f"{title} {name}: the simulator's error", "%", errors)
    add("hit rate, tokens", "", [one.hit_rates[0] for one in outcomes], [one.hit_rates[1] for one in outcomes])
    add("prompts of the decode node", "", [one.alone[0] for one in outcomes], [one.alone[1] for one in outcomes])
    add("prefill node's load", "", [one.load for one in outcomes])
    add("requests", "", [float(len(one.served)) for one in outcomes])
    predictions = {
        "TTFT": [ttft_pairs(one.served) for one in outcomes],
        "TPOT": [tpot_pairs(one.served) for one in outcomes],
    }
    for title, pairs in predictions.items():
        for percent in (50, 90):
            errors = [percentile([100 * abs(a - b) / b for a, b in found], percent) for found in pairs]
            add(f"{title}: the router's error, p{percent}", "%", errors)
        bias = [percentile([100 * (a / b - 1) for a, b in found], 50) for found in pairs]
        add(f"{title}: the router's error with its sign, p50", "%", bias)
    return rows, Peer("simulator", beside)


def ttft_pairs(served: Sequence[Served]) -> list[tuple[float, float]]:
    """(predicted, actual) as the router counts them: since its plan."""
    lines = [one.timeline for one in served]
    return [(line.predicted_ttft_s, line.first_token_s - line.planned_s) for line in lines]


def tpot_pairs(served: Sequence[Served]) -> list[tuple[float, float]]:
    return [(one.timeline.predicted_tpot_s, one.timeline.tpot_s) for one in served if one.timeline.tpot_s > 0.0]


def _percentile(percent: float) -> Any:
    return lambda values: percentile(values, percent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few seconds of each part")
    parser.add_argument("--requests", type=int, default=4000, help="of the trace, at most (default 4000)")
    parser.add_argument("--repeats", type=int, default=2, help="each with jitter and a fit of its own (default 2)")
    parser.add_argument("--load", type=float, default=0.6, help="of the prefill node (default 0.6)")
    parser.add_argument("--seconds", type=float, default=70.0, help="of each replay (default 70)")
    parser.add_argument("--calibration-seconds", type=float, default=30.0, help="before it (default 30)")
    parser.add_argument("--machine-out", type=Path, metavar="FILE", help="the last fit's measurements")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.seconds, args.calibration_seconds = 1, 15.0, 8.0
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/dev/shm") as name:
        rows, peer = rows_of(asyncio.run(measure(args, Path(name))))
    print_beside("sim_live", rows, [peer])


if __name__ == "__main__":
    main()
