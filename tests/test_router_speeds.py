"""What a node's speed is taken to be: fits of what was seen, and the median of its peers until there is something."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fit import LinearFit
from router.speeds import (
    GUESSED_PREFILL,
    GUESSED_STEP,
    NodeSpeeds,
    PrefillMeter,
    PrefillSpeed,
    StepMeter,
    StepSpeed,
    in_use,
)

TRUE = PrefillSpeed(0.02, 1e-4, 2e-9)
factors = st.tuples(st.floats(0.0, 0.1), st.floats(1e-6, 1e-2), st.floats(0.0, 1e-7))
legs = st.lists(st.tuples(st.integers(1, 30_000), st.integers(0, 30_000), st.floats(1e-6, 1e3)), max_size=30)


@given(factors, legs)
def test_no_factor_is_ever_negative_whatever_is_seen(
    prior: tuple[float, float, float], seen: list[tuple[int, int, float]]
) -> None:
    meter = PrefillMeter(PrefillSpeed(*prior))
    for uncached, cached, seconds in seen:
        meter.observe(uncached, cached, seconds)
    speed = meter.speed()
    assert min(speed.base_s, speed.token_s, speed.pair_s) >= 0.0
    assert speed.seconds(2000, 100) >= speed.seconds(1000, 100) >= 0.0, "more work takes no less time"
    assert speed.seconds(1000, 2000) >= speed.seconds(1000, 1000)


@pytest.mark.parametrize("prior", [PrefillSpeed(0.0, 1e-3), PrefillSpeed(0.0, 1e-5), PrefillSpeed(1.0, 0.0, 1e-6)])
def test_a_prefill_speed_is_learned_from_its_legs(prior: PrefillSpeed) -> None:
    rng, meter = random.Random(0), PrefillMeter(prior)
    for _ in range(150):
        uncached, cached = rng.randrange(1, 20_000), rng.randrange(0, 20_000)
        meter.observe(uncached, cached, TRUE.seconds(uncached, cached) * rng.uniform(0.95, 1.05))
    for uncached, cached, error in ((100, 0, 0.3), (1000, 10_000, 0.2), (20_000, 0, 0.1)):  # few were short
        assert meter.speed().seconds(uncached, cached) == pytest.approx(TRUE.seconds(uncached, cached), rel=error)


def test_what_changed_is_followed() -> None:
    meter = StepMeter(StepSpeed(0.01, 0.001))
    for count in range(200):
        meter.observe(1 + count % 32, 0.02 + 0.0005 * (1 + count % 32))
    assert meter.speed().seconds(16) == pytest.approx(0.028, rel=0.05)
    for _ in range(8):
        meter.observe(16, 0.28)
    assert meter.speed().seconds(16) > 0.14, "ten times as slow, and seen to be within a few reports"


def test_many_short_prompts_do_not_hide_what_long_ones_take() -> None:
    """What a decode node computes by itself is short; its constant part is no part of what its report said."""
    rng, meter = random.Random(1), PrefillMeter(PrefillSpeed(0.0, 1e-4))
    for _ in range(100):
        tokens = rng.choice([1, 1, 1, 15, 16, 40])
        meter.observe(tokens, 0, (0.007 + 1e-4 * tokens) * rng.uniform(0.7, 1.3))
        assert meter.speed().seconds(1000, 0) > 0.03
    assert meter.speed().seconds(1, 0) == pytest.approx(0.007, rel=0.3)


def test_an_outlier_moves_little() -> None:
    meter = StepMeter(StepSpeed(0.02, 0.0))
    for count in range(50):
        meter.observe(1 + count % 8, 0.02)
    meter.observe(4, 2.0)
    assert meter.speed().seconds(4) < 0.03


def test_what_took_no_time_says_nothing() -> None:
    fit = LinearFit((1.0,), [(1.0,)])
    fit.observe((1.0,), 0.0)
    assert fit.num_observed == 0 and fit.seconds((2.0,)) == 2.0


def test_a_report_of_a_batch_says_what_one_request_takes() -> None:
    speed = StepSpeed.of_step(0.0116, 3)
    assert speed is not None
    assert speed.seconds(3) == pytest.approx(0.0116) and speed.seconds(1) == pytest.approx(0.01)
    assert StepSpeed.of_step(0.0, 3) is None and PrefillSpeed.of_rate(0.0) is None


def known(rate: float, step_s: float, is_rested: bool = False) -> NodeSpeeds:
    speeds = NodeSpeeds()
    speeds.reported(rate, step_s, 1)
    if is_rested:
        speeds.rest()
    return speeds


def test_who_has_no_speed_gets_the_median_of_his_role() -> None:
    nodes = [("prefill", known(rate, 0.0)) for rate in (100.0, 1000.0, 5000.0)]
    nodes += [("decode", known(0.0, step_s)) for step_s in (0.01, 0.02, 0.5)]
    nodes += [("prefill", NodeSpeeds()), ("decode", NodeSpeeds()), ("both", NodeSpeeds())]
    speeds = in_use(nodes)
    assert speeds[6][0] == PrefillSpeed.of_rate(1000.0)
    assert speeds[7][1] == StepSpeed.of_step(0.02, 1)
    assert speeds[8] == (PrefillSpeed.of_rate(1000.0), StepSpeed.of_step(0.02, 1)), "nobody of its role: of all"
    assert in_use([("both", NodeSpeeds())]) == [(GUESSED_PREFILL, GUESSED_STEP)]


def test_a_rested_node_is_tried_again_and_speeds_of_rested_ones_beat_a_guess() -> None:
    slow, fast = known(10.0, 1.0, is_rested=True), known(1000.0, 0.01)
    assert in_use([("both", slow), ("both", fast)])[0][0] == PrefillSpeed.of_rate(1000.0)
    assert in_use([("both", slow)])[0] == (PrefillSpeed.of_rate(10.0), StepSpeed.of_step(1.0, 1))


def test_a_speed_is_known_once_it_was_measured_and_until_a_rest() -> None:
    speeds = NodeSpeeds()
    assert not any(speeds.is_known(role) for role in ("prefill", "decode", "both"))
    speeds.reported(1000.0, 0.0, 0)
    assert [speeds.is_known(role) for role in ("prefill", "decode", "both")] == [True, False, False]
    speeds.reported(1000.0, 0.01, 1)
    assert all(speeds.is_known(role) for role in ("prefill", "decode", "both"))
    speeds.rest()
    assert not any(speeds.is_known(role) for role in ("prefill", "decode", "both"))


def test_a_rest_begins_a_new_measurement() -> None:
    speeds = known(1000.0, 0.01)
    for _ in range(50):
        speeds.computed(1000, 0, 9.0, GUESSED_PREFILL)
    measured = speeds.prefill()
    speeds.rest()
    assert speeds.prefill() == measured, "until there is something new"
    for _ in range(3):
        speeds.computed(1000, 0, 0.1, PrefillSpeed.of_rate(1000.0) or GUESSED_PREFILL)
    again = speeds.prefill()
    assert again is not None and again.seconds(1000, 0) < 0.2


@given(factors, st.integers(0, 100_000), st.integers(0, 20), st.integers(0, 10_000))
def test_a_longer_queue_takes_no_less(prior: tuple[float, float, float], tokens: int, count: int, more: int) -> None:
    speed = PrefillSpeed(*prior)
    assert speed.queue_seconds(tokens + more, count) >= speed.queue_seconds(tokens, count)
    assert speed.queue_seconds(0, count) == 0.0
