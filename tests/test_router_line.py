"""What a queue's order does to a newcomer: whom it overtakes, and who will overtake it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import order
from router.backlog import Backlog
from router.line import AGEING, LONGEST_S, Demand, Line, Waiting, key, with_overtakers

seconds = st.floats(0.0, 300.0)
waiting = st.tuples(seconds, seconds)  # of work, and when it was sent


def test_router_and_engine_mean_the_same_order() -> None:
    assert AGEING == order.AGEING


@given(waiting, waiting, seconds)
def test_a_key_ranks_as_the_engine_does_at_any_moment(
    one: tuple[float, float], other: tuple[float, float], later_s: float
) -> None:
    now_s = max(one[1], other[1]) + later_s
    ranks = [order.rank(work_s, now_s - sent_s) for work_s, sent_s in (one, other)]
    if abs(ranks[0] - ranks[1]) > 1e-6:
        assert (key(*one) < key(*other)) == (ranks[0] < ranks[1])


@given(st.lists(waiting, max_size=20), waiting)
def test_a_newcomer_overtakes_the_longer_ones(others: list[tuple[float, float]], newcomer: tuple[float, float]) -> None:
    line = Line(sorted(Waiting(key(*other), other[0]) for other in others))
    expected = sum(work_s for work_s, sent_s in others if key(work_s, sent_s) > key(*newcomer))
    assert line.overtaken_s(key(*newcomer)) == pytest.approx(expected, abs=1e-6)


shares = st.lists(st.floats(0.0, 2.0), min_size=15, max_size=15).map(sorted).map(tuple)


@given(seconds, seconds, st.floats(0.01, LONGEST_S), shares)
def test_overtakers_make_it_wait_longer_but_not_for_ever(
    wait_s: float, more_s: float, work_s: float, found: tuple[float, ...]
) -> None:
    def waits_s(ahead_s: float) -> float:
        return float(with_overtakers(np.array([ahead_s]), np.array([work_s]), found)[0])

    assert wait_s - 1e-6 <= waits_s(wait_s) <= wait_s + work_s / AGEING + 1e-6
    assert waits_s(wait_s) <= waits_s(wait_s + more_s) + 1e-6
    assert waits_s(0.0) == 0.0


def test_a_wait_is_longer_by_the_share_of_those_who_overtake() -> None:
    one, idle = np.array([10.0]), np.array([4.0])
    half = (0.5,) * 15
    assert with_overtakers(one, idle, half)[0] == pytest.approx(20.0)
    assert with_overtakers(one, idle, ())[0] == 10.0


def test_demand_is_what_came_lately() -> None:
    demand = Demand(memory_s=100.0)
    for second in range(1000):
        demand.sent(0.3, float(second))
        demand.sent(1.5, float(second))
    found = demand.shares(4, 1000.0)
    assert found[0] == 0.0 and found[-1] == pytest.approx(1.8 / 4, rel=0.02)
    assert found[5] == pytest.approx(0.15 / 4, rel=0.02), "0.3 s is in the middle of its class, 0.25 to 0.5 s"
    assert max(demand.shares(4, 2000.0)) < 0.001


def test_a_backlog_knows_who_waits() -> None:
    backlog = Backlog()
    backlog.sent("long", 0.0, 8.0)
    assert backlog.line() is None, "it has begun"
    backlog.sent("middle", 1.0, 4.0)
    backlog.sent("short", 1.0, 2.0)
    line = backlog.line()
    assert line is not None and line.overtaken_s(key(1.0, 1.0)) == 6.0 and line.overtaken_s(key(3.0, 1.0)) == 4.0
    backlog.counted("middle")  # by a report: it waits as before
    backlog.computed("long", 8.0)
    line = backlog.line()
    assert line is not None and line.overtaken_s(0.0) == 4.0, "the short one goes on"
    backlog.over("short")
    backlog.over("middle")
    assert backlog.line() is None


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0, 5.0]), st.integers(0, 6)), max_size=40))
def test_a_backlog_keeps_its_line_in_order(events: list[tuple[float, int]]) -> None:
    """Legs are sent, and sometimes one ends, whichever; beside a list that is ranked anew each time."""
    backlog, legs = Backlog(), list[tuple[float, int, float]]()  # those that wait: key, number, seconds
    begun: int | None = None
    for number, (work_s, end) in enumerate(events):
        backlog.sent(number, float(number), work_s)
        legs.append((key(work_s, float(number)), number, work_s))
        if begun is None:
            begun = legs.pop()[1]
        if end < 3:
            numbers = sorted([begun, *(leg[1] for leg in legs)])
            ended = numbers[end % len(numbers)]
            backlog.over(ended)
            legs = sorted(leg for leg in legs if leg[1] != ended)
            if ended == begun:
                begun = legs.pop(0)[1] if legs else None
        line = backlog.line()
        assert (line is None) == (not legs)
        for probe in (0.0, 1.0, 1.5, 3.0, 100.0):
            expected = sum(leg[2] for leg in legs if leg[0] > probe)
            assert line is None or line.overtaken_s(probe) == pytest.approx(expected)
