"""A request's journey over nodes that refuse, die and hang at each moment: the client sees the text and no error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from conftest import RedisProcess, eventually
from router_fakes import BLOCK, CLUSTER, ROOT, Answer, FakeCluster, FakeNode, expected, running, saying, set_health

from batonpb import common_pb2
from kvstore.blocks import BlockHash, hash_blocks
from kvstore.directory import ON_DISK, ArenaRecord, Directory
from router.errors import LegFailed, LegRefused
from router.hits import Hit
from router.journey import Journey, RoutedRequest
from router.plan import Plan, Reject, RequestView
from router.policy import POLICIES

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
PROMPT = [256, *range(97, 197)]  # 101 tokens take 0.1 s at the fakes' speed: too long to skip the first leg
SHORT = [256, 97, 98]


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    """Two nodes of each role."""
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "prefill1", "decode0", "decode1"):
            await cluster.add(node_id)
        await cluster.open()
        yield cluster


@pytest.fixture
async def small(redis_url: str) -> AsyncIterator[FakeCluster]:
    """One node of each role."""
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("prefill0")
        await cluster.add("decode0")
        await cluster.open(node_wait_s=1.0)
        yield cluster


async def ask_and_check(cluster: FakeCluster, prompt: list[int] = PROMPT, count: int = 12, **options: object) -> Answer:
    answer = await cluster.ask(prompt, max_tokens=count, seed=7, **options)
    assert answer.token_ids == expected(prompt, count, 7)
    assert answer.text == bytes(answer.token_ids).decode()
    assert answer.finish_reason == LENGTH
    await eventually(lambda: cluster.active == 0, 5, "all legs are over")
    return answer


def used(cluster: FakeCluster, answer: Answer) -> tuple[FakeNode, FakeNode]:
    return cluster.nodes[answer.timeline.prefill_node], cluster.nodes[answer.timeline.decode_node]


async def test_both_legs_in_their_order(cluster: FakeCluster) -> None:
    for node in cluster.nodes.values():
        node.hits = (16, 32)
    answer = await ask_and_check(cluster)
    prefill, decode = used(cluster, answer)
    assert [list(request.token_ids) for request in prefill.seen.prefills] == [PROMPT]
    assert [list(request.token_ids) for request in decode.seen.admits] == [PROMPT]
    assert decode.seen.starts == [expected(PROMPT, 12, 7)], "Start names the first token; the fake appends the others"
    assert prefill.seen.prefills[0].num_prompt_tokens == len(PROMPT)
    usage, timeline = answer.usage, answer.timeline
    assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens) == (101, 12, 48)
    assert (usage.local_hit_tokens, usage.store_hit_tokens, timeline.decode_store_hit_tokens) == (16, 32, 32)
    stamps = [timeline.planned_s, timeline.admitted_s, timeline.prefill_start_s, timeline.first_token_s]
    assert 0 <= stamps[0] and stamps == sorted(stamps) and stamps[-1] <= timeline.finished_s
    assert timeline.migrations == 0 and timeline.predicted_ttft_s == pytest.approx(0.101)
    assert timeline.tpot_s == pytest.approx((timeline.finished_s - timeline.first_token_s) / 11)


async def test_a_short_prompt_runs_on_the_decode_node_alone(cluster: FakeCluster) -> None:
    for node in cluster.nodes.values():
        node.hits = (1, 2)
    answer = await ask_and_check(cluster, SHORT)
    assert answer.timeline.prefill_node == ""
    assert (answer.usage.local_hit_tokens, answer.usage.store_hit_tokens) == (1, 2)
    assert not any(node.seen.prefills for node in cluster.nodes.values())


async def test_the_first_token_does_not_wait_for_start(cluster: FakeCluster) -> None:
    """The decode nodes do not go on before the client has its first token."""
    has_first = asyncio.Event()
    for node_id in ("decode0", "decode1"):
        cluster.nodes[node_id].faults["start"] = has_first.wait
    answer = await cluster.ask(PROMPT, lambda _: has_first.set(), max_tokens=3, seed=7)
    assert answer.token_ids == expected(PROMPT, 3, 7)


async def test_a_single_token_needs_no_start(cluster: FakeCluster) -> None:
    answer = await ask_and_check(cluster, count=1)
    assert used(cluster, answer)[1].seen.starts == []
    assert answer.timeline.tpot_s == 0


async def test_an_end_token_at_once_needs_no_start(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "decode0"):
            await cluster.add(node_id, saying(""))
        await cluster.open()
        answer = await cluster.ask(PROMPT)
        assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [257], STOP)
        assert cluster.nodes["decode0"].seen.starts == []
        await eventually(lambda: cluster.active == 0, 5, "the decode leg is cancelled")


KILLED_AT = ["admit", "admitted", "start", "token 1", "token 5", "token 11", "finished"]


@pytest.mark.parametrize("moment", KILLED_AT)
async def test_a_decode_node_dies(cluster: FakeCluster, moment: str) -> None:
    for node_id in ("decode0", "decode1"):
        cluster.nodes[node_id].faults[moment] = once(cluster, node_id)
    answer = await ask_and_check(cluster)
    assert answer.timeline.migrations == 1
    assert answer.usage.output_tokens == 12


@pytest.mark.parametrize("moment", ["prefill", "prefilled"])
async def test_a_prefill_node_dies(cluster: FakeCluster, moment: str) -> None:
    for node_id in ("prefill0", "prefill1"):
        cluster.nodes[node_id].faults[moment] = once(cluster, node_id)
    answer = await ask_and_check(cluster)
    assert answer.timeline.migrations == 1


@pytest.mark.parametrize("moment", ["admit", "start", "token 5", "finished"])
async def test_a_decode_node_hangs(cluster: FakeCluster, moment: str) -> None:
    for node_id in ("decode0", "decode1"):
        cluster.nodes[node_id].faults[moment] = once(cluster, node_id, hang=True)
    answer = await cluster.ask(PROMPT, max_tokens=12, seed=7)
    assert answer.token_ids == expected(PROMPT, 12, 7)
    assert answer.timeline.migrations == 1


async def test_a_prefill_node_hangs(cluster: FakeCluster) -> None:
    for node_id in ("prefill0", "prefill1"):
        cluster.nodes[node_id].faults["prefill"] = once(cluster, node_id, hang=True)
    answer = await cluster.ask(PROMPT, max_tokens=12, seed=7)
    assert answer.token_ids == expected(PROMPT, 12, 7)


def once(cluster: FakeCluster, node_id: str, hang: bool = False):
    """A fault that befalls whichever node is there first, and no other after it."""

    async def strike() -> None:
        for node in cluster.nodes.values():
            node.faults.clear()
        if hang:
            cluster.nodes[node_id].hang()
        else:
            await cluster.nodes[node_id].kill()

    return strike


async def test_a_node_whose_engine_is_sick_is_left(cluster: FakeCluster) -> None:
    """It answers, but says that it is not well, and the stream stands still."""
    struck: list[str] = []

    def sicken(node: FakeNode):
        async def strike() -> None:
            if not struck:
                struck.append(node.node_id)
                await set_health(node, is_well=False)
                await asyncio.sleep(60)

        return strike

    for node_id in ("decode0", "decode1"):
        cluster.nodes[node_id].faults["token 3"] = sicken(cluster.nodes[node_id])
    answer = await ask_and_check(cluster)
    assert answer.timeline.decode_node not in struck and answer.timeline.migrations == 1


async def test_a_slow_node_that_is_well_is_waited_for(cluster: FakeCluster) -> None:
    for node_id in ("prefill0", "prefill1"):
        cluster.nodes[node_id].faults["prefill"] = lambda: asyncio.sleep(1.5)
    answer = await ask_and_check(cluster)
    assert answer.timeline.migrations == 0


async def test_no_progress_for_too_long_is_a_failure_however_well_the_node(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "router")
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("both0", "both1"):
            node = await cluster.add(node_id)
            node.faults["token 3"] = lambda: asyncio.sleep(60)
        await cluster.open(progress_timeout_s=0.5)
        asking = asyncio.create_task(cluster.ask(PROMPT, max_tokens=9, seed=7))
        await eventually(lambda: sum(len(n.seen.starts) for n in cluster.nodes.values()) == 2, 10, "it went on")
        for node in cluster.nodes.values():
            node.faults.clear()
        answer = await asking
        assert answer.token_ids == expected(PROMPT, 9, 7) and answer.timeline.migrations >= 1
    assert "event=leg_failed" in caplog.text and "event=node_down" not in caplog.text


async def test_a_slow_client_is_no_fault_of_the_node(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0")
        await cluster.open(progress_timeout_s=0.3)
        call = cluster.stub.Generate(_request(PROMPT, max_tokens=3000, seed=7))
        first = await call.read()
        await asyncio.sleep(1.0)
        token_ids = [token.token_id for token in first.tokens]
        async for response in _rest(call):
            token_ids += [token.token_id for token in response.tokens]
            last = response
        assert token_ids == expected(PROMPT, 3000, 7) and last.timeline.migrations == 0


async def _rest(call) -> AsyncIterator:
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response


def _request(prompt: list[int], **sampling: object):
    from router_fakes import request

    return request(prompt, **sampling)


async def test_errors_of_a_node_are_retried_elsewhere(cluster: FakeCluster) -> None:
    cluster.nodes["decode0"].faults["token 4"] = grpc.StatusCode.INTERNAL
    cluster.nodes["decode0"].faults["start"] = grpc.StatusCode.UNKNOWN
    cluster.nodes["prefill0"].faults["prefill"] = grpc.StatusCode.INTERNAL
    for _ in range(6):
        await ask_and_check(cluster)


async def test_a_node_that_stops_gracefully_is_left(cluster: FakeCluster) -> None:
    for node_id in ("decode0", "decode1"):
        node = cluster.nodes[node_id]

        def strike(node: FakeNode = node) -> None:
            for other in cluster.nodes.values():
                other.faults.clear()
            _ = asyncio.create_task(node._server.stop(0))  # noqa: RUF006

        node.faults["token 3"] = strike
        node.step_s = 0.02
    answer = await ask_and_check(cluster)
    assert answer.timeline.migrations == 1


async def test_an_invalid_argument_is_passed_on_and_not_retried(cluster: FakeCluster) -> None:
    for node in cluster.nodes.values():
        node.faults["admit"] = grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await cluster.ask(PROMPT)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details() == "temperature: injected"
    assert sum(len(node.seen.admits) for node in cluster.nodes.values()) == 1


async def test_a_refused_admit_tries_another_before_any_prefill(cluster: FakeCluster) -> None:
    cluster.nodes["decode0"].faults["admit"] = grpc.StatusCode.RESOURCE_EXHAUSTED
    num_asked = 0
    while not cluster.nodes["decode0"].seen.admits:  # each time one of the two is asked first, at random
        answer = await ask_and_check(cluster)
        assert answer.timeline.decode_node == "decode1" and answer.timeline.migrations == 0
        num_asked += 1
        assert num_asked < 64
    assert sum(len(node.seen.prefills) for node in cluster.nodes.values()) == num_asked


async def test_all_refused_is_resource_exhausted(cluster: FakeCluster) -> None:
    for node_id in ("decode0", "decode1"):
        cluster.nodes[node_id].faults["admit"] = grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await cluster.ask(PROMPT)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not any(node.seen.prefills for node in cluster.nodes.values())
    await eventually(lambda: cluster.active == 0, 5, "nothing is left")


async def test_three_refusals_of_a_leg_are_enough(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in (*(f"prefill{n}" for n in range(4)), *(f"decode{n}" for n in range(8))):
            await cluster.add(node_id)
        await cluster.open()
        for moment, num_admits, num_prefills in (("admit", 3, 0), ("prefill", 3, 3)):
            for node in cluster.nodes.values():
                node.seen.admits.clear()
                node.faults = {moment: grpc.StatusCode.RESOURCE_EXHAUSTED}
            with pytest.raises(grpc.aio.AioRpcError, match="no node that was asked had room") as error:
                await cluster.ask(PROMPT)
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert sum(len(node.seen.admits) for node in cluster.nodes.values()) == num_admits
            assert sum(len(node.seen.prefills) for node in cluster.nodes.values()) == num_prefills


def test_refusals_of_the_two_legs_are_counted_apart_and_what_has_begun_asks_on() -> None:
    journey = Journey(RoutedRequest("r", PROMPT, common_pb2.SamplingParams(max_tokens=9), frozenset()))
    for node_id in ("both0", "both1"):
        journey.note(LegRefused(node_id, "full", "prefill", is_draining=False))
        journey.note(LegRefused(node_id, "full", "decode", is_draining=False))
    journey.note(LegRefused("both2", "draining", "decode", is_draining=True))
    assert not journey.is_refused
    journey.note(LegRefused("both3", "full", "decode", is_draining=False))
    assert journey.is_refused
    journey.take([common_pb2.Token(token_id=1)])
    assert not journey.is_refused


async def test_full_prefill_queues(cluster: FakeCluster) -> None:
    cluster.nodes["prefill0"].faults["prefill"] = grpc.StatusCode.RESOURCE_EXHAUSTED
    for _ in range(4):
        assert (await ask_and_check(cluster)).timeline.prefill_node == "prefill1"
    cluster.nodes["prefill1"].faults["prefill"] = grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await cluster.ask(PROMPT)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await ask_and_check(cluster, SHORT)


async def test_a_draining_node_is_passed_by(cluster: FakeCluster) -> None:
    """Refused with FAILED_PRECONDITION before its record says so, and then not asked at all."""
    cluster.nodes["decode0"].faults["admit"] = grpc.StatusCode.FAILED_PRECONDITION
    cluster.nodes["prefill0"].faults["prefill"] = grpc.StatusCode.FAILED_PRECONDITION
    for _ in range(6):
        await ask_and_check(cluster)
    await cluster.nodes["decode0"].beat(draining=True)
    await asyncio.sleep(0.3)
    cluster.nodes["decode0"].seen.admits.clear()
    for _ in range(6):
        await ask_and_check(cluster)
    assert not cluster.nodes["decode0"].seen.admits


async def test_lost_roles_are_played_by_the_others(small: FakeCluster) -> None:
    await small.nodes["decode0"].kill()
    answer = await ask_and_check(small)
    assert answer.timeline.decode_node == "prefill0"


async def test_a_lost_prefill_role_too(small: FakeCluster) -> None:
    await small.nodes["prefill0"].kill()
    answer = await ask_and_check(small)
    assert (answer.timeline.prefill_node, answer.timeline.decode_node) == ("", "decode0")


async def test_more_nodes_are_dead_than_attempts_are_allowed(redis_url: str) -> None:
    """A machine died, and its nodes were the better choice."""
    async with running(FakeCluster(redis_url)) as cluster:
        for n in range(10):
            await cluster.add(f"both{n}")
        await cluster.add("both10", decode_step_s=1.0)
        await cluster.open()
        for n in range(10):
            await cluster.nodes[f"both{n}"].kill()
        assert (await ask_and_check(cluster)).timeline.decode_node == "both10"


async def test_nobody_is_alive(small: FakeCluster) -> None:
    for node in small.nodes.values():
        await node.kill()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await small.ask(PROMPT)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_stream_waits_for_a_node_to_come_back(small: FakeCluster) -> None:
    """Everybody dies in mid-stream; a new incarnation of one of them goes on."""

    def die(answer: Answer) -> None:
        if len(answer.token_ids) == 4:
            for node in small.nodes.values():
                node._beating.cancel()
                node.wire.cut()
            tasks.append(asyncio.create_task(come_back()))

    async def come_back() -> None:
        await asyncio.sleep(0.5)
        old = small.nodes["decode0"]
        small.nodes["old"] = old
        await small.add("decode0")

    tasks: list[asyncio.Task] = []
    small.nodes["decode0"].step_s = 0.01
    answer = await small.ask(PROMPT, die, max_tokens=12, seed=7)
    await tasks[0]
    assert answer.token_ids == expected(PROMPT, 12, 7)
    assert answer.timeline.decode_node == "decode0"


async def test_a_request_that_lost_its_node_before_its_first_token_waits_too(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0")
        await cluster.open()
        tasks: list[asyncio.Task] = []
        strike = restart(cluster, "both0", after_s=0.5)
        cluster.nodes["both0"].faults["start"] = lambda: tasks.append(asyncio.create_task(strike))
        cluster.nodes["both0"].step_s = 60.0
        answer = await ask_and_check(cluster)
        assert answer.timeline.migrations == 1


async def test_a_node_that_failed_and_came_back_is_alive(redis_url: str) -> None:
    """Both nodes die under a request without a token yet, the second one when the first is long back."""
    async with running(FakeCluster(redis_url)) as cluster:
        met: list[str] = []
        tasks: list[asyncio.Task] = []

        async def die(node_id: str) -> None:
            if len(met) == 1:
                await restart(cluster, node_id)
            else:
                await asyncio.sleep(0.5)
                await cluster.nodes[node_id].kill()

        def strike(node_id: str) -> None:
            met.append(node_id)
            tasks.append(asyncio.create_task(die(node_id)))

        for node_id in ("both0", "both1"):
            node = await cluster.add(node_id)
            node.step_s = 60.0
            node.faults["start"] = lambda node_id=node_id: strike(node_id)
        await cluster.open()
        answer = await ask_and_check(cluster)
        assert answer.timeline.decode_node == met[0] and answer.timeline.migrations == 2


async def restart(cluster: FakeCluster, node_id: str, after_s: float = 0.0) -> None:
    """Kills a node; a new incarnation, without its faults, takes its place."""
    old = cluster.nodes[node_id]
    cluster.nodes[f"old {node_id}"] = old
    await old.kill()
    await asyncio.sleep(after_s)
    await cluster.add(node_id)


async def test_a_stream_goes_on_with_the_weights_that_began_it(redis_url: str) -> None:
    """A new revision of the model comes up on more nodes than are left of the old one, and then a node dies."""
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("both0", "both1"):
            (await cluster.add(node_id)).step_s = 0.1
        await cluster.open()
        asking = asyncio.create_task(ask_and_check(cluster, count=20))
        await eventually(lambda: cluster.active, 5, "it began")
        for node_id in ("both2", "both3", "both4"):
            await cluster.add(node_id, lambda *_: ord("X"), kv_root=bytes(16).hex())
        await asyncio.sleep(0.3)
        await next(node for node in cluster.nodes.values() if node.seen.active).kill()
        assert (await asking).timeline.decode_node in ("both0", "both1")
        assert (await cluster.ask(PROMPT, max_tokens=3)).text == "XXX", "what comes now runs on the new revision"


async def test_a_stream_is_given_up_when_nobody_comes(small: FakeCluster) -> None:
    for node in small.nodes.values():
        node.step_s = 0.01
    call = small.stub.Generate(_request(PROMPT, max_tokens=500))
    await call.read()
    for node in small.nodes.values():
        await node.kill()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in _rest(call):
            pass
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_stream_whose_new_node_is_full_waits_for_room(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        first = await cluster.add("both0")
        await cluster.open()
        full = None

        def die(answer: Answer) -> None:
            if len(answer.token_ids) == 4:
                first._beating.cancel()
                first.wire.cut()

        first.step_s = 0.05
        asking = asyncio.create_task(cluster.ask(PROMPT, die, max_tokens=12, seed=7))
        await eventually(lambda: first.seen.starts, 5, "started")
        full = await cluster.add("both1")
        full.faults["admit"] = grpc.StatusCode.RESOURCE_EXHAUSTED
        await eventually(lambda: len(full.seen.admits) >= 2, 10, "refused and asked again")
        full.faults.clear()
        assert (await asking).token_ids == expected(PROMPT, 12, 7)


async def test_legs_that_keep_failing_are_given_up(cluster: FakeCluster) -> None:
    """A request that breaks every node it meets must not go round for ever."""
    for node in cluster.nodes.values():
        node.faults["token 2"] = grpc.StatusCode.INTERNAL
        node.faults["prefill"] = grpc.StatusCode.INTERNAL
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await cluster.ask(PROMPT, max_tokens=100)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "INTERNAL" in error.value.details()
    assert sum(len(node.seen.admits) for node in cluster.nodes.values()) <= 8


async def test_a_long_stream_outlives_any_number_of_nodes(redis_url: str) -> None:
    """Twelve legs fail under it, each of them after forty tokens."""
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("both0", "both1"):
            node = await cluster.add(node_id)
            node.faults["token 40"] = grpc.StatusCode.INTERNAL
        await cluster.open()
        answer = await ask_and_check(cluster, count=500)
        assert answer.timeline.migrations == 12


def test_a_wait_for_a_node_begins_anew_when_a_leg_has_run() -> None:
    """Else a request that waited once has no patience left when its next node dies, however long that ran."""
    journey = Journey(RoutedRequest("r", PROMPT, common_pb2.SamplingParams(max_tokens=9), frozenset()))
    journey.stuck_since_s = 1.0
    journey.note(LegRefused("decode0", "full", "decode", is_draining=False))
    journey.note(LegFailed("decode0", "i", "connection refused", is_down=True, is_unreached=True))
    assert journey.stuck_since_s == 1.0
    journey.note(LegFailed("decode0", "i", "socket closed", is_down=True))
    assert journey.stuck_since_s is None


async def test_the_end_is_known_when_a_node_dies_before_it_says_so(redis_url: str) -> None:
    """All tokens have come, Finished has not: nobody may be asked for a token behind the end."""
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("both0", "both1"):
            node = await cluster.add(node_id, saying("abc"))
            node.faults["finished"] = grpc.StatusCode.INTERNAL
        await cluster.open()
        answer = await cluster.ask(PROMPT)
        assert (answer.text, answer.token_ids, answer.finish_reason) == ("abc", [97, 98, 99, 257], STOP)
        assert sum(len(node.seen.admits) for node in cluster.nodes.values()) == 1


@pytest.mark.parametrize("wait_for", [0, 1, 5])
async def test_a_client_that_leaves_cancels_both_legs(cluster: FakeCluster, wait_for: int) -> None:
    for node in cluster.nodes.values():
        node.step_s = 0.02
        node.faults["prefill"] = lambda: asyncio.sleep(0.3 if wait_for else 60)
    call = cluster.stub.Generate(_request(PROMPT, max_tokens=2000))
    for _ in range(wait_for):
        await call.read()
    await eventually(lambda: cluster.active > 0, 5, "it began")
    call.cancel()
    await eventually(lambda: cluster.active == 0, 5, "both legs are cancelled")


async def test_a_deadline_reaches_both_legs(cluster: FakeCluster) -> None:
    for node in cluster.nodes.values():
        node.faults["prefill"] = lambda: asyncio.sleep(60)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await cluster.ask(PROMPT, timeout=0.5)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: cluster.active == 0, 5, "both legs are cancelled")


async def test_one_call_to_a_node_serves_request_after_request(small: FakeCluster) -> None:
    for prompt in (PROMPT, SHORT, PROMPT, SHORT):
        await ask_and_check(small, prompt)
    assert small.nodes["decode0"].num_decode_calls == 1
    await asyncio.gather(*(ask_and_check(small, PROMPT, 20 + number) for number in range(6)))
    assert 1 < small.nodes["decode0"].num_decode_calls <= 6


async def test_a_call_that_its_node_has_ended_is_no_failure(small: FakeCluster) -> None:
    node = small.nodes["decode0"]
    await ask_and_check(small)
    node.keeps_calls = False
    answers = [await ask_and_check(small, prompt) for prompt in (PROMPT, SHORT, PROMPT)]
    assert all(answer.timeline.migrations == 0 for answer in answers)
    assert node.num_decode_calls == 3, "the first was ended by its second leg"


async def test_a_call_of_which_a_leg_was_broken_off_is_not_kept(small: FakeCluster) -> None:
    node = small.nodes["decode0"]
    node.step_s = 0.05
    await ask_and_check(small)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await small.ask(PROMPT, timeout=0.5, max_tokens=1000)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: small.active == 0, 5, "the node has heard of it")
    assert node.num_decode_calls == 1, "the leg had the call of the one before"
    await ask_and_check(small)
    assert node.num_decode_calls == 2


async def test_a_node_that_is_to_stop_need_not_wait_for_kept_calls(small: FakeCluster) -> None:
    node = small.nodes["decode0"]
    await ask_and_check(small)
    assert node.num_open_calls == 1
    await node.beat(draining=True)
    await eventually(lambda: node.num_open_calls == 0, 5, "the router has heard of it")
    await node.beat(draining=False)
    await eventually(lambda: bool(small.router.frontend and small.router.frontend.is_ready), 5)
    await ask_and_check(small)


async def test_a_traced_request_has_a_call_of_its_own(small: FakeCluster) -> None:
    context = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for _ in range(2):
        async for _ in small.stub.Generate(_request(PROMPT, max_tokens=2), metadata=(("traceparent", context),)):
            pass
        await ask_and_check(small)
    assert small.nodes["decode0"].num_decode_calls == 3


async def test_a_stop_string_cancels_the_decode_leg(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "decode0"):
            node = await cluster.add(node_id, saying("one two three four five" * 50))
            node.tokens_per_message = 7
        await cluster.open()
        answer = await cluster.ask(PROMPT, stop=["three"])
        assert (answer.text, answer.finish_reason) == ("one two ", STOP)
        assert bytes(answer.token_ids) == b"one two three"
        assert answer.usage.output_tokens == len("one two three")
        await eventually(lambda: cluster.active == 0, 5, "the decode leg is cancelled")
        later = await cluster.ask(PROMPT, stop=["three"], min_tokens=20)
        assert later.text == "one two three four fiveone two "


async def test_every_request_at_once_while_nodes_die(cluster: FakeCluster) -> None:
    """Forty streams, and half of the cluster dies under them."""
    for node in cluster.nodes.values():
        node.step_s = 0.01
    prompts = [[256, *(97 + (n * k) % 26 for k in range(90))] for n in range(40)]
    asking = [asyncio.create_task(cluster.ask(p, max_tokens=40, seed=n)) for n, p in enumerate(prompts)]
    await asyncio.sleep(0.3)
    await cluster.nodes["decode1"].kill()
    cluster.nodes["prefill0"].hang()
    answers = await asyncio.gather(*asking)
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.token_ids == expected(prompt, 40, n)
    assert sum(answer.timeline.migrations for answer in answers) > 0


async def test_hits_are_located_and_draw_requests_to_their_arena(cluster: FakeCluster, redis_url: str) -> None:
    directory = Directory(redis_url, CLUSTER)
    for node in cluster.nodes.values():
        await node.beat(block_bytes=16 << 20)
    for n, node_id in enumerate(("prefill0", "prefill1")):
        await cluster.nodes[node_id].beat(arena_id=f"a{n}")
    prompt = [256, *(97 + n % 26 for n in range(BLOCK * 20 + 40))]
    hashes = hash_blocks(BlockHash(ROOT), prompt, BLOCK)[:20]
    arena = ArenaRecord(arena_id="a1", address="tcp://127.0.0.1:1", host="h", slot_bytes=1, num_slots=100)
    await directory.heartbeat_arena(arena, 30.0)
    await directory.announce_all("a1", [(block_hash, n) for n, block_hash in enumerate(hashes)], 30.0)
    await asyncio.sleep(0.3)
    for _ in range(5):
        answer = await ask_and_check(cluster, prompt)
        assert answer.timeline.prefill_node == "prefill1"
    await directory.close()


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> list[RequestView]:
    """What routers that start from now on ask their policy."""
    seen, choose = list[RequestView](), POLICIES["predict"]()

    def note(view: RequestView, *rest: Any) -> Plan | Reject:
        seen.append(view)
        return choose(view, *rest)

    monkeypatch.setitem(POLICIES, "predict", lambda: note)
    return seen


async def test_what_lies_on_disk_is_told_to_the_policy(
    views: list[RequestView], cluster: FakeCluster, redis_url: str
) -> None:
    directory = Directory(redis_url, CLUSTER)
    prompt = [256, *(97 + n % 26 for n in range(BLOCK * 8))]
    hashes = hash_blocks(BlockHash(ROOT), prompt, BLOCK)[:6]
    arena = ArenaRecord(arena_id="a1", address="tcp://127.0.0.1:1", host="h", slot_bytes=1, num_slots=100)
    await directory.heartbeat_arena(arena, 30.0)
    slots = [0, 1, 2, ON_DISK, ON_DISK, ON_DISK]
    await directory.announce_all("a1", list(zip(hashes, slots, strict=True)), 30.0)
    await ask_and_check(cluster, prompt)
    assert [view.hits for view in views] == [{"a1": Hit(6, 3)}]
    await directory.close()


async def test_redis_goes_away_and_comes_back_empty(redis_process: RedisProcess) -> None:
    async with running(FakeCluster(redis_process.url)) as cluster:
        for node_id in ("prefill0", "decode0"):
            await cluster.add(node_id)
        await cluster.open()
        await ask_and_check(cluster)
        redis_process.kill()
        await asyncio.sleep(1.5)
        await ask_and_check(cluster)
        redis_process.start()
        for _ in range(10):
            await ask_and_check(cluster, count=3)
            await asyncio.sleep(0.1)
