"""One request over gRPC, timed at the client; and how late the client's own event loop ran meanwhile.

Knows the proto and the clock; knows no arrival process and no statistics.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc
from loadtest.record import RequestRecord

_CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_ASK_AGAIN_S = 0.05


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start_s


@dataclass(frozen=True)
class Shot:
    """A request that is ready to go: built before the run, so that building it costs no measured time."""

    index: int
    scheduled_s: float
    request: inference_pb2.GenerateRequest


class _Stream:
    """What has come of one response stream so far."""

    def __init__(self) -> None:
        self.token_times_s: list[float] = []
        self.num_tokens = 0
        self.last = inference_pb2.GenerateResponse()

    def add(self, response: inference_pb2.GenerateResponse, now_s: float) -> None:
        if response.tokens:
            self.token_times_s.append(now_s)
            self.num_tokens += len(response.tokens)
        self.last = response

    def fault(self) -> str:
        """What is wrong with a stream that ended without a gRPC error; empty if nothing."""
        if self.last.finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED:
            return "the stream ended without a finish reason"
        if self.num_tokens == 0:
            return "the stream ended without a token"
        if self.num_tokens != self.last.usage.output_tokens:
            return f"{self.num_tokens} tokens came, usage says {self.last.usage.output_tokens}"
        return ""


class Client:
    """A channel to a router, with an API key where it has tenants. Use it as `async with Client(...) as client`."""

    def __init__(self, address: str, timeout_s: float, api_key: str = "") -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close()

    async def get_model(self, wait_s: float = 10.0) -> inference_pb2.GetModelResponse:
        """Waits for a router that still starts or still looks for nodes.

        Raises `grpc.aio.AioRpcError` when it does not answer with a model within `wait_s`.
        """
        deadline_s = time.perf_counter() + wait_s
        while True:
            left_s = max(0.0, deadline_s - time.perf_counter())
            try:
                model: inference_pb2.GetModelResponse = await self._stub.GetModel(
                    inference_pb2.GetModelRequest(), timeout=left_s, metadata=self._metadata, wait_for_ready=True
                )
                return model
            except grpc.aio.AioRpcError as exc:
                if exc.code() is not grpc.StatusCode.UNAVAILABLE or left_s < _ASK_AGAIN_S:
                    raise
            await asyncio.sleep(_ASK_AGAIN_S)

    async def generate(self, shot: Shot, clock: Clock) -> RequestRecord:
        """Sends one request and reads its stream to the end. A failure is in the record's `error`, never raised."""
        stream = _Stream()
        sent_s = clock()
        try:
            call = self._stub.Generate(shot.request, timeout=self._timeout_s, metadata=self._metadata)
            async for response in call:
                stream.add(response, clock())
            error = stream.fault()
        except grpc.aio.AioRpcError as exc:
            error = f"{exc.code().name}: {exc.details()}"
        usage, timeline = stream.last.usage, stream.last.timeline
        return RequestRecord(
            index=shot.index,
            scheduled_s=shot.scheduled_s,
            sent_s=sent_s,
            finished_s=clock(),
            token_times_s=tuple(stream.token_times_s),
            prompt_tokens=usage.prompt_tokens,
            output_tokens=stream.num_tokens,
            cached_tokens=usage.cached_tokens,
            local_hit_tokens=usage.local_hit_tokens,
            store_hit_tokens=usage.store_hit_tokens,
            prefill_node=timeline.prefill_node,
            decode_node=timeline.decode_node,
            migrations=timeline.migrations,
            error=error,
        )


async def measure_loop_lag(lags_s: list[float], interval_s: float = 0.01) -> None:
    """Appends, each `interval_s`, by how much a sleep of the event loop came back too late. Runs until cancelled.

    A client that is late itself measures its own lateness: figures are to be trusted only where this is small.
    """
    while True:
        due_s = time.perf_counter() + interval_s
        await asyncio.sleep(interval_s)
        lags_s.append(max(0.0, time.perf_counter() - due_s))
