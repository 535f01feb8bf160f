"""The client's door over gRPC: statuses, sizes, texts, health, reflection; and how a router starts and stops."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from conftest import POCKET, eventually
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from router_fakes import CLUSTER, FakeCluster, expected, request, running, saying

from batonpb import common_pb2, inference_pb2
from router.config import RouterConfig
from router.errors import UnusableTokenizer
from router.server import RouterServer

INVALID = grpc.StatusCode.INVALID_ARGUMENT
TALK = "Naïve 😀 façade, 日本 — and so on.\n" * 3


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "decode0"):
            await cluster.add(node_id, saying(TALK))
        await cluster.open(max_message_bytes=1 << 20, max_prompt_bytes=1 << 16)
        yield cluster


async def refusal(cluster: FakeCluster, message: inference_pb2.GenerateRequest | bytes) -> grpc.aio.AioRpcError:
    body = message if isinstance(message, bytes) else message.SerializeToString()
    call = cluster.channel.unary_stream("/baton.v1.Inference/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call(body):
            pass
    return error.value


async def test_text_comes_in_whole_characters(cluster: FakeCluster) -> None:
    answer = await cluster.ask("say it")
    assert answer.text == TALK
    assert bytes(answer.token_ids[:-1]).decode() == TALK and answer.token_ids[-1] == 257
    assert answer.finish_reason == common_pb2.FINISH_REASON_STOP
    assert all("\ufffd" not in message.text for message in answer.messages)
    assert len({message.request_id for message in answer.messages}) == 1
    # Tokens are never held back, text as short as can be: each message's text ends with its token's character.
    for message in answer.messages:
        for token in message.tokens:
            assert token.token_id >= 0x80 or message.text.endswith(chr(token.token_id)) or token.token_id == 257


async def test_requests_keep_their_id(cluster: FakeCluster) -> None:
    message = request("x", max_tokens=2)
    message.request_id = "mine"
    async for response in cluster.stub.Generate(message):
        assert response.request_id == "mine"
    [admit] = cluster.nodes["decode0"].seen.admits
    assert admit.request_id == "mine"


async def test_nodes_get_seed_and_length_and_no_text(cluster: FakeCluster) -> None:
    for _ in range(2):
        await cluster.ask("x", stop=["façade"], temperature=0.5)
    first, second = cluster.nodes["decode0"].seen.admits
    assert first.sampling.HasField("seed") and first.sampling.seed != second.sampling.seed
    assert first.sampling.max_tokens == 4096 - 2
    assert not first.sampling.stop and first.sampling.temperature == 0.5
    assert list(first.token_ids) == [256, ord("x")]


async def test_a_chat_is_set_in_the_template(cluster: FakeCluster) -> None:
    message = inference_pb2.GenerateRequest(sampling={"max_tokens": 1})
    message.chat.messages.add(role="user", content="Hi")
    async for _ in cluster.stub.Generate(message):
        pass
    [admit] = cluster.nodes["decode0"].seen.admits
    assert list(admit.token_ids) == [256, *b"Hi\n--\n\n"]


async def test_a_client_may_set_seed_and_length(cluster: FakeCluster) -> None:
    await cluster.ask([256, 97], seed=0, max_tokens=5000)
    [admit] = cluster.nodes["decode0"].seen.admits
    assert (admit.sampling.seed, admit.sampling.max_tokens) == (0, 4094)


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (request(""), "prompt.text: must not be empty"),
        (request("x", temperature=-1), "sampling.temperature: must be in [0, 2], got -1"),
        (request("x", max_tokens=0), "sampling.max_tokens: must be at least 1 (0 with echo or prompt_logprobs), got 0"),
        (request("x" * 4096), "prompt: 4095 tokens at most (the model takes 4096 with its output), got 4097"),
        (
            request("x" * 60_000),
            "prompt: 4095 tokens at most (the model takes 4096 with its output), got at least 6666",
        ),
        (request("x" * 70_000), "prompt.text: 65536 bytes at most, got 70000"),
        (request([1] * 5000), "prompt: 4095 tokens at most"),
        (request([999]), "prompt: token ids must be below 258 (the vocabulary), got 999"),
        (request([1] * (1 << 20)), "message: 1048576 bytes at most"),
        (inference_pb2.GenerateRequest(text="x", model="gpt"), "model: 'pocket' is the model served here, got 'gpt'"),
        (b"\x1a\x02\xff\xfe", "prompt.text: must be valid UTF-8"),
        (b"\xff" * 64, "message: is no baton.v1.GenerateRequest"),
    ],
    ids=range(12),
)
async def test_bad_input_harms_nobody(
    cluster: FakeCluster, message: inference_pb2.GenerateRequest | bytes, names: str
) -> None:
    error = await refusal(cluster, message)
    assert error.code() == INVALID and names in error.details()
    assert not any(node.seen.admits for node in cluster.nodes.values())
    assert (await cluster.ask("x", max_tokens=2)).text == "Na"


async def test_programs_can_read_which_field_is_wrong(cluster: FakeCluster) -> None:
    error = await refusal(cluster, request("x", temperature=-1))
    details, bad = rpc_status.from_call(error), error_details_pb2.BadRequest()
    assert (details.code, details.message) == (INVALID.value[0], error.details())
    assert details.details[0].Unpack(bad)
    [violation] = bad.field_violations
    assert (violation.field, violation.description) == ("sampling.temperature", "must be in [0, 2], got -1")


async def test_beyond_the_transport_limit_grpc_itself_refuses(cluster: FakeCluster) -> None:
    error = await refusal(cluster, b"\x00" * (4 * (1 << 20) + 1000))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_what_goes_wrong_inside_is_said_without_details(cluster: FakeCluster, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("router.decider.Decider.decide", broken)
    error = await refusal(cluster, request("x"))
    assert error.code() == grpc.StatusCode.INTERNAL and "secret" not in error.details()


async def test_without_any_node(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.open()
        assert (await refusal(cluster, request("x"))).code() == grpc.StatusCode.UNAVAILABLE
        assert (await refusal(cluster, request(""))).code() == INVALID, "what is wrong is wrong without a node, too"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await cluster.stub.GetModel(inference_pb2.GetModelRequest())
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        await cluster.add("both0")
        await eventually(lambda: is_served(cluster), 5, "a node is seen")
        assert (await cluster.ask([256], max_tokens=2, seed=1)).token_ids == expected([256], 2, 1)


async def is_served(cluster: FakeCluster) -> bool:
    answer = await health_pb2_grpc.HealthStub(cluster.channel).Check(
        health_pb2.HealthCheckRequest(service="baton.v1.Inference")
    )
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_health_is_of_the_process_and_of_the_service(cluster: FakeCluster) -> None:
    await eventually(lambda: is_served(cluster), 5, "served")
    for node in cluster.nodes.values():
        await node.beat(draining=True)

    async def is_unserved() -> bool:
        return not await is_served(cluster)

    await eventually(is_unserved, 5, "nobody to serve it")
    whole = await health_pb2_grpc.HealthStub(cluster.channel).Check(health_pb2.HealthCheckRequest())
    assert whole.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_model_and_the_services(cluster: FakeCluster) -> None:
    model = await cluster.stub.GetModel(inference_pb2.GetModelRequest())
    assert (model.model, model.max_model_len, model.vocab_size, model.block_size) == ("pocket", 4096, 258, 16)
    assert model.has_chat_template
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    async for reply in reflection_pb2_grpc.ServerReflectionStub(cluster.channel).ServerReflectionInfo(iter([asked])):
        names = {service.name for service in reply.list_services_response.service}
    assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= names


def config(redis_url: str, **fields: object) -> RouterConfig:
    return RouterConfig(str(POCKET), redis_url, cluster=CLUSTER, **fields)


def test_a_config_survives_json() -> None:
    one = config("redis://127.0.0.1:1", port=5, max_prompt_bytes=7)
    assert RouterConfig.from_json(one.to_json()) == one
    with pytest.raises(TypeError, match="no_such_option"):
        RouterConfig.from_json('{"model_dir": "x", "redis_url": "y", "no_such_option": 1}')


async def test_a_router_without_a_tokenizer_does_not_start(redis_url: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableTokenizer, match=r"tokenizer\.json"):
        await RouterServer(RouterConfig(str(tmp_path), redis_url)).start()


async def test_a_port_that_is_taken_is_an_error(redis_url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError):
            await RouterServer(config(redis_url, port=taken.getsockname()[1])).start()


async def test_a_router_starts_without_redis() -> None:
    router = RouterServer(config("redis://127.0.0.1:1"))
    record = await router.start()
    async with grpc.aio.insecure_channel(str(record["address"])) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await router.stop()
    await router.stop()


async def test_a_stopping_router_lets_its_requests_end(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        node = await cluster.add("both0")
        node.step_s = 0.02
        await cluster.open()
        asking = asyncio.create_task(cluster.ask([256, 97], max_tokens=30, seed=3))
        await eventually(lambda: node.seen.starts, 5, "it runs")
        await cluster.router.stop()
        assert (await asking).token_ids == expected([256, 97], 30, 3)
        await eventually(lambda: cluster.active == 0, 5, "nothing is left")


async def test_a_stopping_router_does_not_wait_for_ever(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        node = await cluster.add("both0")
        node.faults["start"] = lambda: asyncio.sleep(60)
        await cluster.open(drain_s=0.2)
        asking = asyncio.create_task(cluster.ask([256, 97]))
        await eventually(lambda: node.seen.starts, 5, "it runs")
        await cluster.router.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await asking
        await eventually(lambda: cluster.active == 0, 5, "its leg is cancelled")
