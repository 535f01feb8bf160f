"""Figures of a simulated run. Pure, and the same for the same run: no clock, nothing that depends on the machine.

TTFT and TPOT as in loadtest/report.py, over the requests that were not rejected. Hit rate: blocks that a first leg
found, its own or fetched, of all blocks of the prompts. Imbalance: tokens that the busiest node computed over the mean.
Goodput: requests a second, from the first arrival to the last, that met both limits; without limits, all that ended.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from loadtest.report import percentile
from loadtest.sim_nodes import Job

WINDOW_S = 60.0
_PERCENTS = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.9)


def figures(jobs: Sequence[Job], ttft_slo_s: float | None = None, tpot_slo_s: float | None = None) -> dict[str, Any]:
    """All figures of a run with at least one request; each number rounded to a microsecond or a millionth."""
    done = [job for job in jobs if not job.rejected]
    good = [job for job in done if meets(job, ttft_slo_s, tpot_slo_s)]
    span_s = max(jobs[-1].request.arrival_s - jobs[0].request.arrival_s, 1e-9)
    rejected = Counter(job.rejected for job in jobs if job.rejected)
    found = {
        "requests": len(jobs),
        "completed": len(done),
        "rejected": dict(sorted(rejected.items())),
        "retries": sum(job.num_retries for job in jobs),
        "hit_rate": hit_rate(done),
        "imbalance": imbalance(done),
        "ttft_s": distribution([job.ttft_s for job in done]),
        "tpot_s": distribution([job.tpot_s for job in done if job.request.output_tokens > 1]),
        "attained": len(good) / len(jobs),
        "goodput_rps": len(good) / span_s,
        "offered_rps": len(jobs) / span_s,
        "windows": windows(jobs),
    }
    return {name: _rounded(value) for name, value in found.items()}


def meets(job: Job, ttft_slo_s: float | None, tpot_slo_s: float | None) -> bool:
    """Whether a request that ended was in time."""
    if job.rejected or (ttft_slo_s is not None and job.ttft_s > ttft_slo_s):
        return False
    return tpot_slo_s is None or job.tpot_s <= tpot_slo_s


def hit_rate(jobs: Sequence[Job]) -> float:
    return sum(job.hit_blocks for job in jobs) / max(1, sum(len(job.request.blocks) for job in jobs))


def imbalance(jobs: Sequence[Job]) -> float:
    """Over the nodes that ran a first leg; 1.0 is even."""
    tokens: Counter[str] = Counter()
    for job in jobs:
        tokens[job.prefilled_by] += job.computed_tokens
    return max(tokens.values()) * len(tokens) / max(1, sum(tokens.values())) if tokens else 1.0


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Mean, max and percentiles; all zero where nothing was measured."""
    if not values:
        values = [0.0]
    shares = {f"p{percent:g}": percentile(values, percent) for percent in _PERCENTS}
    return {"mean": statistics.fmean(values), **shares, "max": max(values)}


def windows(jobs: Sequence[Job]) -> list[dict[str, float]]:
    """What came in each minute, by arrival: its hit rate, imbalance and mean TTFT."""
    first_s = jobs[0].request.arrival_s
    parts: dict[int, list[Job]] = {}
    for job in jobs:
        if not job.rejected:
            parts.setdefault(math.floor((job.request.arrival_s - first_s) / WINDOW_S), []).append(job)
    return [
        {
            "at_s": index * WINDOW_S,
            "hit_rate": hit_rate(part),
            "imbalance": imbalance(part),
            "ttft_s": statistics.fmean(job.ttft_s for job in part),
        }
        for index, part in sorted(parts.items())
    ]


def table(title: str, runs: Sequence[dict[str, Any]]) -> Table:
    """A line for each run: `figures` with a `name`."""
    grid = Table("run", title=title)
    for name in ("rejected", "TTFT mean s", "p50", "p90", "p99", "TPOT mean ms", "p99"):
        grid.add_column(name, justify="right")
    for name in ("hit rate", "imbalance", "attained", "goodput/s"):
        grid.add_column(name, justify="right")
    for run in runs:
        ttft, tpot = run["ttft_s"], run["tpot_s"]
        times = [f"{ttft[name]:.2f}" for name in ("mean", "p50", "p90", "p99")]
        times += [f"{1e3 * tpot[name]:.1f}" for name in ("mean", "p99")]
        shares = [f"{run['hit_rate']:.3f}", f"{run['imbalance']:.3f}", f"{run['attained']:.1%}"]
        grid.add_row(run["name"], _rejected(run["rejected"]), *times, *shares, f"{run['goodput_rps']:.2f}")
    return grid


def _rejected(reasons: dict[str, int]) -> str:
    if not reasons:
        return "0"
    return ", ".join(f"{count} {name}" for name, count in reasons.items())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
