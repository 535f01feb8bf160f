"""The router's policies under a virtual clock: Baton's simulator beside published figures, bounds and other policies.

Repeat it with `python -m benchmarks.simulate TRACE`; `TRACE` is conversation_trace.jsonl of Mooncake's FAST'25 release,
which is not shipped. Without it, a made trace of the same shape and length is run. `--quick`: a made trace of
3,000 requests, one seed and 200 nodes in place of 1,000, within a minute. Unless a row says so, 8 prefill and 8 decode
nodes of 8 A100 run Llama 3 70B (docs/simulator.md has the formulas), each with an LRU of 5,860 blocks.

Each seed jitters the trace and the policies anew, so the repeats of a row are seeds. The clock is virtual: nothing here
depends on the machine but "replay" (of a whole trace) and "decision" (one, without the look-up of its blocks), both of
processor time: a thread that is pushed off its core decides nothing.

Peers: "ideal" is one queue in front of all nodes and a free cache without limits; "pool" is one LRU as large as all
arenas together; "FAST'25" is Mooncake's paper (figure 5: 16 nodes, 8 of them prefill; figure 1: gains over vLLM); the
others are policies in the same simulator.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.rows import Peer, Row, print_beside
from loadtest.capacity import Capacity, colocated, disaggregated
from loadtest.ideal import ideal_ttfts_s, pooled_hit_rate
from loadtest.machines import MACHINES
from loadtest.report import percentile
from loadtest.sim_config import SimConfig
from loadtest.sim_plots import draw_capacity
from loadtest.sim_report import figures
from loadtest.simulator import Simulator
from loadtest.trace import TracedRequest, TraceShape, make_trace, read_trace

CONFIG = SimConfig(MACHINES["8xA100"])
PUBLISHED_S = {"random": 19.65, "least_loaded": 5.27, "local": 3.58, "conductor": 3.07}  # FAST'25, figure 5
POLICIES = ("random", "least_loaded", "cache_aware", "kv_cost", "local", "conductor", "predict")
OVERLOAD, SLO_S = 2.0, 30.0
LOADS = (1.0, 2.0, 3.0, 4.0)  # speeds at which goodput is measured
TPOT_LIMITS_S = (0.1, 0.2, 0.3)
PUBLISHED_GAIN = (5.98, 2.57, 1.59)  # FAST'25, figure 1: +498, +157, +59 %
CAPACITY_SEEDS = 3  # at most: a capacity is a search
NODES = 16  # of 8 GPUs, for the comparison of capacities


@dataclass(frozen=True)
class Figure:
    """A row with its peer's figure: a value a repeat."""

    row: Row
    peer: str = ""
    values: tuple[float, ...] = ()
    is_limit: bool = False


def schedule_rows(traces: Sequence[Sequence[TracedRequest]]) -> list[Figure]:
    """Mean TTFT of each policy, and what the best of them reach of the bounds."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in POLICIES}
    ideals, pools = [], []
    for seed, trace in enumerate(traces):
        for name in POLICIES:
            found[name].append(run(trace, seed, policy=name))
        ideals.append(statistics.fmean(ideal_ttfts_s(trace, CONFIG.machine.prefill, CONFIG.prefill)))
        pools.append(pooled_hit_rate(trace, CONFIG.prefill * CONFIG.arena_blocks))
    shortest = [run(trace, seed, queue="shortest") for seed, trace in enumerate(traces)]
    shipped = [run(trace, seed, queue="shortest", eviction="s3fifo") for seed, trace in enumerate(traces)]
    rows = []
    for name in POLICIES:
        peer = ("FAST'25", (PUBLISHED_S[name],)) if name in PUBLISHED_S else ("", ())
        rows.append(Figure(Row(f"mean TTFT, {name}", "s", means(found[name])), *peer))
    local = tuple(a / b for a, b in zip(means(found["local"]), means(found["conductor"]), strict=True))
    rows.append(Figure(Row("mean TTFT, local / conductor", "", local), "FAST'25", (3.58 / 3.07,)))
    kinds = {"predict": found["predict"], "predict, shortest first": shortest, "predict, as shipped": shipped}
    for name, runs in kinds.items():
        rows.append(Figure(Row(f"mean TTFT beside ideal, {name}", "s", means(runs)), "ideal", tuple(ideals), True))
    for name, runs in kinds.items():
        rates = tuple(found["hit_rate"] for found in runs)
        rows.append(Figure(Row(f"hit rate, {name}", "", rates), "pool", tuple(pools)))
        rows.append(Figure(Row(f"imbalance, {name}", "", tuple(found["imbalance"] for found in runs))))
    return rows


def speed_rows(traces: Sequence[Sequence[TracedRequest]]) -> list[Figure]:
    """What a whole run takes."""
    times = []
    for seed, trace in enumerate(traces):
        begin_s = time.thread_time()
        Simulator(replace(CONFIG, seed=seed)).run(trace)
        times.append(time.thread_time() - begin_s)
    return [Figure(Row(f"replay of {len(traces[0])} requests, predict", "s", tuple(times)), "aim", (5.0,))]


def overload_rows(traces: Sequence[Sequence[TracedRequest]]) -> list[Figure]:
    """Twice the speed with an SLO: who is rejected, and how long the others wait."""
    rows = []
    for queue in ("fcfs", "shortest"):
        runs: dict[str, list[dict[str, Any]]] = {"predict": [], "conductor": []}
        for seed, trace in enumerate(traces):
            fast = [request.faster(OVERLOAD) for request in trace]
            for name, found in runs.items():
                found.append(run(fast, seed, policy=name, queue=queue, ttft_limit_s=SLO_S))
        rejected = {name: tuple(float(sum(f["rejected"].values())) for f in found) for name, found in runs.items()}
        title = f"2x, SLO 30 s, {queue}"
        rows.append(Figure(Row(f"{title}: rejected", "", rejected["predict"]), "conductor", rejected["conductor"]))
        for name in ("mean", "p99"):
            ours, theirs = (tuple(f["ttft_s"][name] for f in runs[policy]) for policy in ("predict", "conductor"))
            rows.append(Figure(Row(f"{title}: {name} TTFT of the admitted", "s", ours), "conductor", theirs))
        late = tuple(1 - f["attained"] for f in runs["predict"])
        theirs = tuple(1 - f["attained"] for f in runs["conductor"])
        rows.append(Figure(Row(f"{title}: rejected or late", "", late), "conductor", theirs))
    speed = CONFIG.machine.prefill
    for scale in LOADS:
        for name in ("predict", "conductor"):
            faster = [[request.faster(scale) for request in trace] for trace in traces[:2]]
            changes = {"policy": name, "queue": "shortest", "ttft_limit_s": SLO_S}
            runs[name] = [run(trace, seed, **changes) for seed, trace in enumerate(faster)]
        title = f"{scale:g}x, SLO 30 s, shortest"
        ours, theirs = (tuple(f["goodput_rps"] for f in runs[name]) for name in ("predict", "conductor"))
        rows.append(Figure(Row(f"{title}: goodput", "requests/s", ours), "conductor", theirs))
        ours, theirs = (tuple(f["ttft_s"]["p99"] for f in runs[name]) for name in ("predict", "conductor"))
        rows.append(Figure(Row(f"{title}: p99 TTFT of the admitted", "s", ours), "conductor", theirs))
    alone = [sum(ttft_s > SLO_S for ttft_s in ideal_ttfts_s(trace, speed, len(trace))) for trace in traces]
    rows.append(Figure(Row("2x, SLO 30 s: too long for any node", "", tuple(map(float, alone)))))
    return rows


def scale_rows(num_nodes: int, num_requests: int) -> list[Figure]:
    """Decisions over ten times as many nodes, and over ten times as many requests."""
    rows = []
    few, fewer = num_nodes // 10, num_requests // 10
    for nodes, requests in ((few, fewer), (num_nodes, fewer), (num_nodes, num_requests)):
        shape = TraceShape(requests_per_s=TraceShape.requests_per_s * nodes / 16)
        trace = make_trace(requests, random.Random(0), shape)
        config = replace(CONFIG, prefill=nodes // 2, decode=nodes // 2)
        simulator, begin_s = Simulator(config, clock=time.thread_time), time.thread_time()
        simulator.run(trace)
        replay_s = time.thread_time() - begin_s
        times = [1e3 * time_s for time_s in simulator.decision_times_s]
        title = f"{nodes} nodes, {requests} requests"
        rows.append(Figure(Row(f"decision p50, {title}", "ms", (percentile(times, 50),))))
        rows.append(Figure(Row(f"decision p99, {title}", "ms", (percentile(times, 99),)), "aim", (1.0,)))
        rows.append(Figure(Row(f"replay, each request, {title}", "ms", (1e3 * replay_s / requests,))))
    return rows


def capacity_rows(
    traces: Sequence[Sequence[TracedRequest]],
    num_nodes: int,
    chunks: Sequence[int],
    splits: Sequence[int],
    plot: Path | None,
) -> list[Figure]:
    """The most requests a second of which nine of ten are in time, of the same GPUs apart and together."""
    config = replace(CONFIG, ttft_limit_s=SLO_S)
    capacities = [Capacity(trace) for trace in traces]

    def best(
        kind: Callable[[SimConfig, int, int], SimConfig], counts: Sequence[int], limit_s: float
    ) -> tuple[tuple[float, ...], int]:
        """The capacity of each trace with the count whose median is the highest."""
        found = {}
        for count in counts:
            cluster = kind(config, num_nodes, count)
            seeded = [(capacity, replace(cluster, seed=seed)) for seed, capacity in enumerate(capacities)]
            found[count] = tuple(capacity.of(one, limit_s) for capacity, one in seeded)
        count = max(counts, key=lambda count: (statistics.median(found[count]), count))
        return found[count], count

    rows = []
    points: dict[str, list[tuple[float, float]]] = {"prefill and decode nodes": [], "colocated, chunked": []}
    for limit_s, gain in zip(TPOT_LIMITS_S, PUBLISHED_GAIN, strict=True):
        apart, prefill = best(disaggregated, splits, limit_s)
        together, chunk = best(colocated, chunks, limit_s)
        for line, values in zip(points.values(), (apart, together), strict=True):
            line.append((1e3 * limit_s, statistics.median(values)))
        title = f"{num_nodes} nodes, TPOT {1e3 * limit_s:.0f} ms"
        row = Row(f"{title}: {prefill}P{num_nodes - prefill}D beside chunks of {chunk}", "requests/s", apart)
        rows.append(Figure(row, "colocated", together))
        ratios = tuple(a / max(1e-9, b) for a, b in zip(apart, together, strict=True))
        ratio = Row(f"{title}: apart / together", "", ratios)
        rows.append(Figure(ratio, "FAST'25", (gain,)) if num_nodes == NODES else Figure(ratio))
    if plot is not None:
        draw_capacity(points, plot)
    return rows


def run(trace: Sequence[TracedRequest], seed: int, **changes: Any) -> dict[str, Any]:
    config = replace(CONFIG, seed=seed, **changes)
    return figures(Simulator(config).run(trace), config.ttft_limit_s, config.tpot_limit_s)


def means(runs: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    return tuple(found["ttft_s"]["mean"] for found in runs)


def show(title: str, found: Sequence[Figure]) -> None:
    names = list(dict.fromkeys((figure.peer, figure.is_limit) for figure in found if figure.peer))
    peers = [
        Peer(name, [figure.values if figure.peer == name else () for figure in found], is_limit)
        for name, is_limit in names
    ]
    print_beside(title, [figure.row for figure in found], peers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true", help="a made trace, one seed, fewer nodes: within a minute")
    parser.add_argument("--seeds", type=int, default=5, help="repeats (default 5)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the capacities there; needs the extra `plots`")
    parser.add_argument("--only", choices=("schedule", "speed", "overload", "scale", "capacity"), help="one part")
    args = parser.parse_args()
    seeds = 1 if args.quick else args.seeds
    length = 3000 if args.quick else 12_031
    traces = [
        make_trace(length, random.Random(seed)) if args.trace is None else read_trace(args.trace, random.Random(seed))
        for seed in range(seeds)
    ]
    name = "simulate (made trace)" if args.trace is None else f"simulate ({args.trace.name})"
    if args.only in (None, "schedule"):
        show(f"{name}: scheduling", schedule_rows(traces))
    if args.only in (None, "speed"):
        show(f"{name}: speed", speed_rows(traces))
    if args.only in (None, "overload"):
        show(f"{name}: overload", overload_rows(traces))
    if args.only in (None, "scale"):
        show("simulate: scale", scale_rows(*((200, 4000) if args.quick else (1000, 100_000))))
    if args.only in (None, "capacity"):
        splits, chunks = ((14,), (256, 512)) if args.quick else ((10, 12, 13, 14, 15), (128, 256, 512, 1024, 2048))
        start = [trace[: 1500 if args.quick else 6000] for trace in traces[:CAPACITY_SEEDS]]
        rows = capacity_rows(start, NODES, chunks, splits, args.plot)
        # Two nodes: what is left over of one role cannot help the other.
        few = [trace[: 300 if args.quick else 2000] for trace in traces[:CAPACITY_SEEDS]]
        show(f"{name}: capacity", rows + capacity_rows(few, 2, chunks, (1,), None))


if __name__ == "__main__":
    main()
