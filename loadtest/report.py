"""From records to figures, and from figures to the block that `vllm bench serve` prints. Pure; prints nothing itself.

Definitions, over successful requests: TTFT from sending to the first message with tokens; E2EL from sending to the end
of the stream; TPOT = (E2EL - TTFT) / (n - 1); ITL each gap between messages with tokens. As with vLLM, a message of k
tokens ends one gap, not k, so ITL times n need not give E2EL where tokens come in bundles. Throughputs are over the
whole run. Hit rate = prompt tokens that the first leg did not compute / prompt tokens.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loadtest.record import RequestRecord

_WIDTH = 50


def percentile(values: Sequence[float], percent: float) -> float:
    """With linear interpolation between neighbours, as numpy's default. `values` must not be empty."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return low + (high - low) * (rank - math.floor(rank))


@dataclass(frozen=True)
class Distribution:
    """All zero where `count` is: nothing was measured."""

    count: int = 0
    mean_ms: float = 0.0
    median_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0

    @classmethod
    def of(cls, values_s: Sequence[float]) -> Distribution:
        if not values_s:
            return cls()
        values_ms = [1e3 * value for value in values_s]
        return cls(
            count=len(values_ms),
            mean_ms=statistics.fmean(values_ms),
            median_ms=percentile(values_ms, 50),
            p99_ms=percentile(values_ms, 99),
            max_ms=max(values_ms),
        )


@dataclass(frozen=True)
class Report:
    """The figures of one run."""

    completed: int
    failed: int
    duration_s: float
    total_input_tokens: int
    total_output_tokens: int
    local_hit_tokens: int
    store_hit_tokens: int
    request_throughput: float  # per second, like the two below
    output_throughput: float
    total_token_throughput: float
    peak_output_throughput: float  # the best second of the run
    peak_concurrent_requests: int
    prefix_hit_rate: float  # in [0, 1]
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution
    loop_lag: Distribution  # the client's own event loop
    send_delay: Distribution  # sent after the time that the arrival process named; waits for a place in flight count
    errors: dict[str, int]  # message -> how often


def summarise(records: Sequence[RequestRecord], duration_s: float, loop_lags_s: Sequence[float] = ()) -> Report:
    """The figures of a run of `duration_s` > 0 seconds. Failed requests count in `failed` and `errors` alone."""
    good = [record for record in records if record.succeeded]
    num_input, num_output = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)
    num_cached = sum(r.cached_tokens for r in good)
    return Report(
        completed=len(good),
        failed=len(records) - len(good),
        duration_s=duration_s,
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        local_hit_tokens=sum(r.local_hit_tokens for r in good),
        store_hit_tokens=sum(r.store_hit_tokens for r in good),
        request_throughput=len(good) / duration_s,
        output_throughput=num_output / duration_s,
        total_token_throughput=(num_input + num_output) / duration_s,
        peak_output_throughput=_peak_per_second(good),
        peak_concurrent_requests=_peak_concurrency(good),
        prefix_hit_rate=num_cached / num_input if num_input else 0.0,
        ttft=Distribution.of([r.ttft_s for r in good]),
        tpot=Distribution.of([tpot_s for r in good if (tpot_s := r.tpot_s) is not None]),
        itl=Distribution.of([itl_s for r in good for itl_s in r.itls_s]),
        e2el=Distribution.of([r.e2e_s for r in good]),
        loop_lag=Distribution.of(loop_lags_s),
        send_delay=Distribution.of([r.send_delay_s for r in records]),
        errors=dict(Counter(r.error for r in records if not r.succeeded).most_common()),
    )


def _peak_per_second(records: Sequence[RequestRecord]) -> float:
    """The most messages with tokens in any second-long bucket from the first send on (vLLM counts messages, too)."""
    if not records:
        return 0.0
    start_s = min(r.sent_s for r in records)
    seconds = Counter(int(time_s - start_s) for r in records for time_s in r.token_times_s)
    return float(max(seconds.values(), default=0))


def _peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """The most requests in flight at one moment; one that ends as another starts makes room for it."""
    starts = sorted(r.sent_s for r in records)
    ends = sorted(r.finished_s for r in records)
    return max((i + 1 - bisect_right(ends, start_s) for i, start_s in enumerate(starts)), default=0)


def render(report: Report, request_rate: float = math.inf, max_concurrency: int | None = None) -> str:
    """The block of figures, line for line as `vllm bench serve` prints it, then hit rate and the client's lag."""
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
    lines += [_line("Successful requests:", report.completed), _line("Failed requests:", report.failed)]
    if max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", max_concurrency))
    if not math.isinf(request_rate):
        lines.append(_line("Request rate configured (RPS):", request_rate))
    lines += [
        _line("Benchmark duration (s):", report.duration_s),
        _line("Total input tokens:", report.total_input_tokens),
        _line("Total generated tokens:", report.total_output_tokens),
        _line("Request throughput (req/s):", report.request_throughput),
        _line("Output token throughput (tok/s):", report.output_throughput),
        _line("Peak output token throughput (tok/s):", report.peak_output_throughput),
        _line("Peak concurrent requests:", float(report.peak_concurrent_requests)),
        _line("Total Token throughput (tok/s):", report.total_token_throughput),
    ]
    lines += _section("Time to First Token", "TTFT", report.ttft)
    lines += _section("Time per Output Token (excl. 1st token)", "TPOT", report.tpot)
    lines += _section("Inter-token Latency", "ITL", report.itl)
    lines += _section("End-to-end Latency", "E2EL", report.e2el)
    lines += [
        "Prefix Cache".center(_WIDTH, "-"),
        _line("Prefix hit rate (%):", 100 * report.prefix_hit_rate),
        _line("Local hit tokens:", report.local_hit_tokens),
        _line("Store hit tokens:", report.store_hit_tokens),
        "Client".center(_WIDTH, "-"),
        _line("P99 event loop lag (ms):", report.loop_lag.p99_ms),
        _line("Max event loop lag (ms):", report.loop_lag.max_ms),
    ]
    if not math.isinf(request_rate):
        lines.append(_line("P99 send delay (ms):", report.send_delay.p99_ms))
    lines.append("=" * _WIDTH)
    return "\n".join(lines)


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"


def _section(title: str, name: str, times: Distribution) -> list[str]:
    return [
        title.center(_WIDTH, "-"),
        _line(f"Mean {name} (ms):", times.mean_ms),
        _line(f"Median {name} (ms):", times.median_ms),
        _line(f"P99 {name} (ms):", times.p99_ms),
    ]


def as_json(report: Report, records: Sequence[RequestRecord]) -> dict[str, object]:
    """The figures, times as vLLM names them (`mean_ttft_ms`), and every request as it went (`RequestRecord`)."""
    figures = asdict(report)
    for name in ("ttft", "tpot", "itl", "e2el", "loop_lag", "send_delay"):
        times = figures.pop(name)
        figures[f"num_{name}"] = times.pop("count")
        figures |= {f"{key.removesuffix('_ms')}_{name}_ms": value for key, value in times.items()}
    return figures | {"requests": [asdict(record) for record in records]}
