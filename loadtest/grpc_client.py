"""Requests over Baton's gRPC API. Knows the proto; knows no arrival process and no statistics."""

from __future__ import annotations

import asyncio
import time

import grpc

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc
from loadtest.exchange import DEFAULT_SAMPLING, Ask, ModelInfo, Sampling, SendError, Stream, Target

_CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_ASK_AGAIN_S = 0.05
_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
}
_BAD_TEMPERATURE = 1e9


def _open_channel(target: Target) -> grpc.aio.Channel:
    """Raises OSError for a file that cannot be read; whether they match shows only at the first call."""
    tls = target.tls
    if tls is None:
        return grpc.aio.insecure_channel(target.address, options=_CHANNEL_OPTIONS)
    ca, key, cert = (file and file.read_bytes() for file in (tls.ca, tls.key, tls.cert))
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    name = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return grpc.aio.secure_channel(target.address, credentials, options=_CHANNEL_OPTIONS + name)


class GrpcClient:
    """A channel to a router.

    Prompts of token ids are sent as they are, with the parts of a conversation concatenated, so that each turn's prompt
    starts with the tokens of the turn before and of its answer; text likewise.
    """

    def __init__(self, target: Target, sampling: Sampling = DEFAULT_SAMPLING) -> None:
        self.target = target
        self._channel = _open_channel(target)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {target.api_key}"),) if target.api_key else None
        self._sampling = sampling

    async def __aenter__(self) -> GrpcClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close()

    async def get_model(self, wait_s: float = 10.0) -> ModelInfo:
        """Waits for a router that is still starting or still looking for nodes.

        Raises `SendError` when it does not answer with a model within `wait_s`.
        """
        deadline_s = time.perf_counter() + wait_s
        while True:
            left_s = max(0.0, deadline_s - time.perf_counter())
            try:
                model: inference_pb2.GetModelResponse = await self._stub.GetModel(
                    inference_pb2.GetModelRequest(), timeout=left_s, metadata=self._metadata, wait_for_ready=True
                )
                return ModelInfo(model.model, model.max_model_len, model.vocab_size)
            except grpc.aio.AioRpcError as exc:
                if exc.code() is not grpc.StatusCode.UNAVAILABLE or left_s < _ASK_AGAIN_S:
                    raise _error(exc) from None
            await asyncio.sleep(_ASK_AGAIN_S)

    def encode(self, ask: Ask) -> inference_pb2.GenerateRequest:
        """The request as a message."""
        sampling = self._sampling
        request = inference_pb2.GenerateRequest(
            sampling=common_pb2.SamplingParams(
                temperature=sampling.temperature,
                seed=ask.seed,
                max_tokens=ask.output_tokens,
                ignore_eos=sampling.ignore_eos,
            ),
            ttft_slo_ms=sampling.ttft_slo_ms,
            tpot_slo_ms=sampling.tpot_slo_ms,
        )
        for message in ask.messages:
            if isinstance(message.content, str):
                request.text += message.content
            else:
                request.tokens.token_ids.extend(message.content)
        return request

    def encode_malformed(self) -> inference_pb2.GenerateRequest:
        """No prompt, and a temperature out of range. (Bytes that are not a message are refused by gRPC itself.)"""
        return inference_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(temperature=_BAD_TEMPERATURE))

    def encode_oversized(self, num_bytes: int) -> inference_pb2.GenerateRequest:
        """A text of `num_bytes`."""
        return inference_pb2.GenerateRequest(text="x" * num_bytes, sampling=common_pb2.SamplingParams(max_tokens=1))

    async def send(self, request: inference_pb2.GenerateRequest, stream: Stream) -> None:
        """Raises `SendError`, also for a stream that ended incomplete."""
        call = self._stub.Generate(request, timeout=self.target.timeout_s or None, metadata=self._metadata)
        last = inference_pb2.GenerateResponse()
        try:
            async for last in call:
                if last.tokens:
                    stream.add(len(last.tokens), last.text, tuple(token.token_id for token in last.tokens))
                elif last.text:
                    stream.texts.append(last.text)
                if stream.enough:
                    return
                await stream.pause()
        except grpc.aio.AioRpcError as exc:
            raise _error(exc) from None
        finally:
            call.cancel()
        _finish(stream, last)


def _finish(stream: Stream, last: inference_pb2.GenerateResponse) -> None:
    """Takes the last message's fields; raises `SendError` if the stream is inconsistent."""
    if last.finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED:
        raise SendError("the stream ended without a finish reason")
    if stream.num_tokens == 0:
        raise SendError("the stream ended without a token")
    usage, timeline = last.usage, last.timeline
    if stream.num_tokens != usage.output_tokens:
        raise SendError(f"{stream.num_tokens} tokens came, usage says {usage.output_tokens}")
    stream.prompt_tokens = usage.prompt_tokens
    stream.cached_tokens = usage.cached_tokens
    stream.local_hit_tokens = usage.local_hit_tokens
    stream.store_hit_tokens = usage.store_hit_tokens
    stream.prefill_node, stream.decode_node = timeline.prefill_node, timeline.decode_node
    stream.migrations = timeline.migrations


def _error(error: grpc.aio.AioRpcError) -> SendError:
    return SendError(f"{error.code().name}: {error.details()}", refused=error.code() in _REFUSALS)
