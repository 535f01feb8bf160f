"""The order of a prefill queue: shortest first, priorities, and that nobody starves."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from engine.order import AGEING, PRIORITY_S, rank

seconds = st.floats(0.0, 1000.0)
priorities = st.integers(-100, 100)


@given(seconds, seconds, seconds, priorities)
def test_the_shorter_one_goes_first_and_so_does_the_smaller_priority(
    work_s: float, more_s: float, waited_s: float, priority: int
) -> None:
    assert rank(work_s, waited_s, priority) <= rank(work_s + more_s, waited_s, priority)
    assert rank(work_s, waited_s, priority - 1) < rank(work_s, waited_s, priority)
    assert rank(work_s, waited_s + more_s, priority) <= rank(work_s, waited_s, priority)


@given(seconds, seconds, priorities, priorities)
def test_nobody_is_overtaken_by_who_comes_so_much_later(
    work_s: float, other_s: float, priority: int, other: int
) -> None:
    lag_s = work_s + PRIORITY_S * (priority - other)
    behind_s = max(0.0, lag_s) / AGEING + 1e-6
    assert rank(work_s, behind_s, priority) <= rank(other_s, 0.0, other) + 1e-6


@given(seconds, seconds, priorities, priorities, seconds)
def test_the_order_of_two_does_not_change_while_they_wait(
    a_s: float, b_s: float, a: int, b: int, later_s: float
) -> None:
    """So a queue need not be sorted anew because time goes by."""
    before = rank(a_s, 3.0, a) - rank(b_s, 5.0, b)
    after = rank(a_s, 3.0 + later_s, a) - rank(b_s, 5.0 + later_s, b)
    assert abs(before - after) < 1e-6


@dataclass
class Job:
    work_s: float
    arrived_s: float


def test_a_long_prompt_gets_its_turn_under_endless_short_ones() -> None:
    """Short ones come as fast as they can be computed, and a bit faster."""
    rng, queue, now_s, next_s = random.Random(0), [Job(2.0, 0.0)], 0.0, 0.0
    long = queue[0]
    while long in queue:
        while next_s <= now_s:
            queue.append(Job(rng.uniform(0.05, 0.15), next_s))
            next_s += 0.09
        job = min(queue, key=lambda job: rank(job.work_s, now_s - job.arrived_s))
        queue.remove(job)
        now_s += job.work_s
        assert now_s < 100.0, "overtaken only by those of the next 40 s, which take less than twice that"
    assert now_s > 2.0, "not at once, either"
