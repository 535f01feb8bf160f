"""A prefill node over real gRPC: its token, what it publishes, whom it refuses, and that it keeps nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import RedisProcess, eventually
from node_harness import BLOCK_SIZE, Machine, node_request, prompt_of, running_machine, sampling

from batonpb import common_pb2, node_pb2, node_pb2_grpc
from kvstore.blocks import hash_blocks, salted


@pytest.fixture
async def machine(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[Machine]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        yield machine


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize("num_tokens", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 150])
async def test_first_token_is_that_of_one_engine_alone(machine: Machine, num_tokens: int) -> None:
    node = await machine.node(store_dir="")
    prompt = prompt_of(num_tokens)
    answer = await node.prefill(node_request(prompt))
    assert answer.token.token_id == machine.expected(prompt)[0]
    assert answer.finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED
    assert (answer.local_hit_tokens, answer.store_hit_tokens) == (0, 0)
    assert answer.queue_s >= 0 and answer.compute_s > 0


async def test_waiting_inside_the_engine_is_queueing(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    engine = node.server.loop.engine
    release, wait_s = engine.release, 0.3

    def release_late(request_id: str, tokens: Sequence[int] = ()) -> None:
        release(request_id, tokens)
        time.sleep(wait_s)  # as a long step of others would be: it is released, and in no step yet

    engine.release = release_late  # type: ignore[method-assign]
    assert (await node.prefill(node_request(prompt_of(20)))).queue_s >= wait_s


async def test_second_request_hits_the_engine_of_the_first(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    first = await node.prefill(node_request(prompt_of(100)))
    second = await node.prefill(node_request(prompt_of(100)))
    assert second.token == first.token
    assert second.local_hit_tokens == 96


async def test_full_blocks_are_in_the_directory_when_the_answer_comes(machine: Machine) -> None:
    store, node = await machine.store(), await machine.node()
    prompt = prompt_of(100)
    await node.prefill(node_request(prompt))
    hashes = hash_blocks(machine.layout.root(), prompt, BLOCK_SIZE)
    located = await machine.directory.locate(hashes)
    assert {arena: len(slots) for arena, slots in located.items()} == {store.record().arena_id: 6}


async def test_another_node_fetches_what_this_one_published(machine: Machine) -> None:
    await machine.store()
    first, second = await machine.node(), await machine.node()
    prompt = prompt_of(100)
    here, there = await first.prefill(node_request(prompt)), await second.prefill(node_request(prompt))
    assert there.token == here.token
    assert (there.local_hit_tokens, there.store_hit_tokens) == (0, 96)


async def test_at_least_one_token_is_computed(machine: Machine) -> None:
    await machine.store()
    first, second = await machine.node(), await machine.node()
    prompt = prompt_of(6 * BLOCK_SIZE)
    here, there = await first.prefill(node_request(prompt)), await second.prefill(node_request(prompt))
    assert there.token == here.token
    assert there.store_hit_tokens == 5 * BLOCK_SIZE


async def test_tenants_share_no_blocks(machine: Machine) -> None:
    await machine.store()
    node = await machine.node()
    prompt = prompt_of(100)
    await node.prefill(node_request(prompt, salt=b"one"))
    other = await node.prefill(node_request(prompt, salt=b"two"))
    assert (other.local_hit_tokens, other.store_hit_tokens) == (0, 0)
    hashes = hash_blocks(salted(machine.layout.root(), b"one"), prompt, BLOCK_SIZE)
    assert [len(slots) for slots in (await machine.directory.locate(hashes)).values()] == [6]


async def test_first_token_may_be_the_last(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    prompt = prompt_of(40)
    token = machine.expected(prompt)[0]
    length = await node.prefill(node_request(prompt, sampling=sampling(max_tokens=1)))
    stop = await node.prefill(node_request(prompt, sampling=sampling(stop_token_ids=[token])))
    longer = await node.prefill(node_request(prompt, sampling=sampling(stop_token_ids=[token], min_tokens=2)))
    assert length.finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert (stop.finish_reason, stop.token.token_id) == (common_pb2.FINISH_REASON_STOP, token)
    assert longer.finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED


async def test_goes_on_behind_tokens_of_an_earlier_node(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    prompt = prompt_of(40)
    params = sampling(temperature=1.0, presence_penalty=1.0)
    outputs = machine.expected(prompt, params)
    for done in (1, 5):
        answer = await node.prefill(node_request(prompt + outputs[:done], len(prompt), sampling=params))
        assert answer.token.token_id == outputs[done]


async def test_logprobs_come_with_the_token(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    plain = await node.prefill(node_request(prompt_of(20)))
    asked = await node.prefill(node_request(prompt_of(20), sampling=sampling(logprobs=3)))
    assert not plain.token.HasField("logprobs")
    top = asked.token.logprobs.top
    assert [entry.logprob for entry in top] == sorted((entry.logprob for entry in top), reverse=True)
    assert (len(top), top[0].token_id) == (3, asked.token.token_id)


async def test_a_prompt_that_is_scored_is_computed_in_whole(machine: Machine) -> None:
    """Neither this node's cache nor the store counts; what it computed is published, and the next one hits it."""
    await machine.store()
    first, second = await machine.node(), await machine.node()
    prompt = prompt_of(200)
    plain = await first.answer(node_request(prompt))
    asked = node_request(prompt, prompt_logprobs=2)
    scored = [await node.answer(asked) for node in (first, second)]
    for answer in scored:
        scores = answer.prompt_logprobs
        assert answer.token == plain.token and answer.local_hit_tokens == answer.store_hit_tokens == 0
        assert list(scores.token_ids) == prompt and scores.num_top == 2
        assert len(scores.logprobs) == len(scores.ranks) == 199
        assert len(scores.top_token_ids) == len(scores.top_logprobs) == 2 * 199
        assert answer.coming_blocks == 12
    assert list(scored[0].prompt_logprobs.logprobs) == pytest.approx(list(scored[1].prompt_logprobs.logprobs), abs=1e-4)
    assert not plain.HasField("prompt_logprobs")
    other = prompt_of(100, seed=1)
    await first.answer(node_request(other, prompt_logprobs=0))
    assert (await second.answer(node_request(other))).store_hit_tokens == 96


@pytest.mark.parametrize(
    ("request_fields", "field", "limit"),
    [
        ({"request_id": "x" * 129}, "request_id", "128"),
        ({"salt": b"x" * 257}, "salt", "256"),
        ({"priority": 101}, "priority", "[-100, 100]"),
        ({"priority": -101}, "priority", "[-100, 100]"),
        ({"token_ids": prompt_of(512)}, "token_ids", "511"),
        ({"token_ids": [3, 258]}, "prompt", "258"),
        ({"num_prompt_tokens": 33}, "num_prompt_tokens", "32"),
        ({"sampling": sampling(temperature=-1.0)}, "sampling.temperature", "[0, 2]"),
        ({"sampling": sampling(temperature=float("nan"))}, "sampling.temperature", "[0, 2]"),
        ({"sampling": sampling(max_tokens=0)}, "sampling.max_tokens", "at least 1"),
        ({"sampling": sampling(min_tokens=13)}, "sampling.min_tokens", "12"),
        ({"sampling": sampling(logprobs=21)}, "sampling.logprobs", "20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "[0, 20]"),
        ({"sampling": sampling(stop_token_ids=range(17))}, "sampling.stop_token_ids", "16"),
    ],
)
async def test_bad_input_names_field_and_limit(
    machine: Machine, request_fields: dict[str, Any], field: str, limit: str
) -> None:
    node = await machine.node(store_dir="")
    message = node_request(prompt_of(32))
    for name, value in request_fields.items():
        message.ClearField(name)
        message.MergeFrom(node_pb2.NodeRequest(**{name: value}))
    if "token_ids" in request_fields:
        message.num_prompt_tokens = len(message.token_ids)
    code, details = await status_of(node.prefill(message))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(f"{field}: ") and limit in details


async def test_what_a_router_must_set_is_asked_for(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    for name, field in [("token_ids", "token_ids"), ("num_prompt_tokens", "num_prompt_tokens")]:
        message = node_request(prompt_of(8))
        message.ClearField(name)
        code, details = await status_of(node.prefill(message))
        assert (code, details.split(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    for name in ("seed", "max_tokens"):
        message = node_request(prompt_of(8))
        message.sampling.ClearField(name)
        code, details = await status_of(node.prefill(message))
        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, f"sampling.{name}: must be set")
    outputs_end_it = node_request(prompt_of(32), 20)
    code, details = await status_of(node.prefill(outputs_end_it))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "sampling.max_tokens = 12" in details


async def test_message_over_the_limit_is_refused_and_harms_nobody(machine: Machine) -> None:
    node = await machine.node(store_dir="", max_message_bytes=2**16)
    code, _ = await status_of(node.prefill(node_request(list(range(250)) * 300)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await node.prefill(node_request(prompt_of(20)))).token is not None


async def test_waits_for_room_in_turn(machine: Machine) -> None:
    node = await machine.node(store_dir="", engine={"num_blocks": 32})
    holder = await node.admit(node_request(prompt_of(400)))
    first = asyncio.create_task(node.prefill(node_request(prompt_of(300, seed=1))))
    await eventually(lambda: _queued(node, 300))
    second = asyncio.create_task(node.prefill(node_request(prompt_of(20, seed=2))))  # would fit, but came later
    await eventually(lambda: _queued(node, 320))
    refused, _ = await status_of(node.admit(node_request(prompt_of(20, seed=3))))  # nobody overtakes those who queue
    assert refused is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not first.done() and not second.done()
    holder.cancel()
    answers = [(await task).token.token_id for task in (first, second)]
    assert answers == [machine.expected(prompt_of(300, seed=1))[0], machine.expected(prompt_of(20, seed=2))[0]]


async def _queued(node: Any, num_tokens: int) -> bool:
    """The holder's 400 tokens do not count: it is not known yet who computes them."""
    return (await node.load()).queued_prefill_tokens == num_tokens


async def test_refuses_when_room_does_not_come_or_the_queue_is_full(machine: Machine) -> None:
    node = await machine.node(store_dir="", engine={"num_blocks": 32}, room_wait_s=0.5, max_queued_requests=1)
    holder = await node.admit(node_request(prompt_of(500)))
    waiting = asyncio.create_task(node.prefill(node_request(prompt_of(100, seed=1))))
    await eventually(lambda: _waiting(node, 2))
    code, details = await status_of(node.prefill(node_request(prompt_of(100, seed=2))))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "no more may" in details
    code, details = await status_of(waiting)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "within 0.5 s" in details
    holder.cancel()


async def _waiting(node: Any, num_requests: int) -> bool:
    return (await node.load()).num_waiting == num_requests


async def test_cancelled_in_the_queue_leaves_nothing(machine: Machine) -> None:
    node = await machine.node(engine={"num_blocks": 32})
    holder = await node.admit(node_request(prompt_of(400)))
    first = asyncio.create_task(node.prefill(node_request(prompt_of(300, seed=1))))
    await eventually(lambda: _waiting(node, 2))
    second = asyncio.create_task(node.prefill(node_request(prompt_of(20, seed=2))))
    await eventually(lambda: _waiting(node, 3))
    for task in (first, second):
        task.cancel()
        await asyncio.wait((task,))
    await eventually(lambda: _waiting(node, 1))
    holder.cancel()


async def test_deadline_in_the_queue_leaves_nothing(machine: Machine) -> None:
    node = await machine.node(engine={"num_blocks": 32})
    holder = await node.admit(node_request(prompt_of(400)))
    code, _ = await status_of(node.prefill(node_request(prompt_of(300, seed=1)), timeout=0.5))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: _waiting(node, 1))
    holder.cancel()


async def test_cancelled_between_two_chunks_leaves_nothing(machine: Machine) -> None:
    await machine.store()
    node = await machine.node(engine={"max_num_batched_tokens": 1})
    call = asyncio.create_task(node.prefill(node_request(prompt_of(500))))
    await eventually(lambda: any(request.num_computed_tokens > 16 for request in node.server.admission.requests))
    call.cancel()
    await eventually(node.is_clean)
    assert not node.server.admission.requests
    # What was computed before is good for the next one.
    again = await node.prefill(node_request(prompt_of(500)))
    assert again.local_hit_tokens >= 16


async def test_draining_refuses_new_requests_only(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    await node.control.Drain(node_pb2.DrainRequest())
    code, details = await status_of(node.prefill(node_request(prompt_of(20))))
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "draining" in details
    await node.control.Drain(node_pb2.DrainRequest(undo=True))
    assert (await node.prefill(node_request(prompt_of(20)))).token is not None


async def test_a_store_that_is_gone_costs_time_only(machine: Machine) -> None:
    store, node = await machine.store(), await machine.node()
    await node.prefill(node_request(prompt_of(100)))
    await store.stop()
    machine.stores.clear()
    answer = await node.prefill(node_request(prompt_of(100, seed=1)))
    assert answer.token.token_id == machine.expected(prompt_of(100, seed=1))[0]


async def test_a_registry_that_is_gone_costs_time_only(
    tiny_model_dir: Path, redis_process: RedisProcess, short_dir: Path
) -> None:
    async with running_machine(tiny_model_dir, redis_process.url, short_dir) as machine:
        await machine.store()
        node = await machine.node()
        redis_process.kill()
        answer = await node.prefill(node_request(prompt_of(100)))
        assert answer.token.token_id == machine.expected(prompt_of(100))[0]
        redis_process.start()
        await eventually(machine.directory.nodes, what="the node is in the registry again")


async def test_a_leg_tells_what_it_waited_for_and_logs_its_trace(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node = await machine.node(role="prefill")
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    message = node_pb2.PrefillRequest(request=node_request(prompt_of(100)))
    context = (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),)
    answer = await node_pb2_grpc.PrefillStub(node.channel).Prefill(message, metadata=context)
    assert 0.0 <= answer.fetch_s <= answer.queue_s and answer.compute_s > 0.0
    assert any(f"trace_id={trace_id}" in record.getMessage() for record in caplog.records)
