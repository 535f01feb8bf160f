"""Which part of the expected overtaking is reckoned with: learned from who was admitted and late."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from router.cluster import Cluster, NodeView
from router.line import Line, Waiting
from router.overtaking import FIRST_SHARE, LEAST_SHARE, OvertakingShare
from router.plan import Plan, PrefillTerms, Rates, Reject, RequestView
from router.predict import predict
from router.speeds import PrefillSpeed, StepSpeed

LIMIT_S = 30.0


def terms(order_s: float, queue_s: float = 10.0) -> PrefillTerms:
    return PrefillTerms(queue_s=queue_s, room_s=0.0, fetch_s=0.0, compute_s=5.0, order_s=order_s)


def test_who_is_late_puts_it_up_and_who_is_in_time_down() -> None:
    overtaking = OvertakingShare()
    overtaking.note(terms(5.0), LIMIT_S, 40.0)
    raised = overtaking.share
    assert raised > FIRST_SHARE
    overtaking.note(terms(5.0), LIMIT_S, 20.0)
    assert FIRST_SHARE < overtaking.share < raised
    for _ in range(500):
        overtaking.note(terms(5.0 * overtaking.share), LIMIT_S, 20.0)
    assert overtaking.share == LEAST_SHARE


def test_who_could_not_be_late_for_it_says_nothing() -> None:
    overtaking = OvertakingShare()
    overtaking.note(terms(5.0), None, 40.0)  # no limit
    overtaking.note(terms(-3.0), LIMIT_S, 40.0)  # it overtakes others
    overtaking.note(terms(0.5, queue_s=0.0), LIMIT_S, 40.0)  # far from the limit, all told
    assert overtaking.share == FIRST_SHARE


@given(st.lists(st.tuples(st.floats(-10, 100), st.floats(0, 100)), max_size=60))
def test_it_is_a_share(notes: list[tuple[float, float]]) -> None:
    overtaking = OvertakingShare()
    for order_s, actual_s in notes:
        overtaking.note(terms(order_s), LIMIT_S, actual_s)
        assert LEAST_SHARE <= overtaking.share <= 1.0


def test_a_smaller_share_admits_a_long_prompt_and_changes_nothing_without_a_limit() -> None:
    cluster = Cluster(16, 64)
    view = NodeView("p", "prefill", PrefillSpeed(0.0, 0.001), StepSpeed(0.02), free_at_s=4.0)
    cluster.put(replace(view, line=Line([Waiting(1.0, 1.0)])))
    cluster.put(NodeView("d", "decode", PrefillSpeed(0.0, 0.001), StepSpeed(0.02), max_model_len=1 << 20))
    busy = Rates(shares=(0.5,) * 15, max_stall_s=0.0)
    long = RequestView(num_tokens=10_000, max_new_tokens=10, ttft_limit_s=16.0)

    def ask(request: RequestView, share: float) -> Plan | Reject:
        return predict(request, cluster, 0.0, random.Random(0), replace(busy, overtaking_share=share))

    assert isinstance(ask(long, 1.0), Reject)
    assert isinstance(ask(long, LEAST_SHARE), Plan)
    free = [ask(replace(long, ttft_limit_s=None), share) for share in (1.0, LEAST_SHARE)]
    assert all(isinstance(plan, Plan) for plan in free)
    assert len({plan.predicted_ttft_s for plan in free if isinstance(plan, Plan)}) == 1
