"""The client and `baton bench` itself, against a real gRPC server with scripted answers."""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc
from loadtest import bench
from loadtest.client import Client, Clock, Shot, measure_loop_lag
from loadtest.record import RequestRecord

LENGTH = common_pb2.FINISH_REASON_LENGTH


class ScriptedRouter(inference_pb2_grpc.InferenceServicer):
    """Answers as the scripts of its fields say, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.keys: set[str | None] = set()
        self.bundle = 1  # tokens in each message
        self.pause_s = 0.0
        self.fault = ""
        self.calls_without_node = 0  # so often there is no node yet
        self.in_flight = self.most_in_flight = 0

    async def GetModel(self, request: object, context: grpc.aio.ServicerContext) -> inference_pb2.GetModelResponse:
        self.keys.add(dict(context.invocation_metadata()).get("authorization"))
        if self.calls_without_node:
            self.calls_without_node -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no node")
        return inference_pb2.GetModelResponse(model="scripted", max_model_len=512, vocab_size=50, block_size=16)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.keys.add(dict(context.invocation_metadata()).get("authorization"))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            async for response in self._answer(request, context):
                yield response
        finally:
            self.in_flight -= 1

    async def _answer(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        if self.fault == "busy" and len(self.requests) % 3 == 0:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "all nodes are busy")
        num_prompt, num_output = len(request.tokens.token_ids), request.sampling.max_tokens
        left = num_output
        while left:
            await asyncio.sleep(self.pause_s)
            count = min(self.bundle, left)
            left -= count
            yield inference_pb2.GenerateResponse(tokens=[common_pb2.Token(token_id=7)] * count)
        if self.fault == "cut":
            return
        usage = inference_pb2.Usage(
            prompt_tokens=num_prompt,
            output_tokens=num_output + (self.fault == "miscount"),
            cached_tokens=num_prompt // 2,
            local_hit_tokens=num_prompt // 4,
            store_hit_tokens=num_prompt // 4,
        )
        timeline = inference_pb2.Timeline(prefill_node="p0", decode_node="d1", migrations=1)
        yield inference_pb2.GenerateResponse(finish_reason=LENGTH, usage=usage, timeline=timeline)


@dataclass
class RouterThread:
    """The scripted router on an event loop of its own, as `bench.run` runs one itself."""

    service: ScriptedRouter = field(default_factory=ScriptedRouter)
    address: str = ""

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)

    async def _start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        inference_pb2_grpc.add_InferenceServicer_to_server(self.service, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


@pytest.fixture
def router() -> Iterator[RouterThread]:
    thread = RouterThread()
    yield thread
    thread.close()


async def generate(router: RouterThread, num_tokens: int = 6, timeout_s: float = 30.0) -> RequestRecord:
    request = inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenPrompt(token_ids=range(40)),
        sampling=common_pb2.SamplingParams(max_tokens=num_tokens),
    )
    async with Client(router.address, timeout_s) as client:
        return await client.generate(Shot(3, 0.0, request), Clock())


def arguments(router: RouterThread, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--address", router.address, "--input-len", "32", "--output-len", "5", *flags])


def prompts_of(router: RouterThread) -> list[tuple[int, ...]]:
    return [tuple(request.tokens.token_ids) for request in router.service.requests]


async def test_a_record_says_what_came(router: RouterThread) -> None:
    router.service.pause_s = 0.01
    record = await generate(router)
    assert record.error == ""
    assert (record.index, record.prompt_tokens, record.output_tokens) == (3, 40, 6)
    assert (record.cached_tokens, record.local_hit_tokens, record.store_hit_tokens) == (20, 10, 10)
    assert (record.prefill_node, record.decode_node, record.migrations) == ("p0", "d1", 1)
    times_s = [record.sent_s, *record.token_times_s, record.finished_s]
    assert times_s == sorted(times_s)
    assert len(record.token_times_s) == 6
    assert record.e2e_s >= 6 * 0.01  # the server slept that long, so no reading can be shorter


async def test_bundled_tokens_are_one_message(router: RouterThread) -> None:
    router.service.bundle = 4
    record = await generate(router)
    assert (record.output_tokens, len(record.token_times_s), len(record.itls_s)) == (6, 2, 1)


@pytest.mark.parametrize(
    ("fault", "error"), [("cut", "without a finish reason"), ("miscount", "6 tokens came, usage says 7")]
)
async def test_a_stream_that_is_not_whole_is_an_error(router: RouterThread, fault: str, error: str) -> None:
    router.service.fault = fault
    record = await generate(router)
    assert error in record.error
    assert not record.succeeded


async def test_a_deadline_ends_a_request(router: RouterThread) -> None:
    router.service.pause_s = 20.0
    record = await generate(router, timeout_s=0.2)
    assert record.error.startswith("DEADLINE_EXCEEDED")


async def test_a_router_without_nodes_is_asked_again(router: RouterThread) -> None:
    router.service.calls_without_node = 2
    async with Client(router.address, 30.0) as client:
        assert (await client.get_model()).model == "scripted"
        router.service.calls_without_node = 10**6
        with pytest.raises(grpc.aio.AioRpcError, match="no node"):
            await client.get_model(wait_s=0.2)


async def test_no_router_is_said_in_time() -> None:
    async with Client("127.0.0.1:1", 30.0) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            await client.get_model(wait_s=0.2)


async def test_a_blocked_event_loop_is_noticed() -> None:
    import time

    lags_s: list[float] = []
    meter = asyncio.create_task(measure_loop_lag(lags_s, interval_s=0.001))
    await asyncio.sleep(0.01)
    time.sleep(0.2)  # what the test is about: something blocks the loop
    await asyncio.sleep(0.01)
    meter.cancel()
    assert max(lags_s) > 0.15


def test_run_closed_loop(router: RouterThread, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    router.service.pause_s = 0.002
    out = tmp_path / "bench.json"
    args = arguments(router, "--num-prompts", "12", "--max-concurrency", "3", "--json", str(out))
    assert bench.run(args) == 0
    text = capsys.readouterr().out
    assert text.startswith("============ Serving Benchmark Result ============\n")
    assert "Successful requests:                     12        \n" in text
    assert "Total generated tokens:                  60        \n" in text
    assert "Prefix hit rate (%):                     50.00     \n" in text
    assert router.service.most_in_flight == 3
    content = json.loads(out.read_text())
    assert (content["completed"], content["config"]["max_concurrency"]) == (12, 3)
    assert [request["index"] for request in content["requests"]] == list(range(12))


def test_a_key_goes_with_each_call_and_into_no_file(router: RouterThread, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    flags = ["--num-prompts", "3", "--warmup", "1", "--json", str(out)]
    assert bench.run(arguments(router, *flags, "--api-key", "my-key")) == 0
    assert router.service.keys == {"Bearer my-key"}
    assert "my-key" not in out.read_text()
    router.service.keys.clear()
    assert bench.run(arguments(router, *flags)) == 0
    assert router.service.keys == {None}


def test_run_poisson_with_warmup(router: RouterThread) -> None:
    assert bench.run(arguments(router, "--num-prompts", "8", "--request-rate", "200", "--warmup", "3")) == 0
    prompts = prompts_of(router)
    assert len(prompts) == 11
    assert len(set(prompts)) == 11  # what warmed up is not asked again
    sampling = router.service.requests[-1].sampling
    assert (sampling.max_tokens, sampling.ignore_eos, sampling.temperature) == (5, True, 0.0)
    assert len({request.sampling.seed for request in router.service.requests}) == 11


def test_prompts_are_fresh_unless_the_seed_is_fixed(router: RouterThread) -> None:
    for flags in ([], [], ["--seed", "5"], ["--seed", "5"], ["--seed", "6"]):
        assert bench.run(arguments(router, "--num-prompts", "2", "--max-concurrency", "1", *flags)) == 0
    runs = [prompts_of(router)[i : i + 2] for i in range(0, 10, 2)]
    assert runs[2] == runs[3]
    assert len({tuple(run) for run in runs}) == 4


def test_run_shared_prefixes(router: RouterThread) -> None:
    flags = ["--dataset", "shared-prefix", "--prefix-len", "24", "--num-prefixes", "2", "--num-prompts", "6"]
    assert bench.run(arguments(router, *flags, "--no-ignore-eos", "--temperature", "0.5")) == 0
    assert len({prompt[:24] for prompt in prompts_of(router)}) == 2
    assert len(set(prompts_of(router))) == 6
    assert all(0 <= token < 50 for prompt in prompts_of(router) for token in prompt)
    assert not router.service.requests[0].sampling.ignore_eos


def test_failures_are_counted_and_shown(router: RouterThread, capsys: pytest.CaptureFixture[str]) -> None:
    router.service.fault = "busy"
    assert bench.run(arguments(router, "--num-prompts", "9")) == 1
    captured = capsys.readouterr()
    assert "Successful requests:                     6         \n" in captured.out
    assert "Failed requests:                         3         \n" in captured.out
    assert "3 x RESOURCE_EXHAUSTED: all nodes are busy" in captured.err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--input-len", "600"], "more than the 512 tokens"),
        (["--dataset", "shared-prefix", "--prefix-len", "32"], "the prefix must have 1 to 31 tokens"),
        (["--address", ""], "--address"),
    ],
)
def test_a_run_that_cannot_be_is_refused(
    router: RouterThread, capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    assert bench.run(arguments(router, *flags)) == 2
    assert reason in capsys.readouterr().err
    assert router.service.requests == []


@pytest.mark.parametrize(
    "flags", [["--num-prompts", "0"], ["--request-rate", "0"], ["--request-rate", "nan"], ["--seed", "-1"]]
)
def test_flags_out_of_range_are_named(
    router: RouterThread, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments(router, *flags)
    assert flags[0] in capsys.readouterr().err
