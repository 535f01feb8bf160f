"""From records to figures. Pure.

Definitions, over successful requests: TTFT from sending to the first message with tokens; E2EL from sending to the end
of the stream; TPOT = (E2EL - TTFT) / (n - 1); ITL each gap between messages with tokens. As with vLLM, a message of k
tokens ends one gap, not k, so ITL times n need not equal E2EL if tokens come in bundles. Throughputs are over the
whole run. Hit rate = prompt tokens that the first leg did not compute / prompt tokens. Clients that left or misbehaved
(`RequestRecord.kind`) count in none of these.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtest.behaviour import outcomes
from loadtest.record import RequestRecord
from loadtest.slo import Slo

QUANTILES = 100  # a distribution is kept as so many steps


def percentile(values: Sequence[float], percent: float) -> float:
    """With linear interpolation between neighbours, as numpy's default. `values` must not be empty."""
    return _of_ordered(sorted(values), percent)


def _of_ordered(ordered: Sequence[float], percent: float) -> float:
    rank = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return low + (high - low) * (rank - math.floor(rank))


@dataclass(frozen=True)
class Distribution:
    """All zero, and without quantiles, if `count` is zero, that is, nothing was measured."""

    count: int = 0
    mean_ms: float = 0.0
    std_ms: float = 0.0  # of the population, as numpy's default
    max_ms: float = 0.0
    quantiles_ms: tuple[float, ...] = ()  # 0 %, 1 %, ... 100 %
    ordered_ms: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, values_s: Sequence[float]) -> Distribution:
        if not values_s:
            return cls()
        ordered = tuple(sorted(1e3 * value for value in values_s))
        return cls(
            count=len(ordered),
            mean_ms=statistics.fmean(ordered),
            std_ms=statistics.pstdev(ordered),
            max_ms=ordered[-1],
            quantiles_ms=tuple(_of_ordered(ordered, percent) for percent in range(QUANTILES + 1)),
            ordered_ms=ordered,
        )

    def percentile_ms(self, percent: float) -> float:
        """The percentile in ms; 0 if nothing was measured."""
        return _of_ordered(self.ordered_ms, percent) if self.count else 0.0

    @property
    def median_ms(self) -> float:
        return self.percentile_ms(50)

    @property
    def p99_ms(self) -> float:
        return self.percentile_ms(99)


@dataclass(frozen=True)
class Report:
    """The figures of one run."""

    completed: int
    failed: int
    unsent: int  # turns behind one that failed
    duration_s: float
    total_input_tokens: int
    total_output_tokens: int
    cached_tokens: int
    local_hit_tokens: int
    store_hit_tokens: int
    request_throughput: float  # per second, like the three below
    request_goodput: float | None  # None: no objective was given
    output_throughput: float
    total_token_throughput: float
    peak_output_throughput: float  # the best second of the run
    peak_concurrent_requests: int
    prefix_hit_rate: float  # in [0, 1]
    good_share: float | None  # of the requests that were sent and behaved, those that met the objectives
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution
    loop_lag: Distribution  # the client's own event loop
    send_delay: Distribution  # sent after the time that the arrival process named; waits for a place in flight count
    lateness: Distribution  # likewise, without those waits: the client's own fault
    errors: dict[str, int]  # message -> how often
    misbehaved: dict[str, dict[str, int]]  # kind of client -> what became of it -> how often


def summarise(
    records: Sequence[RequestRecord],
    duration_s: float,
    loop_lags_s: Sequence[float] = (),
    slo: Slo | None = None,
    num_unsent: int = 0,
) -> Report:
    """The figures of a run of `duration_s` > 0 seconds. Failed requests count only in `failed` and `errors`."""
    behaved = [record for record in records if not record.kind]
    good = [record for record in behaved if record.succeeded]
    num_input, num_output = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)
    num_cached = sum(r.cached_tokens for r in good)
    num_met = sum(slo.met(r) for r in good) if slo else 0
    return Report(
        completed=len(good),
        failed=len(behaved) - len(good),
        unsent=num_unsent,
        duration_s=duration_s,
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        cached_tokens=num_cached,
        local_hit_tokens=sum(r.local_hit_tokens for r in good),
        store_hit_tokens=sum(r.store_hit_tokens for r in good),
        request_throughput=len(good) / duration_s,
        request_goodput=num_met / duration_s if slo else None,
        output_throughput=num_output / duration_s,
        total_token_throughput=(num_input + num_output) / duration_s,
        peak_output_throughput=_peak_per_second(good),
        peak_concurrent_requests=_peak_concurrency(good),
        prefix_hit_rate=num_cached / num_input if num_input else 0.0,
        good_share=num_met / max(1, len(behaved) + num_unsent) if slo else None,
        ttft=Distribution.of([r.ttft_s for r in good]),
        tpot=Distribution.of([tpot_s for r in good if (tpot_s := r.tpot_s) is not None]),
        itl=Distribution.of([itl_s for r in good for itl_s in r.itls_s]),
        e2el=Distribution.of([r.e2e_s for r in good]),
        loop_lag=Distribution.of(loop_lags_s),
        send_delay=Distribution.of([r.send_delay_s for r in records]),
        lateness=Distribution.of([r.lateness_s for r in records]),
        errors=dict(Counter(r.error for r in behaved if not r.succeeded).most_common()),
        misbehaved=outcomes(records),
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


def lag_of(report: Report, limit_ms: float) -> str:
    """Why the client was too late for its own figures to be reliable; "" if it was not. A limit of 0 disables this."""
    lags = {"its event loop": report.loop_lag.p99_ms, "its requests": report.lateness.p99_ms}
    late = [f"{name} {lag_ms:.0f} ms" for name, lag_ms in lags.items() if limit_ms and lag_ms > limit_ms]
    return f"the client was late itself (P99: {', '.join(late)}; limit {limit_ms:g} ms)" if late else ""
