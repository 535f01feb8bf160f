"""Limits, priorities, explanations and metrics of a router in front of fake nodes."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator

import grpc
import pytest
from conftest import eventually
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from router_fakes import BLOCK, FakeCluster, FakeNode, expected, request, running
from scraping import scrape

from batonpb import inference_pb2
from router.accuracy import MAX_REQUESTS, Accuracy, Calls, Errors
from router.cluster import Cluster, NodeView
from router.errors import UnknownRequest
from router.journal import MAX_CANDIDATES, Journal, decision
from router.plan import DecodeTerms, Plan, PrefillTerms, Rates, RequestView
from router.policy import POLICIES
from router.speeds import PrefillSpeed, StepSpeed

PROMPT = [256, *range(97, 197)]  # 0.101 s at the fakes' speed


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    """One node of each role, and metrics."""
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "decode0"):
            await cluster.add(node_id)
        await cluster.open(metrics=True)
        yield cluster


async def generate(
    cluster: FakeCluster, timeout: float | None = 30.0, seed: int = 7, **fields: object
) -> list[inference_pb2.GenerateResponse]:
    prompt = PROMPT if seed == 7 else [256, seed, *PROMPT[2:]]  # another seed, another prompt: none is warm yet
    message = request(prompt, max_tokens=5, seed=seed)
    message.MergeFrom(inference_pb2.GenerateRequest(**fields))
    return [response async for response in cluster.stub.Generate(message, timeout=timeout)]


async def refused(cluster: FakeCluster, **fields: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await generate(cluster, **fields)
    return error.value


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"ttft_slo_ms": 50}, "predicted TTFT 0.101 s"),
        ({"tpot_slo_ms": 5}, "TPOT 37."),  # 10 ms a step, and the decode node computes the prompt again: no arena
        ({"timeout": 0.05}, "predicted TTFT 0.101 s"),
    ],
)
async def test_what_would_be_late_is_refused_before_anything_is_spent(
    cluster: FakeCluster, limit: dict[str, float], words: str
) -> None:
    error = await refused(cluster, **limit)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and words in error.details()
    metadata = dict(error.trailing_metadata() or ())
    assert int(metadata["retry-after-ms"]) >= 1
    details, retry = rpc_status.from_call(error), error_details_pb2.RetryInfo()
    assert (details.code, details.message) == (error.code().value[0], error.details())
    assert details.details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == int(metadata["retry-after-ms"])
    assert not any(node.seen.admits or node.seen.prefills for node in cluster.nodes.values())
    assert len(await generate(cluster, ttft_slo_ms=5000, tpot_slo_ms=1000)) > 1


async def test_a_cluster_that_nobody_has_measured_refuses_nothing(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0", prefill_tokens_per_s=0.0, decode_step_s=0.0)
        await cluster.open()
        assert len(await generate(cluster, ttft_slo_ms=1, tpot_slo_ms=1)) > 1


async def test_limits_out_of_range_are_named(cluster: FakeCluster) -> None:
    for fields, field in (
        ({"ttft_slo_ms": 0}, "ttft_slo_ms"),
        ({"tpot_slo_ms": 0}, "tpot_slo_ms"),
        ({"priority": 101}, "priority"),
        ({"priority": -101}, "priority"),
    ):
        error = await refused(cluster, **fields)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and error.details().startswith(f"{field}: ")


async def test_a_request_that_has_begun_is_never_late(redis_url: str) -> None:
    """Its node dies, and the one that is left is predicted to break every limit."""
    async with running(FakeCluster(redis_url)) as cluster:
        quick = await cluster.add("both0")
        await cluster.add("both1", prefill_tokens_per_s=1.0, decode_step_s=10.0)
        await cluster.open()
        quick.faults["token 2"] = quick.kill
        quick.step_s = 0.01
        responses = await generate(cluster, ttft_slo_ms=500, tpot_slo_ms=100)
        token_ids = [token.token_id for response in responses for token in response.tokens]
        assert token_ids == expected(PROMPT, 5, 7) and responses[-1].timeline.migrations == 1


async def test_priorities_reach_the_nodes(cluster: FakeCluster) -> None:
    await generate(cluster, priority=-7)
    assert cluster.nodes["prefill0"].seen.prefills[0].priority == -7
    assert cluster.nodes["decode0"].seen.admits[0].priority == -7


async def test_a_decision_is_explained_with_each_candidates_terms(
    cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "router.decider"):
        responses = await generate(cluster, request_id="one")
    answer = await cluster.stub.Explain(inference_pb2.ExplainRequest(request_id="one"))
    [decided] = answer.decisions
    assert (decided.policy, decided.outcome, decided.prefill_node) == ("predict", "both legs", "prefill0")
    assert (decided.decode_node, decided.num_tokens, decided.num_nodes) == ("decode0", 101, 2)
    assert [node.node_id for node in decided.prefill] == ["prefill0"]
    assert decided.prefill[0].compute_s == pytest.approx(0.101) and decided.prefill[0].cost_s >= 0.101
    assert [node.node_id for node in decided.decode] == ["decode0"]
    timeline = responses[-1].timeline
    assert decided.predicted_ttft_s == timeline.predicted_ttft_s and answer.ttft_s == timeline.first_token_s
    assert decided.predicted_tpot_s == timeline.predicted_tpot_s
    assert decided.predicted_tpot_s == pytest.approx(decided.decode[0].step_s + decided.handoff_s / 4)
    [line] = [record.message for record in caplog.records if "event=candidates" in record.message]
    assert "request_id=one" in line and "prefill0(queue_s=0.0000" in line and "decode0(step_s=" in line


async def test_failures_and_rejections_are_explained_too(cluster: FakeCluster) -> None:
    await refused(cluster, request_id="late", ttft_slo_ms=50)
    answer = await cluster.stub.Explain(inference_pb2.ExplainRequest(request_id="late"))
    assert answer.decisions[0].outcome == "rejected" and "TTFT 0.101 s" in answer.decisions[0].reason
    assert answer.decisions[0].prefill_node == "prefill0" and answer.ttft_s == -1
    cluster.nodes["prefill0"].faults["prefill"] = grpc.StatusCode.INTERNAL
    await generate(cluster, request_id="moved")
    answer = await cluster.stub.Explain(inference_pb2.ExplainRequest(request_id="moved"))
    assert [decided.outcome for decided in answer.decisions] == ["both legs", "one leg"]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await cluster.stub.Explain(inference_pb2.ExplainRequest(request_id="unheard of"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    call = cluster.channel.unary_unary("/baton.v1.Inference/Explain")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(b"\xff\xff")
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_metrics_tell_decisions_and_how_good_predictions_are(cluster: FakeCluster) -> None:
    cluster.nodes["prefill0"].faults["prefill"] = lambda: asyncio.sleep(0.2)
    for n in range(3):
        await generate(cluster, seed=n)
    await refused(cluster, ttft_slo_ms=50)
    page = await scrape(cluster.metrics_address)
    assert page["baton_router_decisions_total", "both_legs"] == 3
    assert page["baton_router_decisions_total", "rejected"] == 1
    assert page["baton_router_rejections_total", "ttft"] == 1
    assert page["baton_router_rejections_total", "no_node"] == 0
    assert 0.05 < page["baton_router_error_seconds", "ttft", "0.5"] < 2.0, "0.1 s were predicted"
    assert page["baton_router_error_ratio", "ttft", "0.9"] >= page["baton_router_error_ratio", "ttft", "0.5"] > 0.2
    assert page["baton_router_decision_seconds", "0.5"] > 0.0


async def test_a_burst_of_siblings_finds_the_node_that_the_first_one_warms(redis_url: str) -> None:
    """A prefix that takes half a second, and siblings that come while it is computed; no arena has it yet."""
    async with running(FakeCluster(redis_url)) as cluster:
        for n in range(4):
            node = await cluster.add(f"prefill{n}", arena_id=f"a{n}")
            node.faults["prefill"] = lambda: asyncio.sleep(0.4)
        await cluster.add("decode0")
        await cluster.open()
        prefix = [97 + n % 26 for n in range(BLOCK * 30)]
        first = asyncio.create_task(cluster.ask([*prefix, *PROMPT[1:8]], max_tokens=2, seed=1))
        await eventually(lambda: any(node.seen.prefills for node in cluster.nodes.values()), 5, "it began")
        await asyncio.sleep(0.2)
        siblings = [cluster.ask([*prefix, *PROMPT[n : n + 8]], max_tokens=2, seed=n) for n in range(3)]
        answers = [*await asyncio.gather(*siblings), await first]
        assert len({answer.timeline.prefill_node for answer in answers}) == 1


async def test_a_named_policy_decides(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "prefill1", "decode0"):
            await cluster.add(node_id)
        await cluster.open(policy="round_robin")
        nodes = [(await generate(cluster, seed=n))[-1].timeline.prefill_node for n in range(4)]
        assert nodes in (["prefill0", "prefill1"] * 2, ["prefill1", "prefill0"] * 2)


async def test_legs_teach_the_router_how_fast_its_nodes_are(cluster: FakeCluster) -> None:
    """The record says 1,000 tokens/s; the legs take a quarter of that."""
    node: FakeNode = cluster.nodes["prefill0"]
    node.compute_s = 0.025
    for n in range(8):
        last = (await generate(cluster, seed=n))[-1].timeline
    assert last.predicted_ttft_s == pytest.approx(0.025, rel=0.3)


# --- the journal and the books, by themselves ---


def view(n: int, **fields: object) -> NodeView:
    return NodeView(f"n{n}", "both", PrefillSpeed(0.0, 1e-3), StepSpeed(0.01), free_at_s=float(n), **fields)


def test_the_best_candidates_are_kept_and_never_the_cluster() -> None:
    cluster = Cluster(BLOCK, 64, [view(n) for n in range(30)])
    ask = RequestView(1000, 10)
    chosen = POLICIES["predict"]()(ask, cluster, 0.0, random.Random(0), Rates())
    kept = decision("predict", ask, len(cluster), chosen)
    assert isinstance(kept.chosen, Plan) and kept.chosen.seen is None and chosen.seen is not None
    assert kept.prefill.node_ids == tuple(f"n{n}" for n in range(MAX_CANDIDATES))
    message = kept.message()
    assert [node.queue_s for node in message.prefill] == list(range(MAX_CANDIDATES))
    assert message.num_nodes == 30 and message.outcome == "one leg"


def test_the_journal_forgets_the_oldest_and_tells_tenants_apart() -> None:
    journal = Journal(max_requests=2)
    for request_id in ("a", "b", "c"):
        journal.began(b"", request_id)
    assert not journal.explain(b"", "c").decisions
    for salt, request_id in ((b"", "a"), (b"other", "c")):
        with pytest.raises(UnknownRequest):
            journal.explain(salt, request_id)


def test_errors_are_of_the_last_requests() -> None:
    errors = Errors()
    assert errors.seconds(0.5) == errors.ratio(0.9) == 0.0
    for n in range(2 * MAX_REQUESTS):
        errors.note(1.0, 2.0 if n < MAX_REQUESTS else 1.25)
    errors.note(1.0, 0.0)
    assert len(errors) == MAX_REQUESTS
    assert (errors.seconds(0.9), errors.ratio(0.5)) == (0.25, 0.2)


def test_a_request_that_moved_says_nothing_about_predictions() -> None:
    accuracy = Accuracy()
    timeline = inference_pb2.Timeline(planned_s=1.0, first_token_s=2.0, predicted_ttft_s=0.5, migrations=1)
    accuracy.finished(timeline)
    assert len(accuracy.ttft) == 0
    timeline.migrations = 0
    accuracy.finished(timeline)
    assert accuracy.ttft.seconds(0.5) == 0.5, "the prediction counts from the plan on"


def test_what_a_hand_over_adds_is_learned_from_requests_that_had_one() -> None:
    accuracy = Accuracy()
    assert accuracy.handoffs.seconds == Rates().handoff_s
    for number in range(100):
        guess_s, bytes_s = accuracy.handoffs.seconds, 0.02 * (number % 3)
        plan = Plan(
            None if number % 4 == 0 else "prefill",
            "decode",
            PrefillTerms(0.0, 0.0, 0.0, 0.1),
            DecodeTerms(0.005, 0.1, 0.0),
            handoff_s=0.0 if number % 4 == 0 else guess_s + bytes_s,
            prefill_tokens=100,
            fetch_blocks=0,
            blocks=1,
        )
        gap_s = 0.005 if number % 4 == 0 else 0.005 + bytes_s + 0.003
        accuracy.finished(inference_pb2.Timeline(planned_s=0.0, first_token_s=0.1, second_token_s=0.1 + gap_s), plan)
    assert accuracy.handoffs.seconds == pytest.approx(0.003)
    accuracy.finished(inference_pb2.Timeline(first_token_s=0.1, second_token_s=-1.0), plan)  # a single token


def test_what_calls_add_is_learned_from_those_that_did_not_wait() -> None:
    calls = Calls()
    for number in range(40):
        idle = PrefillTerms(queue_s=0.0, room_s=0.0, fetch_s=0.0, compute_s=0.1 * number)
        calls.note(idle, idle.ttft_s + 0.03)
        calls.note(PrefillTerms(queue_s=5.0, room_s=0.0, fetch_s=0.0, compute_s=0.1), 50.0)
    assert calls.seconds == pytest.approx(0.03)
    cluster = Cluster(BLOCK, 64)
    cluster.put(NodeView("both", "both", PrefillSpeed(0.0, 0.001), StepSpeed(0.01)))
    ask, rng = RequestView(100, 5), random.Random(0)
    plans = [POLICIES["predict"]()(ask, cluster, 0.0, rng, Rates(calls_s=seconds)) for seconds in (0.0, 0.03)]
    assert all(isinstance(plan, Plan) for plan in plans)
    without, learned = (plan.predicted_ttft_s for plan in plans if isinstance(plan, Plan))
    assert learned == pytest.approx(without + 0.03)
    for _ in range(400):
        calls.note(idle, idle.ttft_s - 1.0)
    assert calls.seconds == 0.0, "never less than nothing"
