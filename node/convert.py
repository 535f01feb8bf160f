"""Conversion between messages and the engine's data: requests in, tokens out, errors to gRPC statuses; only here.

Nothing in a message is trusted: lengths and ranges are checked before anything is built from them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from batonpb import common_pb2, node_pb2
from engine.engine import Engine
from engine.errors import InvalidRequest, NoRoom
from engine.loop import EngineStopped
from engine.mask import TokenMask
from engine.order import MAX_PRIORITY
from engine.request import MAX_LOGPROBS, FinishReason, OutputToken, PromptLogprobs, Request, SamplingParams
from kvstore.blocks import salted
from kvstore.quotas import Owner
from node.errors import Busy, Draining

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 128
MAX_SALT_BYTES = 256
MAX_PROMPT_LOGPROBS = 1 << 17  # prompt tokens times (alternatives + 1): an answer of about a megabyte
OPTIONAL_SAMPLING: tuple[str, ...] = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
OPTIONAL_SAMPLING += ("presence_penalty", "frequency_penalty", "seed", "max_tokens", "logprobs")

FINISH_REASONS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.HANDOFF: common_pb2.FINISH_REASON_UNSPECIFIED,  # this leg is over, the request is not
}

# A request may be on a node twice: both legs, or a retry while the first attempt is still being cleaned up.
_leg_numbers = itertools.count()


def to_request(
    message: node_pb2.NodeRequest, engine: Engine, handoff_after: int | None = None, mask: TokenMask | None = None
) -> Request:
    """The engine's request for one leg, under an id of its own. Raises `InvalidRequest`.

    `mask` is that of the sampling's grammar (`node.grammar`). Only the engine's dimensions are used; whether the tokens
    are in its vocabulary is checked by `Engine.add`.
    """
    _check(0 < len(message.request_id) <= MAX_REQUEST_ID_CHARS, "request_id", f"1 to {MAX_REQUEST_ID_CHARS} characters")
    _check(len(message.salt) <= MAX_SALT_BYTES, "salt", f"{MAX_SALT_BYTES} bytes at most, got {len(message.salt)}")
    num_tokens, num_prompt_tokens = len(message.token_ids), message.num_prompt_tokens
    _check(num_tokens > 0, "token_ids", "must not be empty")
    longest = engine.max_model_len - 1  # leaves room for one output token
    _check(num_tokens <= longest, "token_ids", f"{longest} tokens at most, got {num_tokens}")
    in_range = 1 <= num_prompt_tokens <= num_tokens
    _check(in_range, "num_prompt_tokens", f"must be in [1, {num_tokens}], got {num_prompt_tokens}")
    in_range = abs(message.priority) <= MAX_PRIORITY
    _check(in_range, "priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], got {message.priority}")
    params = to_sampling_params(message.sampling)
    scores = _to_prompt_logprobs(message, engine.vocab_size) if message.HasField("prompt_logprobs") else None
    num_output_tokens = num_tokens - num_prompt_tokens
    problem = f"{num_output_tokens} outputs are there, and sampling.max_tokens = {params.max_tokens}"
    _check(num_output_tokens < params.max_tokens, "token_ids", problem)
    return Request(
        request_id=f"{message.request_id}/{next(_leg_numbers)}",
        token_ids=list(message.token_ids),
        num_prompt_tokens=num_prompt_tokens,
        params=params,
        root=salted(engine.layout.root(), message.salt),
        block_size=engine.layout.block_size,
        handoff_after=handoff_after,
        priority=message.priority,
        mask=mask,
        prompt_logprobs=scores,
    )


def _to_prompt_logprobs(message: node_pb2.NodeRequest, vocab_size: int) -> PromptLogprobs:
    num_top = message.prompt_logprobs
    _check(num_top <= MAX_LOGPROBS, "prompt_logprobs", f"must be in [0, {MAX_LOGPROBS}], got {num_top}")
    count = message.num_prompt_tokens * (num_top + 1)
    problem = f"prompt tokens times it and one more: {MAX_PROMPT_LOGPROBS} at most, got {count}"
    _check(count <= MAX_PROMPT_LOGPROBS, "prompt_logprobs", problem)
    return PromptLogprobs(min(num_top, vocab_size))


def to_owner(message: node_pb2.NodeRequest, block_bytes: int) -> Owner:
    """The owner of the request's blocks in an arena, and how many blocks its quota allows."""
    quota_bytes = message.kv_quota_bytes
    return Owner.of_salt(message.salt, quota_bytes // block_bytes if quota_bytes else None)


def to_sampling_params(message: common_pb2.SamplingParams) -> SamplingParams:
    """Raises `InvalidRequest` without seed or max_tokens: a router sets both, or a failover would change the text."""
    for name in ("seed", "max_tokens"):
        _check(message.HasField(name), f"sampling.{name}", "must be set")
    given: dict[str, Any] = {name: getattr(message, name) for name in OPTIONAL_SAMPLING if message.HasField(name)}
    return SamplingParams(
        **given,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=tuple(sorted(message.logit_bias.items())),
    )


def started_with(tokens: Sequence[common_pb2.Token], request: Request, engine: Engine) -> list[int]:
    """The ids of tokens sampled elsewhere that precede this leg's first. Raises `InvalidRequest`.

    They must not end the request, or there would be nothing left to run.
    """
    token_ids = [token.token_id for token in tokens]
    bad = next((token_id for token_id in token_ids if token_id >= engine.vocab_size), None)
    _check(bad is None, "start.tokens", f"token ids must be below {engine.vocab_size}, got {bad}")
    longest = min(engine.max_model_len, request.num_prompt_tokens + request.params.max_tokens) - 1
    problem = f"{longest - request.num_tokens} at most, for one must be left to compute; got {len(token_ids)}"
    _check(request.num_tokens + len(token_ids) <= longest, "start.tokens", problem)
    return token_ids


def to_token(token: OutputToken) -> common_pb2.Token:
    if token.logprob is None:
        return common_pb2.Token(token_id=token.token_id)
    top = [common_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top]
    return common_pb2.Token(token_id=token.token_id, logprobs=common_pb2.TokenLogprobs(logprob=token.logprob, top=top))


def prompt_logprobs_of(request: Request) -> common_pb2.PromptLogprobs | None:
    """The prompt logprobs of a request that has its first token; None if they were not requested."""
    scores = request.prompt_logprobs
    if scores is None:
        return None
    return common_pb2.PromptLogprobs(
        token_ids=request.token_ids[: request.num_prompt_tokens],
        logprobs=scores.logprobs,
        ranks=scores.ranks,
        num_top=scores.num_top,
        top_token_ids=scores.top_ids,
        top_logprobs=scores.top_logprobs,
    )


def note_trace(context: grpc.aio.ServicerContext, request_id: str) -> None:
    """Logs a line that connects a leg with the trace that its call came with (W3C traceparent)."""
    if logger.isEnabledFor(logging.INFO):
        given = dict(context.invocation_metadata() or ()).get("traceparent")
        if isinstance(given, str) and len(given) == 55 and given.isprintable():
            logger.info("event=leg request_id=%s trace_id=%s", request_id, given[3:35])


@asynccontextmanager
async def statuses(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Ends the call with the status code of the error that the body raises."""
    try:
        yield
    except InvalidRequest as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except (NoRoom, Busy) as error:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    except Draining as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except EngineStopped as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
    except TimeoutError as error:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        logger.exception("event=call_failed")
        await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")


def _check(ok: bool, field: str, problem: str) -> None:
    if not ok:
        raise InvalidRequest(field, problem)
