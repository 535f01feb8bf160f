"""The Decode service: messages in and out, in order. The worker does the work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

import grpc

from batonpb import common_pb2, node_pb2, node_pb2_grpc
from decode_node.worker import DecodeLeg, DecodeWorker
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.request import OutputToken
from node.convert import (
    FINISH_REASONS,
    note_trace,
    prompt_logprobs_of,
    started_with,
    statuses,
    to_owner,
    to_request,
    to_token,
)
from node.grammar import GrammarMasks

ADMIT_WAIT_S = 10.0
KEEP_S = 60.0  # how long a call without a leg waits for the next one


class DecodeService(node_pb2_grpc.DecodeServicer):
    """One node's decode legs. `start_wait_s` is how long a leg keeps its room without a Start."""

    def __init__(self, worker: DecodeWorker, engine: Engine, masks: GrammarMasks, start_wait_s: float) -> None:
        self._worker = worker
        self._engine = engine
        self._masks = masks
        self._start_wait_s = start_wait_s

    async def Decode(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """A coroutine that writes, not a generator: only then its clean-up is sure to run when the caller is gone."""
        async with statuses(context):
            message: node_pb2.DecodeRequest | None = await _read(context, "admit", ADMIT_WAIT_S)
            while message is not None:
                await self._run(context, message.admit)
                message = await _next(context)

    async def _run(self, context: grpc.aio.ServicerContext, admit: node_pb2.Admit) -> None:
        """Runs one leg of a call."""
        note_trace(context, admit.request.request_id)
        mask = await self._masks.mask(admit.request.sampling)
        request = to_request(admit.request, self._engine, mask=mask)
        owner = to_owner(admit.request, self._engine.layout.block_bytes)
        async with self._worker.admit(request, owner) as leg:
            await context.write(_admitted(leg))
            start = node_pb2.Start()
            if not admit.runs_alone:
                start = (await _read(context, "start", self._start_wait_s)).start
            token_ids = started_with(start.tokens, request, self._engine)
            is_first, is_told = True, False
            async for tokens in leg.run(token_ids, start.coming_blocks):
                message = _tokens(leg, tokens, is_first)
                is_first, is_told = False, bool(message.tokens.finish_reason)
                await context.write(message)
            if not is_told:
                await context.write(_finished(leg))


async def _read(
    context: grpc.aio.ServicerContext, expected: Literal["admit", "start"], wait_s: float
) -> node_pb2.DecodeRequest:
    """The next message, which must be `expected`. Raises `InvalidRequest`, `TimeoutError`."""
    try:
        async with asyncio.timeout(wait_s):
            message: node_pb2.DecodeRequest = await context.read()
    except TimeoutError:
        raise TimeoutError(f"{expected}: did not come within {wait_s} s") from None
    _check_kind(message, expected)
    return message


async def _next(context: grpc.aio.ServicerContext) -> node_pb2.DecodeRequest | None:
    """The Admit of a call's next leg; None if none comes."""
    try:
        async with asyncio.timeout(KEEP_S):
            message: node_pb2.DecodeRequest = await context.read()
    except TimeoutError:
        return None
    if message is grpc.aio.EOF:
        return None
    _check_kind(message, "admit")
    return message


def _check_kind(message: node_pb2.DecodeRequest, expected: Literal["admit", "start"]) -> None:
    got = "the end of the stream" if message is grpc.aio.EOF else message.WhichOneof("message")
    if got != expected:
        place = "first" if expected == "admit" else "second"
        raise InvalidRequest(expected, f"must be the {place} message of a leg, got {got}")


def _admitted(leg: DecodeLeg) -> node_pb2.DecodeResponse:
    return node_pb2.DecodeResponse(admitted=node_pb2.Admitted(free_blocks=leg.free_blocks))


def _tokens(leg: DecodeLeg, tokens: Sequence[OutputToken], is_first: bool) -> node_pb2.DecodeResponse:
    message = node_pb2.Tokens(
        tokens=[to_token(token) for token in tokens],
        local_hit_tokens=leg.request.num_local_hit_tokens + leg.request.num_late_hit_tokens,
        store_hit_tokens=leg.request.num_store_hit_tokens,
        compute_s=leg.compute_s,
        queue_s=leg.queue_s,
        fetch_s=min(leg.fetch_s, leg.queue_s),
        prompt_logprobs=prompt_logprobs_of(leg.request) if is_first else None,
        finish_reason=_finish_reason(leg),
    )
    return node_pb2.DecodeResponse(tokens=message)


def _finished(leg: DecodeLeg) -> node_pb2.DecodeResponse:
    return node_pb2.DecodeResponse(finished=node_pb2.Finished(finish_reason=_finish_reason(leg)))


def _finish_reason(leg: DecodeLeg) -> common_pb2.FinishReason:
    if leg.finish_reason is None:
        return common_pb2.FINISH_REASON_UNSPECIFIED
    return FINISH_REASONS[leg.finish_reason]
