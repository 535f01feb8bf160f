"""Figures from records: known answers, definitions that must hold for any run, and the block's exact shape."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.record import RequestRecord
from loadtest.report import Distribution, lag_of, percentile, summarise
from loadtest.report_json import as_json
from loadtest.report_text import render
from loadtest.slo import Slo

# Sent at 1 s; tokens at 1.5, 1.6 (two of them) and 1.9; the end at 2.0.
FIRST = RequestRecord(
    index=0,
    scheduled_s=0.9,
    sent_s=1.0,
    finished_s=2.0,
    token_times_s=(1.5, 1.6, 1.9),
    prompt_tokens=100,
    output_tokens=4,
    cached_tokens=48,
    local_hit_tokens=16,
    store_hit_tokens=32,
)
# Sent at 1.5 s; its one token at 1.7; the end at 1.7.
SECOND = RequestRecord(1, 1.5, 1.5, 1.7, (1.7,), prompt_tokens=60, output_tokens=1)
FAILED = RequestRecord(2, 1.0, 1.0, 9.0, (3.0,), prompt_tokens=7, output_tokens=7, error="UNAVAILABLE: no node")


@st.composite
def records(draw: st.DrawFn) -> RequestRecord:
    sent_s = draw(st.floats(0, 100))
    gaps_s = draw(st.lists(st.floats(0, 3), min_size=1, max_size=8))
    times_s = tuple(sent_s + sum(gaps_s[: i + 1]) for i in range(len(gaps_s)))
    return RequestRecord(
        index=draw(st.integers(0, 9)),
        scheduled_s=sent_s - draw(st.floats(0, 1)),
        sent_s=sent_s,
        finished_s=times_s[-1] + draw(st.floats(0, 1)),
        token_times_s=times_s,
        prompt_tokens=draw(st.integers(1, 1000)),
        output_tokens=draw(st.integers(len(times_s), 3 * len(times_s))),
        error=draw(st.sampled_from(["", "", "", "ABORTED: gone"])),
    )


def test_one_request_by_hand() -> None:
    assert FIRST.ttft_s == 0.5
    assert FIRST.e2e_s == 1.0
    assert FIRST.tpot_s == pytest.approx(0.5 / 3)
    assert FIRST.itls_s == pytest.approx([0.1, 0.3])  # a message of two tokens ends one gap
    assert FIRST.send_delay_s == pytest.approx(0.1)
    assert SECOND.tpot_s is None
    assert SECOND.itls_s == []


def test_one_run_by_hand() -> None:
    report = summarise([FIRST, SECOND, FAILED, FAILED], duration_s=2.0, loop_lags_s=[0.001, 0.003])
    assert (report.completed, report.failed, report.errors) == (2, 2, {"UNAVAILABLE: no node": 2})
    assert (report.total_input_tokens, report.total_output_tokens) == (160, 5)
    assert (report.request_throughput, report.output_throughput, report.total_token_throughput) == (1.0, 2.5, 82.5)
    assert report.prefix_hit_rate == pytest.approx(0.3)
    assert (report.local_hit_tokens, report.store_hit_tokens) == (16, 32)
    assert report.ttft.mean_ms == pytest.approx(350)
    assert report.ttft.p99_ms == pytest.approx(497)
    assert report.tpot == Distribution.of([0.5 / 3])
    assert report.itl.median_ms == pytest.approx(200)
    assert report.e2el.max_ms == pytest.approx(1000)
    assert report.loop_lag.mean_ms == pytest.approx(2)
    assert report.peak_concurrent_requests == 2
    assert report.peak_output_throughput == 4.0


@given(st.lists(records(), min_size=1, max_size=12), st.floats(0.1, 100))
def test_what_holds_for_any_run(run: list[RequestRecord], duration_s: float) -> None:
    report = summarise(run, duration_s)
    good = [record for record in run if record.succeeded]
    assert report.completed + report.failed == len(run)
    assert sum(report.errors.values()) == report.failed
    assert report.total_token_throughput >= report.output_throughput >= 0
    assert report.itl.count == sum(len(record.token_times_s) - 1 for record in good)
    assert 0 <= report.peak_concurrent_requests <= len(good)
    for times in (report.ttft, report.tpot, report.itl, report.e2el):
        assert 0 <= times.median_ms <= times.max_ms
        assert times.p99_ms <= times.max_ms + 1e-9
        assert times.mean_ms <= times.max_ms * (1 + 1e-9)
    json.dumps(as_json(report), allow_nan=False)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


def test_back_to_back_requests_are_one_at_a_time() -> None:
    run = [replace(SECOND, sent_s=float(i), finished_s=float(i + 1), token_times_s=(i + 0.5,)) for i in range(5)]
    assert summarise(run, 5.0).peak_concurrent_requests == 1


def test_a_run_that_failed_altogether_has_figures() -> None:
    report = summarise([FAILED], 1.0)
    assert report.ttft == Distribution()
    assert "Successful requests:                     0         \n" in render(report)


def test_the_block_is_that_of_vllm() -> None:
    text = render(summarise([FIRST, SECOND], 2.0, [0.001]), request_rate=4.0, max_concurrency=8)
    assert text.splitlines() == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     2         ",
        "Failed requests:                         0         ",
        "Maximum request concurrency:             8         ",
        "Request rate configured (RPS):           4.00      ",
        "Benchmark duration (s):                  2.00      ",
        "Total input tokens:                      160       ",
        "Total generated tokens:                  5         ",
        "Request throughput (req/s):              1.00      ",
        "Output token throughput (tok/s):         2.50      ",
        "Peak output token throughput (tok/s):    4.00      ",
        "Peak concurrent requests:                2.00      ",
        "Total token throughput (tok/s):          82.50     ",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          350.00    ",
        "Median TTFT (ms):                        350.00    ",
        "P99 TTFT (ms):                           497.00    ",
        "-----Time per Output Token (excl. 1st token)------",
        "Mean TPOT (ms):                          166.67    ",
        "Median TPOT (ms):                        166.67    ",
        "P99 TPOT (ms):                           166.67    ",
        "---------------Inter-token Latency----------------",
        "Mean ITL (ms):                           200.00    ",
        "Median ITL (ms):                         200.00    ",
        "P99 ITL (ms):                            298.00    ",
        "----------------End-to-end Latency----------------",
        "Mean E2EL (ms):                          600.00    ",
        "Median E2EL (ms):                        600.00    ",
        "P99 E2EL (ms):                           992.00    ",
        "-------------------Prefix Cache-------------------",
        "Prefix hit rate (%):                     30.00     ",
        "Local hit tokens:                        16        ",
        "Store hit tokens:                        32        ",
        "----------------------Client----------------------",
        "P99 event loop lag (ms):                 1.00      ",
        "Max event loop lag (ms):                 1.00      ",
        "P99 lateness of requests (ms):           99.00     ",
        "P99 send delay (ms):                     99.00     ",
        "==================================================",
    ]


def test_a_closed_loop_names_no_rate() -> None:
    text = render(summarise([FIRST], 1.0), request_rate=math.inf)
    assert "RPS" not in text
    assert "concurrency:" not in text
    assert "send delay" not in text


def test_percentiles_and_goodput_as_of_vllm() -> None:
    report = summarise([FIRST, SECOND, FAILED], 2.0, slo=Slo.parse(["ttft:300", "e2el:1000"]))
    assert (report.request_goodput, report.good_share) == (0.5, pytest.approx(1 / 3))
    lines = render(report, percentiles=(50.0, 90.0, 99.9)).splitlines()
    at = lines.index("Request throughput (req/s):              1.00      ")
    assert lines[at + 1] == "Request goodput (req/s):                 0.50      "
    at = lines.index("Median TTFT (ms):                        350.00    ")
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["P50", "P90", "P99.9"]
    assert lines[at + 2] == "P90 TTFT (ms):                           470.00    "


def test_who_left_or_misbehaved_is_counted_apart() -> None:
    left = replace(FIRST, kind="cancel")
    refused = replace(FAILED, kind="malformed", refused=True)
    report = summarise([FIRST, left, left, refused, replace(refused, refused=False)], 2.0, num_unsent=3)
    assert (report.completed, report.failed, report.errors, report.unsent) == (1, 0, {}, 3)
    assert report.total_output_tokens == FIRST.output_tokens
    expected = {"cancel": {"left": 2}, "malformed": {"refused": 1, "failed: UNAVAILABLE: no node": 1}}
    assert report.misbehaved == expected
    cut = replace(refused, kind="oversized", refused=False, error="connection lost: Broken pipe")
    assert summarise([cut], 1.0).misbehaved == {"oversized": {"cut off": 1}}
    text = render(report)
    assert "cancel, left:                            2         \n" in text
    assert "malformed, failed:                       1         \n" in text
    assert "Turns not sent after a failure:          3         \n" in text


def test_a_client_that_was_late_is_found_out() -> None:
    report = summarise([FIRST], 1.0, loop_lags_s=[0.001])  # sent 100 ms late
    assert "its requests 100 ms; limit 50 ms" in lag_of(report, 50.0)
    assert lag_of(report, 200.0) == lag_of(report, 0.0) == ""
    waited = replace(FIRST, ready_s=1.0)  # for a place in flight, which is no fault of its own
    assert lag_of(summarise([waited], 1.0), 50.0) == ""
    assert "event loop 80 ms" in lag_of(summarise([waited], 1.0, loop_lags_s=[0.08]), 50.0)


def test_json_has_figures_by_vllms_names() -> None:
    content = as_json(summarise([FIRST, FAILED], 2.0), percentiles=(90.0,))
    assert content["completed"] == 1
    assert content["num_ttft"] == 1
    assert content["mean_ttft_ms"] == content["p99_ttft_ms"] == content["p90_ttft_ms"] == 500.0
    assert content["std_ttft_ms"] == 0.0
    assert len(content["ttft_quantiles_ms"]) == 101
