"""Objectives, and the search for the highest rate that meets them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.record import RequestRecord
from loadtest.report import summarise
from loadtest.report_text import render_sweep
from loadtest.slo import Slo
from loadtest.sweep import Search, Step

# TTFT 100 ms, TPOT 50 ms, E2EL 200 ms.
RECORD = RequestRecord(0, 0.0, 0.0, 0.2, (0.1, 0.2), prompt_tokens=4, output_tokens=3)


def test_objectives_as_of_vllm() -> None:
    slo = Slo.parse(["ttft:500", "tpot:50.5", "e2el:1e4"])
    assert (slo.ttft_ms, slo.tpot_ms, slo.e2el_ms) == (500.0, 50.5, 10_000.0)
    assert slo.words() == "ttft:500 tpot:50.5 e2el:10000"
    assert Slo.parse(["tpot:5"]) == Slo(tpot_ms=5.0)


@pytest.mark.parametrize(
    "word", ["ttft", "ttft:", "itl:5", "ttft:0", "ttft:-1", "ttft:nan", "ttft:inf", "ttft:x", ":5"]
)
def test_what_is_no_objective(word: str) -> None:
    with pytest.raises(ValueError, match="--goodput"):
        Slo.parse([word])


def test_an_objective_is_given_once() -> None:
    with pytest.raises(ValueError, match="ttft is given twice"):
        Slo.parse(["ttft:5", "ttft:6"])


@pytest.mark.parametrize(
    ("words", "is_met"),
    [
        (["ttft:101", "tpot:51", "e2el:201"], True),
        (["ttft:99"], False),
        (["tpot:49"], False),
        (["e2el:199"], False),
        (["ttft:101", "e2el:199"], False),
    ],
)
def test_all_must_be_met(words: list[str], is_met: bool) -> None:
    assert Slo.parse(words).met(RECORD) is is_met


def test_one_token_meets_any_tpot() -> None:
    assert Slo(tpot_ms=0.001).met(replace(RECORD, output_tokens=1))


@given(capacity=st.floats(0.01, 5000), start=st.floats(0.1, 100), precision=st.floats(0.02, 0.5))
def test_a_search_ends_beside_the_capacity(capacity: float, start: float, precision: float) -> None:
    search = Search(start, precision=precision)
    tried = []
    while (rate := search.next_per_s()) is not None:
        tried.append(rate)
        assert len(tried) < 60
        search.tell(rate, rate <= capacity)
    assert len(set(tried)) == len(tried)
    if search.best_per_s is None:
        assert capacity < start / 64 * (1 + 1e-9)  # given up
    else:
        assert search.best_per_s <= capacity <= search.best_per_s * (1 + precision) * (1 + 1e-9)


def test_a_search_stops_at_the_last_rate() -> None:
    search = Search(3.0, max_per_s=10.0)
    tried = []
    while (rate := search.next_per_s()) is not None:
        tried.append(rate)
        search.tell(rate, True)
    assert tried == [3.0, 6.0, 10.0]
    assert search.best_per_s == 10.0


@pytest.mark.parametrize(("start", "high", "precision"), [(0.0, 1.0, 0.1), (2.0, 1.0, 0.1), (1.0, math.inf, 0.0)])
def test_a_search_that_cannot_be(start: float, high: float, precision: float) -> None:
    with pytest.raises(ValueError):
        Search(start, high, precision)


def test_the_table_of_a_sweep() -> None:
    met = summarise([RECORD] * 4, 2.0, slo=Slo(ttft_ms=200.0))
    missed = summarise([RECORD] * 3 + [replace(RECORD, token_times_s=(0.3, 0.4), finished_s=0.4)], 2.0, slo=Slo(200.0))
    lines = render_sweep([Step(4.0, missed), Step(2.0, met)], 2.0, 0.9).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["2.00", "4.00"]
    assert lines[2].split()[3:5] == ["2.00", "100.0"] and lines[2].endswith("ok")
    assert lines[3].split()[3:5] == ["1.50", "75.0"] and lines[3].endswith("-")
    assert lines[4] == "Highest rate that meets the objectives for 90 % of requests: 2.00 req/s"
    assert render_sweep([], None, 0.5).endswith("No rate that was tried meets the objectives for 50 % of requests.")
