"""A router over real gRPC that answers by script, and keeps what it was asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc

LENGTH = common_pb2.FINISH_REASON_LENGTH


class ScriptedRouter(inference_pb2_grpc.InferenceServicer):
    """Answers as the scripts of its fields say, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.keys: set[str | None] = set()
        self.bundle = 1  # tokens in each message
        self.pause_s = 0.0
        self.fault = ""  # "busy", "cut" or "miscount"
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
        if request.sampling.temperature > 2 or len(request.text) > 10**6:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "sampling.temperature must be in [0, 2]")
        num_prompt, num_output = len(request.tokens.token_ids), request.sampling.max_tokens
        left = num_output
        while left:
            await asyncio.sleep(self.pause_s)
            count = min(self.bundle, left)
            left -= count
            yield inference_pb2.GenerateResponse(text="x" * count, tokens=[common_pb2.Token(token_id=7)] * count)
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
    """The scripted router on an event loop of its own, for callers that run one themselves."""

    service: ScriptedRouter = field(default_factory=ScriptedRouter)
    address: str = ""
    credentials: grpc.ServerCredentials | None = None

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)

    async def _start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        inference_pb2_grpc.add_InferenceServicer_to_server(self.service, self._server)
        if self.credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            port = self._server.add_secure_port("127.0.0.1:0", self.credentials)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()
