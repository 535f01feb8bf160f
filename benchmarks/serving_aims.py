"""What Baton set out to reach in benchmarks/serving.py, and whether it did. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.serving_workloads import INTERFERENCE, LONE, OPEN_LOADS

Found = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]

# Measured before on such a machine: vLLM's pair over Mooncake Store, and a vLLM of one core that does both.
LONE_BEFORE_MS = {1024: (767, 418), 4096: (4200, 2605)}
MAX_ITL_GROWTH, MIN_GOODPUT_RATIO, MAX_TTFT_RATIO = 1.3, 2.0, 0.5


def aims(found: Found) -> Iterator[str]:
    """A line for each aim that there are figures for; of Baton's set-ups, the better one where both were measured."""
    growth = "ITL p99 with prompts / alone, x"
    if (value := _median(found, INTERFERENCE, growth, "baton-1p1d")) is not None:
        yield _line(f"(d) {growth.split(',')[0]}: {value:.2f}", f"at most {MAX_ITL_GROWTH}", value <= MAX_ITL_GROWTH)
    for key in ("a", "b"):
        for figure in ("goodput, req/s", "highest rate in time, req/s"):
            yield from _goodput(found, key, figure)
    for length, (pair_before_ms, alone_before_ms) in LONE_BEFORE_MS.items():
        yield from _lone(found, length, pair_before_ms, alone_before_ms)


def _goodput(found: Found, key: str, figure: str) -> Iterator[str]:
    workload = OPEN_LOADS[key].name
    own, best = _best(found, workload, figure, "baton"), _best(found, workload, figure, "vllm")
    if own is not None and best is not None:
        words = f"({key}) {figure.split(',')[0]}: {own:.2f} against the best vLLM's {best:.2f} req/s"
        yield _line(words, f"{MIN_GOODPUT_RATIO:g} times as much", own > 0 and own >= MIN_GOODPUT_RATIO * best)


def _lone(found: Found, length: int, pair_before_ms: float, alone_before_ms: float) -> Iterator[str]:
    figure = f"TTFT of {length}, ms"
    own = _median(found, LONE, figure, "baton-1p1d")
    if own is None:
        return
    for name, before_ms, share in (
        ("vllm-pd-mooncake", pair_before_ms, MAX_TTFT_RATIO),
        ("vllm-2replicas", alone_before_ms, 1.0),
    ):
        here = _median(found, LONE, figure, name)
        other, where = (before_ms, "before") if here is None else (here, "here")
        words = f"(e) {length} tokens alone: TTFT {own:.0f} ms, {name} {other:.0f} ms {where}"
        yield _line(words, f"at most {share:g} of it", own <= share * other)


def _line(words: str, aim: str, is_met: bool) -> str:
    return f"{'met   ' if is_met else 'MISSED'} {words} (aim: {aim})"


def _median(found: Found, workload: str, figure: str, name: str) -> float | None:
    values = found.get((workload, figure), {}).get(name)
    return statistics.median(values) if values else None


def _best(found: Found, workload: str, figure: str, kind: str) -> float | None:
    """Of the set-ups of that kind that answered at all: a peer that only failed is none to be better than."""
    by_name = found.get((workload, figure), {})
    failed = by_name.keys() - found.get((workload, "TTFT p50, ms"), by_name).keys()
    names = [name for name in by_name if name.startswith(kind) and name not in failed]
    return max((statistics.median(by_name[name]) for name in names), default=None)
