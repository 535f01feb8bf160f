"""The block that `vllm bench serve` prints, line for line, then what Baton adds; and the table of a sweep. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loadtest.report import Distribution, Report
from loadtest.sweep import Step

_WIDTH = 50
PERCENTILES = (99.0,)


def render(
    report: Report,
    request_rate: float = math.inf,
    max_concurrency: int | None = None,
    percentiles: Sequence[float] = PERCENTILES,
) -> str:
    """vLLM's lines; after them hit rate, misbehaving clients and the client's own lag."""
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
    lines += [_line("Successful requests:", report.completed), _line("Failed requests:", report.failed)]
    if report.unsent:
        lines.append(_line("Turns not sent after a failure:", report.unsent))
    if max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", max_concurrency))
    if not math.isinf(request_rate):
        lines.append(_line("Request rate configured (RPS):", request_rate))
    lines += [
        _line("Benchmark duration (s):", report.duration_s),
        _line("Total input tokens:", report.total_input_tokens),
        _line("Total generated tokens:", report.total_output_tokens),
        _line("Request throughput (req/s):", report.request_throughput),
    ]
    if report.request_goodput is not None:
        lines.append(_line("Request goodput (req/s):", report.request_goodput))
    lines += [
        _line("Output token throughput (tok/s):", report.output_throughput),
        _line("Peak output token throughput (tok/s):", report.peak_output_throughput),
        _line("Peak concurrent requests:", float(report.peak_concurrent_requests)),
        _line("Total token throughput (tok/s):", report.total_token_throughput),
    ]
    lines += _section("Time to First Token", "TTFT", report.ttft, percentiles)
    lines += _section("Time per Output Token (excl. 1st token)", "TPOT", report.tpot, percentiles)
    lines += _section("Inter-token Latency", "ITL", report.itl, percentiles)
    lines += _section("End-to-end Latency", "E2EL", report.e2el, percentiles)
    lines += [
        "Prefix Cache".center(_WIDTH, "-"),
        _line("Prefix hit rate (%):", 100 * report.prefix_hit_rate),
        _line("Local hit tokens:", report.local_hit_tokens),
        _line("Store hit tokens:", report.store_hit_tokens),
    ]
    lines += _misbehaved(report)
    lines += [
        "Client".center(_WIDTH, "-"),
        _line("P99 event loop lag (ms):", report.loop_lag.p99_ms),
        _line("Max event loop lag (ms):", report.loop_lag.max_ms),
        _line("P99 lateness of requests (ms):", report.lateness.p99_ms),
    ]
    if not math.isinf(request_rate):
        lines.append(_line("P99 send delay (ms):", report.send_delay.p99_ms))
    lines.append("=" * _WIDTH)
    return "\n".join(lines)


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"


def _section(title: str, name: str, times: Distribution, percentiles: Sequence[float]) -> list[str]:
    lines = [
        title.center(_WIDTH, "-"),
        _line(f"Mean {name} (ms):", times.mean_ms),
        _line(f"Median {name} (ms):", times.median_ms),
    ]
    return lines + [_line(f"P{percent:g} {name} (ms):", times.percentile_ms(percent)) for percent in percentiles]


def _misbehaved(report: Report) -> list[str]:
    if not report.misbehaved:
        return []
    lines = ["Clients that left or misbehaved".center(_WIDTH, "-")]
    for kind, counts in report.misbehaved.items():
        failed = sum(count for outcome, count in counts.items() if outcome.startswith("failed"))
        shown: dict[str, int] = {
            name: counts[name] for name in ("left", "refused", "cut off", "served") if name in counts
        }
        if failed:
            shown["failed"] = failed
        lines += [_line(f"{kind}, {name}:", count) for name, count in shown.items()]
    return lines


def render_sweep(steps: Sequence[Step], best_per_s: float | None, share: float) -> str:
    """One line per run, in order of rate, and the result."""
    head = ("rate", "requests", "req/s", "goodput", "met", "P99 TTFT", "P99 TPOT", "")
    rows = [head, ("(req/s)", "", "", "(req/s)", "(%)", "(ms)", "(ms)", "")]
    for step in sorted(steps, key=lambda step: step.rate_per_s):
        report = step.report
        figures = (step.rate_per_s, report.request_throughput, report.request_goodput or 0.0)
        rate, throughput, goodput = (f"{figure:.2f}" for figure in figures)
        met, count = f"{100 * step.good_share:.1f}", str(report.completed + report.failed)
        mark = "ok" if step.good_share >= share else "-"
        late = (f"{report.ttft.p99_ms:.1f}", f"{report.tpot.p99_ms:.1f}")
        rows.append((rate, count, throughput, goodput, met, *late, mark))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if best_per_s is None:
        found = f"No rate that was tried meets the objectives for {100 * share:g} % of requests."
    else:
        found = f"Highest rate that meets the objectives for {100 * share:g} % of requests: {best_per_s:.2f} req/s"
    return "\n".join([*lines, found])
