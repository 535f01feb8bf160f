"""Arrival processes: Poisson times, and the gate that holds a closed loop to its number in flight."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrival import Arrivals, Ramp, open_times_s


@given(num=st.integers(0, 50), rate=st.floats(0.01, 1000), seed=st.integers(0, 2**32))
def test_poisson_times_ascend_from_zero_and_repeat_with_the_seed(num: int, rate: float, seed: int) -> None:
    times_s = open_times_s(num, rate, random.Random(seed))
    assert len(times_s) == num
    assert times_s == sorted(times_s)
    assert times_s[:1] == [0.0][:num]
    assert times_s == open_times_s(num, rate, random.Random(seed))


def test_poisson_gaps_are_exponential() -> None:
    """Mean and standard deviation of an exponential distribution are both 1/rate; regular arrivals would have 0."""
    times_s = open_times_s(20_000, 4.0, random.Random(1))
    gaps_s = [b - a for a, b in itertools.pairwise(times_s)]
    assert statistics.fmean(gaps_s) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps_s) == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_gamma_gaps_keep_the_rate(burstiness: float) -> None:
    """A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k)."""
    times_s = open_times_s(40_000, 4.0, random.Random(1), burstiness)
    gaps_s = [b - a for a, b in itertools.pairwise(times_s)]
    assert statistics.fmean(gaps_s) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps_s) == pytest.approx(0.25 / math.sqrt(burstiness), rel=0.05)


def test_a_constant_rate_leaves_nothing_to_chance() -> None:
    assert open_times_s(4, 2.0, random.Random(1), constant=True) == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_a_ramp_goes_from_one_rate_to_the_other(kind: str) -> None:
    ramp = Ramp(1.0, 100.0, kind)
    assert (ramp.rate_per_s(0.0), ramp.rate_per_s(1.0)) == (1.0, pytest.approx(100.0))
    assert ramp.rate_per_s(0.5) == pytest.approx(50.5 if kind == "linear" else 10.0)
    times_s = open_times_s(1000, ramp, random.Random(1), constant=True)
    gaps_s = [b - a for a, b in itertools.pairwise(times_s)]
    assert gaps_s == sorted(gaps_s, reverse=True)
    assert (gaps_s[0], gaps_s[-1]) == (pytest.approx(1.0, rel=0.1), pytest.approx(0.01, rel=0.1))


def test_burstiness_must_be_positive() -> None:
    with pytest.raises(ValueError, match="burstiness"):
        open_times_s(3, 1.0, random.Random(0), burstiness=0.0)


def test_seeds_differ() -> None:
    assert open_times_s(5, 1.0, random.Random(1)) != open_times_s(5, 1.0, random.Random(2))


def test_infinite_rate_sends_all_at_once() -> None:
    assert open_times_s(3, math.inf, random.Random(0)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_rate_must_be_positive(rate: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        open_times_s(3, rate, random.Random(0))


@given(
    gaps_s=st.lists(st.floats(0, 5), max_size=30),
    limit=st.none() | st.integers(1, 5),
    steps=st.lists(st.tuples(st.floats(0, 4), st.integers(0, 5)), max_size=60),
)
def test_each_request_goes_out_once_in_order_in_time_and_under_the_limit(
    gaps_s: list[float], limit: int | None, steps: list[tuple[float, int]]
) -> None:
    times_s = [sum(gaps_s[: i + 1]) for i in range(len(gaps_s))]
    arrivals = Arrivals(times_s, limit)
    sent: list[int] = []
    now_s, in_flight = 0.0, 0
    for wait_s, num_finished in steps:
        now_s += wait_s
        due = arrivals.due(now_s)
        sent += due
        in_flight += len(due)
        assert all(times_s[i] <= now_s for i in due)
        assert limit is None or in_flight <= limit
        next_s = arrivals.next_s()
        if next_s is None:
            assert arrivals.all_sent or in_flight == limit
        else:
            assert next_s > now_s  # nothing that is due and has a place stays behind
        for _ in range(min(num_finished, in_flight)):
            arrivals.finished()
            in_flight -= 1
    assert sent == list(range(len(sent)))
    assert arrivals.all_sent == (len(sent) == len(times_s))


def test_closed_loop_sends_one_for_each_that_ends() -> None:
    arrivals = Arrivals([0.0] * 5, max_in_flight=2)
    assert arrivals.due(0.0) == [0, 1]
    assert arrivals.due(9.0) == []
    arrivals.finished()
    assert arrivals.due(9.0) == [2]


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Arrivals([0.0], max_in_flight=0)
    with pytest.raises(ValueError, match="in flight"):
        Arrivals([0.0]).finished()
