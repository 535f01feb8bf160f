"""Stamps of a request: what is kept, what a later attempt replaces, and the sums."""

from __future__ import annotations

import pytest

from router.plan import DecodeTerms, Plan, PrefillTerms
from router.timeline import Timeline


class Clock:
    """Moves when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def plan(prefill_node: str | None, decode_node: str) -> Plan:
    terms = PrefillTerms(queue_s=0.5, room_s=0.0, fetch_s=0.0, compute_s=1.0, stall_s=9.0)
    decode = DecodeTerms(step_s=0.25, steps_s=1.0, pressure_s=1.0)
    return Plan(prefill_node, decode_node, terms, decode, 0.0, prefill_tokens=1, fetch_blocks=0, blocks=1)


def test_a_request_from_receipt_to_end() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    for step in (timeline.admitted, timeline.prefill_started):
        clock.now_s += 1
        if step == timeline.admitted:
            timeline.planned(plan("p0", "d0"))
            clock.now_s += 1
        step()
    clock.now_s += 1
    timeline.took(1)
    clock.now_s += 6
    timeline.took(3)
    message = timeline.finish(4)
    assert (message.planned_s, message.admitted_s, message.prefill_start_s) == (1, 2, 3)
    assert (message.first_token_s, message.finished_s, message.tpot_s) == (4, 10, 2)
    assert (message.prefill_node, message.decode_node, message.predicted_ttft_s) == ("p0", "d0", 1.5)
    assert message.predicted_tpot_s == 0.25


def test_what_never_happened() -> None:
    message = Timeline(Clock()).finish(0)
    assert message.planned_s == message.admitted_s == message.prefill_start_s == message.first_token_s == -1
    assert message.finished_s == 0 and message.tpot_s == 0


def test_a_later_attempt_replaces_stamps_only_before_the_first_token() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    timeline.planned(plan("p0", "d0"))
    clock.now_s += 1
    timeline.planned(plan("p1", "d1"))
    timeline.took(1)
    clock.now_s += 1
    timeline.migrated()
    timeline.planned(plan(None, "d2"))
    timeline.admitted()
    message = timeline.finish(1)
    assert (message.planned_s, message.prefill_node, message.decode_node) == (1, "p1", "d2")
    assert message.admitted_s == -1 and message.migrations == 1
    assert message.tpot_s == 0


@pytest.mark.parametrize(
    ("hits", "prompt", "cached"),
    [
        ([], 10, (0, 0)),
        ([(3, 4)], 10, (3, 4)),
        ([(3, 4), (9, 9)], 10, (3, 4)),
        ([(8, 8)], 10, (8, 2)),
        ([(16, 0)], 10, (10, 0)),
    ],
)
def test_hits_are_the_first_legs_and_the_prompts(
    hits: list[tuple[int, int]], prompt: int, cached: tuple[int, int]
) -> None:
    timeline = Timeline(Clock())
    for local, store in hits:
        timeline.hit(local, store)
    usage = timeline.usage(prompt, 5)
    assert (usage.local_hit_tokens, usage.store_hit_tokens) == cached
    assert usage.cached_tokens == sum(cached) and (usage.prompt_tokens, usage.output_tokens) == (prompt, 5)
