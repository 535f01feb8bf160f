"""What a tenant may use of a router: buckets and counts, by a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import ClusterBusy, InvalidRequest, RateLimited
from router.limits import MINUTE_S, Allowance, Bucket, Turnstile


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


def test_a_bucket_gives_a_minutes_worth_at_once_and_then_evenly() -> None:
    bucket = Bucket(60, 0.0)
    for _ in range(60):
        assert bucket.wait_s(1, 0.0) == 0.0
        bucket.take(1)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1.0)
    assert bucket.wait_s(1, 0.75) == pytest.approx(0.25)
    assert bucket.wait_s(2, 1.0) == pytest.approx(1.0)
    assert bucket.wait_s(1000, 100.0) == 0.0, "more than it holds is given when it is full"


def test_what_was_overdrawn_is_paid_back() -> None:
    bucket = Bucket(600, 0.0)
    bucket.take(1200)
    assert bucket.wait_s(0, 0.0) == pytest.approx(60.0)
    assert bucket.wait_s(10, 0.0) == pytest.approx(61.0)
    bucket.resize(1200, 0.0)
    assert bucket.wait_s(0, 0.0) == pytest.approx(30.0), "at the new rate"
    bucket.resize(0, 0.0)
    assert bucket.wait_s(10**9, 0.0) == 0.0


@given(st.integers(1, 10**6), st.lists(st.tuples(st.integers(0, 10**5), st.floats(0.0, 120.0)), max_size=30))
def test_no_more_than_the_rate_and_a_minutes_worth(rate: int, asked: list[tuple[int, float]]) -> None:
    bucket, now_s, taken = Bucket(rate, 0.0), 0.0, 0
    for amount, pause_s in asked:
        now_s += pause_s
        if bucket.wait_s(amount, now_s) == 0.0:
            bucket.take(amount)
            taken += min(amount, rate)  # what is larger than the bucket counts as a whole one
    assert taken <= rate * (now_s / MINUTE_S + 1) * (1 + 1e-9) + 1e-6


def test_requests_a_minute(clock: Clock) -> None:
    turnstile, allowance = Turnstile(0, clock), Allowance(requests_per_minute=2)
    for _ in range(2):
        with turnstile.admit("red", allowance):
            pass
    with pytest.raises(RateLimited, match="requests_per_minute: 2 at most") as error, turnstile.admit("red", allowance):
        pass
    assert error.value.retry_after_s == pytest.approx(30.0)
    with turnstile.admit("blue", allowance):
        pass
    clock.now_s += error.value.retry_after_s
    with turnstile.admit("red", allowance):
        pass


def test_tokens_are_charged_as_they_come(clock: Clock) -> None:
    turnstile, allowance = Turnstile(0, clock), Allowance(tokens_per_minute=100)
    with turnstile.admit("red", allowance) as visit:
        visit.charge_prompt(60)
        visit.charge_output(70)  # an answer is not cut short
    with pytest.raises(RateLimited, match="tokens_per_minute: 100 at most") as error, turnstile.admit("red", allowance):
        pass
    assert error.value.retry_after_s == pytest.approx(0.3 * MINUTE_S)
    clock.now_s += error.value.retry_after_s
    with turnstile.admit("red", allowance) as visit, pytest.raises(RateLimited) as error:
        visit.charge_prompt(50)
    assert error.value.retry_after_s == pytest.approx(0.5 * MINUTE_S)


def test_what_the_cluster_refuses_costs_no_tokens(clock: Clock) -> None:
    turnstile, allowance = Turnstile(0, clock), Allowance(tokens_per_minute=100)
    for _ in range(3):
        with pytest.raises(ClusterBusy), turnstile.admit("red", allowance) as visit:
            visit.charge_prompt(90)
            raise ClusterBusy("full")
    with pytest.raises(ClusterBusy), turnstile.admit("red", allowance) as visit:
        visit.charge_prompt(90)
        visit.charge_output(1)
        raise ClusterBusy("full")
    with turnstile.admit("red", allowance) as visit, pytest.raises(RateLimited):
        visit.charge_prompt(90)


def test_requests_at_a_time_of_one_tenant_and_of_all(clock: Clock) -> None:
    turnstile, allowance = Turnstile(3, clock), Allowance(max_concurrent=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(turnstile.admit("red", allowance))
        with pytest.raises(RateLimited, match="max_concurrent: 2 at most"):
            stack.enter_context(turnstile.admit("red", allowance))
        stack.enter_context(turnstile.admit("blue", allowance))
        with pytest.raises(RateLimited, match="max_concurrent_requests of this router: 3 at most"):
            stack.enter_context(turnstile.admit("green", allowance))
    for _ in range(5):
        with turnstile.admit("red", allowance):
            pass


def test_a_prompt_may_be_too_long_for_a_tenant(clock: Clock) -> None:
    with Turnstile(0, clock).admit("red", Allowance(max_prompt_tokens=10)) as visit:
        visit.charge_prompt(10)
        with pytest.raises(InvalidRequest, match="prompt: 10 tokens at most for this tenant, got 11"):
            visit.charge_prompt(11)


def test_an_allowance_that_changes_holds_from_the_next_request_on(clock: Clock) -> None:
    turnstile = Turnstile(0, clock)
    with turnstile.admit("red", Allowance(tokens_per_minute=100)) as visit:
        visit.charge_prompt(100)
    with turnstile.admit("red", Allowance(tokens_per_minute=10)) as visit, pytest.raises(RateLimited) as error:
        visit.charge_prompt(10)
    assert error.value.retry_after_s == pytest.approx(MINUTE_S)
    with turnstile.admit("red", Allowance()) as visit:
        visit.charge_prompt(10**9)
