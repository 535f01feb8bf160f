"""A decode node over real gRPC: the same tokens on every path, admission, order of messages, and nothing is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import RedisProcess, eventually
from node_harness import (
    BLOCK_SIZE,
    ENGINE,
    Machine,
    decode,
    finish,
    ids,
    journey,
    node_request,
    prompt_of,
    running_machine,
    sampling,
    start,
)

from batonpb import common_pb2, node_pb2
from decode_node.worker import DecodeWorker
from engine.engine import Engine
from engine.loop import EngineLoop
from engine.request import FinishReason
from kvstore.blocks import hash_blocks
from kvstore.client import KVClient
from node.admission import Admission
from node.convert import to_request
from node.intake import Intake
from node.publisher import Publisher


@pytest.fixture
async def machine(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[Machine]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        yield machine


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "frequency_penalty": 0.3}


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_tokens", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 56, 300])
async def test_both_legs_give_the_tokens_of_one_engine_alone(
    machine: Machine, num_tokens: int, params: dict[str, Any]
) -> None:
    await machine.store()
    first, second = await machine.node(role="prefill"), await machine.node(role="decode")
    prompt, message = prompt_of(num_tokens), sampling(max_tokens=40, **params)
    tokens, decoded = await journey(first, second, node_request(prompt, sampling=message))
    assert tokens == machine.expected(prompt, message)
    assert decoded.finished.finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert decoded.store_hit_tokens == num_tokens // BLOCK_SIZE * BLOCK_SIZE, "also the block that ends the prompt"
    assert decoded.local_hit_tokens == 0


async def test_many_journeys_at_once(machine: Machine) -> None:
    await machine.store()
    first, second = await machine.node(), await machine.node()
    prompts = [prompt_of(30 + 7 * index, seed=index) for index in range(8)]
    params = sampling(max_tokens=20, **SAMPLED)
    nodes = [(first, second), (second, first)]
    runs = [journey(*nodes[index % 2], node_request(prompt, sampling=params)) for index, prompt in enumerate(prompts)]
    for prompt, (tokens, _) in zip(prompts, await asyncio.gather(*runs), strict=True):
        assert tokens == machine.expected(prompt, params)


async def test_without_a_first_token_the_node_computes_the_prompt(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    decoded = await decode(node, node_request(prompt_of(100)))
    assert decoded.token_ids == machine.expected(prompt_of(100))
    assert decoded.store_hit_tokens == 0
    told_s = {message.tokens.compute_s for message in decoded.messages if message.HasField("tokens")}
    assert len(told_s) == 1 and min(told_s) > 0.0, "what the prompt took, the same in each message"
    kinds = [message.WhichOneof("message") for message in decoded.messages]
    assert set(kinds) == {"tokens"}
    reasons = [message.tokens.finish_reason for message in decoded.messages]
    assert reasons[-1] == common_pb2.FINISH_REASON_LENGTH and not any(reasons[:-1]), "the last tokens say so"


async def test_logprobs_of_a_prompt_come_once_with_the_first_tokens(machine: Machine) -> None:
    await machine.store()
    prefill, node = await machine.node(), await machine.node()
    prompt = prompt_of(100)
    answer = await prefill.answer(node_request(prompt, prompt_logprobs=1))
    decoded = await decode(node, node_request(prompt, prompt_logprobs=1))
    told = [message.tokens for message in decoded.messages if message.HasField("tokens")]
    assert [tokens.HasField("prompt_logprobs") for tokens in told] == [True, *[False] * (len(told) - 1)]
    logprobs = list(told[0].prompt_logprobs.logprobs)
    assert logprobs == pytest.approx(list(answer.prompt_logprobs.logprobs), abs=1e-4) and len(logprobs) == 99
    assert decoded.token_ids == machine.expected(prompt) and decoded.store_hit_tokens == 0


async def test_fetches_while_prefill_is_still_at_work(machine: Machine) -> None:
    await machine.store()
    first, second = await machine.node(engine={"max_num_batched_tokens": 16}), await machine.node()
    call = await second.admit(node_request(prompt_of(500), sampling=sampling(max_tokens=4)))
    await first.prefill(node_request(prompt_of(200)))
    (held,) = second.server.admission.requests
    await eventually(lambda: held.num_store_hit_tokens == 192, what="the blocks of 200 tokens arrive before Start")
    answer = await first.prefill(node_request(prompt_of(500), sampling=sampling(max_tokens=4)))
    await start(call, [answer.token.token_id])
    decoded = await finish(call)
    assert [answer.token.token_id, *decoded.token_ids] == machine.expected(prompt_of(500), sampling(max_tokens=4))
    assert decoded.store_hit_tokens == 496


async def test_goes_on_elsewhere_behind_the_tokens_so_far(machine: Machine) -> None:
    await machine.store()
    first, second = await machine.node(), await machine.node()
    prompt, params = prompt_of(90), sampling(max_tokens=60, **SAMPLED)
    outputs = machine.expected(prompt, params)
    call = await first.admit(node_request(prompt, sampling=params))
    await start(call)
    seen: list[int] = []
    while len(seen) < 25:
        seen += [token.token_id for token in (await call.read()).tokens.tokens]
    call.cancel()
    tokens, decoded = await journey(second, second, node_request(prompt + seen, len(prompt), sampling=params))
    assert seen + tokens == outputs
    assert len(seen + tokens) == 60 and decoded.finished.finish_reason == common_pb2.FINISH_REASON_LENGTH


async def test_several_tokens_may_come_with_start(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    outputs = machine.expected(prompt_of(30))
    decoded = await decode(node, node_request(prompt_of(30)), outputs[:5])
    assert decoded.token_ids == outputs[5:]


async def test_stop_token_ends_it_and_is_sent(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    outputs = machine.expected(prompt_of(30), sampling(**SAMPLED))
    end = next(index for index in range(2, 12) if outputs[index] not in outputs[:index])
    decoded = await decode(
        node, node_request(prompt_of(30), sampling=sampling(stop_token_ids=[outputs[end]], **SAMPLED))
    )
    assert decoded.token_ids == outputs[: end + 1]
    assert decoded.finished.finish_reason == common_pb2.FINISH_REASON_STOP


async def test_the_next_turn_hits_what_decoding_published(machine: Machine) -> None:
    await machine.store()
    first, second, third = [await machine.node() for _ in range(3)]
    prompt, params = prompt_of(40), sampling(max_tokens=60)
    tokens, _ = await journey(first, second, node_request(prompt, sampling=params))
    turn = prompt + tokens + prompt_of(20, seed=5)
    hashes = hash_blocks(machine.layout.root(), turn, BLOCK_SIZE)

    async def is_published() -> bool:
        return [len(slots) for slots in (await machine.directory.locate(hashes)).values()] == [6]

    await eventually(is_published, what="the 99 tokens of the first turn that were computed")
    assert (await third.prefill(node_request(turn))).store_hit_tokens == 96


async def test_tokens_that_wait_come_together(machine: Machine) -> None:
    engine = Engine.from_pretrained(machine.model_dir, ENGINE)
    loop, store = EngineLoop(engine, on_failure=print), KVClient(machine.directory, engine.layout.block_bytes, None)
    loop.start()
    intake = Intake(store, engine.layout.block_size, engine.layout.block_bytes)
    worker = DecodeWorker(loop, intake, Publisher(loop, store, num_blocks=64), Admission(loop))
    request = to_request(node_request(prompt_of(20)), engine)
    async with worker.admit(request) as leg:
        batches = leg.run([])
        tokens = [await anext(batches)]
        await eventually(lambda: request.is_finished)
        await loop.call(lambda _: None)  # its answer comes behind the last output
        tokens += [batch async for batch in batches]
    assert [token.token_id for batch in tokens for token in batch] == machine.expected(prompt_of(20))
    # Where the engine is quicker than this task, all of them waited.
    assert len(tokens) <= 2 and leg.finish_reason is FinishReason.LENGTH
    await loop.stop()
    await store.close()


@pytest.mark.parametrize("moment", ["admitted", "started", "streaming"])
@pytest.mark.parametrize("ends", ["cancel", "deadline"])
async def test_caller_that_is_gone_leaves_nothing(machine: Machine, moment: str, ends: str) -> None:
    await machine.store()
    node = await machine.node()
    params = sampling(max_tokens=400)
    call = await node.admit(node_request(prompt_of(100), sampling=params), 60 if ends == "cancel" else 0.6)
    assert not await node.is_clean()
    if moment != "admitted":
        await start(call)
    if moment == "streaming":
        assert (await call.read()).WhichOneof("message") == "tokens"
    if ends == "cancel":
        call.cancel()
    else:
        with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
            await _read_for_ever(call)
    await eventually(node.is_clean)


async def _read_for_ever(call: Any) -> None:
    while True:
        await call.read()
        await asyncio.sleep(0.05)  # slower than the deadline, so that tokens are still under way


async def test_start_that_never_comes_frees_the_room(machine: Machine) -> None:
    node = await machine.node(store_dir="", start_wait_s=0.3)
    call = await node.admit(node_request(prompt_of(100)))
    code, details = await refusal(call.read())
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED and "start: did not come within 0.3 s" in details


async def test_admission_is_refused_before_anything_is_spent(machine: Machine) -> None:
    node = await machine.node(store_dir="", engine={"num_blocks": 32})
    holder = await node.admit(node_request(prompt_of(400)))
    code, details = await refusal(node.admit(node_request(prompt_of(200, seed=1))))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "no room for 201 tokens" in details
    small = await decode(node, node_request(prompt_of(20, seed=2)))
    assert small.token_ids == machine.expected(prompt_of(20, seed=2))
    await start(holder)
    assert (await finish(holder)).token_ids == machine.expected(prompt_of(400))


async def test_admitted_tells_the_free_blocks(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    call = node.open()
    await call.write(node_pb2.DecodeRequest(admit=node_pb2.Admit(request=node_request(prompt_of(100)))))
    assert (await call.read()).admitted.free_blocks == 64 - 7
    call.cancel()


async def test_bad_requests_are_refused_by_name(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    code, details = await refusal(node.admit(node_request(prompt_of(20), sampling=sampling(top_p=2.0))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and details.startswith("sampling.top_p: must be in (0, 1]")
    code, details = await refusal(node.admit(node_request(prompt_of(600))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "511" in details


async def test_a_call_goes_on_with_the_next_leg(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    call = node.open()
    for seed in range(3):
        prompt = prompt_of(30, seed=seed)
        admit = node_pb2.Admit(request=node_request(prompt), runs_alone=seed != 1)
        await call.write(node_pb2.DecodeRequest(admit=admit))
        assert (await call.read()).admitted.free_blocks > 0
        if not admit.runs_alone:
            await start(call)
        token_ids: list[int] = []
        while not (message := (await call.read()).tokens).finish_reason:
            token_ids += ids(message.tokens)
        assert [*token_ids, *ids(message.tokens)] == machine.expected(prompt)
        await eventually(node.is_clean, what="between its legs a call holds nothing")
    assert (await finish(call)).messages == []


async def test_a_call_that_nobody_goes_on_with_is_ended(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decode_node.service.KEEP_S", 0.05)
    node = await machine.node(store_dir="")
    call = node.open()
    await call.write(node_pb2.DecodeRequest(admit=node_pb2.Admit(request=node_request(prompt_of(30)), runs_alone=True)))
    while await call.read() is not grpc.aio.EOF:
        pass
    assert await call.code() is grpc.StatusCode.OK


START = node_pb2.DecodeRequest(start=node_pb2.Start())
ADMIT = node_pb2.DecodeRequest(admit=node_pb2.Admit(request=node_request(prompt_of(20))))
LONE = node_pb2.DecodeRequest(admit=node_pb2.Admit(request=node_request(prompt_of(20)), runs_alone=True))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "admit: must be the first message of a leg, got the end of the stream"),
        ([START], "admit: must be the first message of a leg, got start"),
        ([node_pb2.DecodeRequest()], "admit: must be the first message of a leg, got None"),
        ([ADMIT], "start: must be the second message of a leg, got the end of the stream"),
        ([LONE, START], "admit: must be the first message of a leg, got start"),
        ([ADMIT, ADMIT], "start: must be the second message of a leg, got admit"),
    ],
)
async def test_messages_out_of_order(machine: Machine, messages: list[node_pb2.DecodeRequest], problem: str) -> None:
    node = await machine.node(store_dir="")
    call = node.open()
    for message in messages:
        await call.write(message)
    await call.done_writing()
    assert await refusal(finish(call)) == (grpc.StatusCode.INVALID_ARGUMENT, problem)


@pytest.mark.parametrize(
    ("tokens", "limit"), [([258], "below 258"), ([2**32 - 1], "below 258"), ([1] * 12, "11 at most")]
)
async def test_bad_tokens_in_start(machine: Machine, tokens: list[int], limit: str) -> None:
    node = await machine.node(store_dir="")
    call = await node.admit(node_request(prompt_of(20)))
    await start(call, tokens)
    code, details = await refusal(finish(call))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("start.tokens: ") and limit in details


async def test_draining_lets_admitted_requests_end(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    call = await node.admit(node_request(prompt_of(20)))
    load = await node.control.Drain(node_pb2.DrainRequest())
    assert load.draining and load.num_waiting == 1
    code, details = await refusal(node.admit(node_request(prompt_of(20))))
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "draining" in details
    await start(call)
    assert (await finish(call)).token_ids == machine.expected(prompt_of(20))


async def test_preempted_requests_lose_nothing(machine: Machine) -> None:
    await machine.store()
    node = await machine.node(engine={"num_blocks": 32})
    params = sampling(max_tokens=120, **SAMPLED)
    prompts = [prompt_of(60 + index, seed=index) for index in range(4)]
    runs = [decode(node, node_request(prompt, sampling=params)) for prompt in prompts]
    for prompt, decoded in zip(prompts, await asyncio.gather(*runs), strict=True):
        assert decoded.token_ids == machine.expected(prompt, params)


async def test_a_store_that_dies_between_the_legs_costs_time_only(machine: Machine) -> None:
    store = await machine.store()
    first, second = await machine.node(), await machine.node()
    answer = await first.prefill(node_request(prompt_of(100)))
    await store.stop()
    machine.stores.clear()
    decoded = await decode(second, node_request(prompt_of(100)), [answer.token.token_id])
    assert [answer.token.token_id, *decoded.token_ids] == machine.expected(prompt_of(100))
    assert decoded.store_hit_tokens == 0
    # A new store takes the old one's place, and is found.
    await machine.store()
    await journey(first, second, node_request(prompt_of(100, seed=1)))
    third = await machine.node()
    assert (await third.prefill(node_request(prompt_of(100, seed=1)))).store_hit_tokens == 96


async def test_nodes_of_two_machines_exchange_blocks_over_the_wire(
    machine: Machine, tiny_model_dir: Path, redis_url: str, short_dir: Path
) -> None:
    await machine.store()
    first = await machine.node()
    async with running_machine(tiny_model_dir, redis_url, short_dir / "other") as other:
        await other.store(host="there")
        second = await other.node(node_id="far")
        tokens, decoded = await journey(first, second, node_request(prompt_of(200)))
        assert tokens == machine.expected(prompt_of(200))
        assert decoded.store_hit_tokens == 192


async def test_redis_killed_in_mid_stream(tiny_model_dir: Path, redis_process: RedisProcess, short_dir: Path) -> None:
    async with running_machine(tiny_model_dir, redis_process.url, short_dir) as machine:
        await machine.store()
        first, second = await machine.node(), await machine.node()
        call = await second.admit(node_request(prompt_of(100)))
        answer = await first.prefill(node_request(prompt_of(100)))
        redis_process.kill()
        await start(call, [answer.token.token_id])
        tokens = [answer.token.token_id, *(await finish(call)).token_ids]
        assert tokens == machine.expected(prompt_of(100))
        again, _ = await journey(first, second, node_request(prompt_of(70, seed=1)))
        assert again == machine.expected(prompt_of(70, seed=1))
        redis_process.start()

        async def are_back() -> bool:
            return len(await machine.directory.nodes()) == 2 and len(await machine.directory.arenas()) == 1

        await eventually(are_back, what="both nodes and the arena")


async def test_a_stalled_reader_holds_up_nobody(machine: Machine) -> None:
    await machine.store()
    node = await machine.node()
    stalled = await node.admit(node_request(prompt_of(20), sampling=sampling(max_tokens=400)))
    await start(stalled)
    quick = await decode(node, node_request(prompt_of(50, seed=1)))
    assert quick.token_ids == machine.expected(prompt_of(50, seed=1))
    await eventually(node.is_clean, what="the stalled one is computed, published and gone from the engine")
    assert (await finish(stalled)).token_ids == machine.expected(prompt_of(20), sampling(max_tokens=400))
