"""Checks a client's request before anything is spent on it. Pure: knows no tokenizer and no cluster.

What needs the model (the prompt's length in tokens, token ids within the vocabulary) is checked once it is known, by
`check_tokens`. Bytes off the wire are parsed here too, because a text that is no UTF-8 must name its field.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from batonpb import common_pb2, inference_pb2
from router.errors import InvalidRequest
from router.limits import MAX_PRIORITY
from router.validate_chat import Chat, check_chat

MAX_REQUEST_ID_CHARS = 128
MAX_ANSWERS = 16
MAX_TOKEN_IDS = 1 << 20  # to make text of at once
MAX_STOP_IDS = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 1 << 17  # tokens of a prompt times what is told of each: bounds an answer to about a megabyte
MAX_BIASES = 300
MAX_BIAS = 100

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Limits:
    """Sizes that a request may have; both in bytes."""

    max_message_bytes: int = 16 * 2**20
    max_prompt_bytes: int = 4 * 2**20  # of a text prompt in UTF-8, or of all of a chat's messages together


@dataclass(frozen=True)
class CheckedRequest:
    """A request whose shape is sound. Exactly one of `text`, `token_ids` and `chat` is set."""

    model: str  # empty: whatever is served
    request_id: str  # empty: the router makes one
    sampling: common_pb2.SamplingParams  # seed and max_tokens may still be unset
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    chat: Chat | None = None
    num_answers: int = 1
    echo: bool = False  # the prompt's text comes first
    priority: int = 0  # the smaller one is computed first
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    prompt_logprobs: int | None = None  # alternatives of each of the prompt's tokens; None: not even their own

    @property
    def is_silent(self) -> bool:
        """No token of output is wanted."""
        return self.sampling.HasField("max_tokens") and self.sampling.max_tokens == 0


def parse(body: bytes, limits: Limits, kind: type[M]) -> M:
    """The message of that kind in `body`. Raises `InvalidRequest` for one too large, no UTF-8 or no such message."""
    size, most = len(body), limits.max_message_bytes
    _check(size <= most, "message", f"{most} bytes at most, got {size}")
    try:
        return kind.FromString(body)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        for field in _invalid_texts(body, name):
            raise InvalidRequest(field, "must be valid UTF-8") from None
        raise InvalidRequest("message", f"is no {name}") from None


def check(request: inference_pb2.GenerateRequest, limits: Limits) -> CheckedRequest:
    """A sound request, or `InvalidRequest`."""
    check_answers(request)
    asks_of_prompt = request.echo or request.HasField("prompt_logprobs")
    check_sampling(request.sampling, min_max_tokens=0 if asks_of_prompt else 1)
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    prompt = check_prompt(request, limits)
    in_range = abs(request.priority) <= MAX_PRIORITY
    _check(in_range, "priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], got {request.priority}")
    for name in ("ttft_slo_ms", "tpot_slo_ms"):
        if request.HasField(name):
            _check(getattr(request, name) >= 1, name, "must be at least 1, got 0")
    return CheckedRequest(
        request.model,
        request.request_id,
        sampling,
        num_answers=request.n or 1,
        echo=request.echo,
        priority=request.priority,
        ttft_slo_s=request.ttft_slo_ms / 1000 if request.HasField("ttft_slo_ms") else None,
        tpot_slo_s=request.tpot_slo_ms / 1000 if request.HasField("tpot_slo_ms") else None,
        prompt_logprobs=_num_prompt_logprobs(request),
        **prompt,
    )


def _num_prompt_logprobs(request: inference_pb2.GenerateRequest) -> int | None:
    if request.HasField("prompt_logprobs"):
        got = request.prompt_logprobs
        _check(got <= MAX_LOGPROBS, "prompt_logprobs", f"must be in [0, {MAX_LOGPROBS}], got {got}")
        return got
    return request.sampling.logprobs if request.echo and request.sampling.HasField("logprobs") else None


def check_answers(request: inference_pb2.GenerateRequest) -> None:
    """How many answers, by which name, with or without the prompt in front."""
    _check(request.n <= MAX_ANSWERS, "n", f"must be in [1, {MAX_ANSWERS}], got {request.n}")
    length = len(request.request_id)
    longest = MAX_REQUEST_ID_CHARS if request.n <= 1 else MAX_REQUEST_ID_CHARS - len(f"-{MAX_ANSWERS - 1}")
    _check(
        length <= longest,
        "request_id",
        f"{longest} characters at most{' with n' if request.n > 1 else ''}, got {length}",
    )
    _check(request.request_id.isprintable(), "request_id", "must have printable characters only")
    if request.echo:
        _check(request.WhichOneof("prompt") != "chat", "echo", "goes with a text or token prompt only")


def check_detokenize(request: inference_pb2.DetokenizeRequest, vocab_size: int) -> list[int]:
    """The tokens to make text of, or `InvalidRequest`."""
    count = len(request.token_ids)
    _check(count <= MAX_TOKEN_IDS, "token_ids", f"{MAX_TOKEN_IDS} at most, got {count}")
    token_ids = list(request.token_ids)
    _check_vocabulary("token_ids", token_ids, vocab_size)
    return token_ids


def check_model(asked: str, served: str) -> None:
    """Raises `InvalidRequest` for a model that is not served here."""
    _check(asked in ("", served), "model", f"{served!r} is the model served here, got {asked[:128]!r}")


def check_priority(priority: int, least: int) -> None:
    """Raises `InvalidRequest` for a request that would go before others and may not: `least` is its tenant's."""
    _check(priority >= least, "priority", f"must be at least {least} for this tenant, got {priority}")


def check_sampling(sampling: common_pb2.SamplingParams, min_max_tokens: int = 1) -> None:
    """Ranges of `SamplingParams`. A value that is not a number is in no range. Grammars are `router.grammar`'s."""

    def check(name: str, ok: bool, limit: str) -> None:
        if sampling.HasField(name):
            _check(ok, f"sampling.{name}", f"must be {limit}, got {getattr(sampling, name):.6g}")

    check("temperature", 0.0 <= sampling.temperature <= 2.0, "in [0, 2]")
    check("top_k", sampling.top_k >= 0, "at least 0")
    check("top_p", 0.0 < sampling.top_p <= 1.0, "in (0, 1]")
    check("min_p", 0.0 <= sampling.min_p <= 1.0, "in [0, 1]")
    check("repetition_penalty", 0.0 < sampling.repetition_penalty <= 2.0, "in (0, 2]")
    check("presence_penalty", -2.0 <= sampling.presence_penalty <= 2.0, "in [-2, 2]")
    check("frequency_penalty", -2.0 <= sampling.frequency_penalty <= 2.0, "in [-2, 2]")
    check("max_tokens", sampling.max_tokens >= min_max_tokens, "at least 1 (0 with echo or prompt_logprobs)")
    check("logprobs", sampling.logprobs <= MAX_LOGPROBS, f"in [0, {MAX_LOGPROBS}]")
    if sampling.HasField("max_tokens"):
        _check_min_tokens(sampling)
    _check(not sampling.HasField("lark"), "sampling.grammar.lark", "is the router's own to set")
    count = len(sampling.stop_token_ids)
    _check(count <= MAX_STOP_IDS, "sampling.stop_token_ids", f"{MAX_STOP_IDS} ids at most, got {count}")
    _check(len(sampling.stop) <= MAX_STOPS, "sampling.stop", f"{MAX_STOPS} strings at most, got {len(sampling.stop)}")
    for stop in sampling.stop:
        _check(1 <= len(stop) <= MAX_STOP_CHARS, "sampling.stop", f"1 to {MAX_STOP_CHARS} characters, got {len(stop)}")
    count = len(sampling.logit_bias)
    _check(count <= MAX_BIASES, "sampling.logit_bias", f"{MAX_BIASES} ids at most, got {count}")
    for token_id, bias in sampling.logit_bias.items():
        in_range = abs(bias) <= MAX_BIAS
        limit = f"must be in [-{MAX_BIAS}, {MAX_BIAS}]"
        _check(in_range, "sampling.logit_bias", f"{limit}, got {bias:.6g} for token {token_id}")


def check_length(num_prompt_tokens: int, max_model_len: int, is_bound: bool = False) -> None:
    """Raises `InvalidRequest` for a prompt that leaves no room for an output token. `is_bound`: it may be longer."""
    limit = f"{max_model_len - 1} tokens at most (the model takes {max_model_len} with its output)"
    got = f"{'at least ' if is_bound else ''}{num_prompt_tokens}"
    _check(num_prompt_tokens < max_model_len, "prompt", f"{limit}, got {got}")


def check_scores(num_prompt_tokens: int, num_top: int) -> None:
    """Raises `InvalidRequest` for a prompt with more logprobs than one answer may have."""
    count = num_prompt_tokens * (num_top + 1)
    problem = f"prompt tokens times it and one more may be {MAX_PROMPT_LOGPROBS} at most, got {count}"
    _check(count <= MAX_PROMPT_LOGPROBS, "prompt_logprobs", problem)


def check_tokens(
    token_ids: list[int],
    sampling: common_pb2.SamplingParams,
    max_model_len: int,
    vocab_size: int,
    *,
    is_in_vocabulary: bool = False,
) -> common_pb2.SamplingParams:
    """`sampling` with max_tokens set to what the model's length leaves at most. Raises `InvalidRequest`.

    `is_in_vocabulary`: that much of `token_ids` is known.
    """
    _check(len(token_ids) > 0, "prompt", "must not be empty")
    check_length(len(token_ids), max_model_len)
    room = max_model_len - len(token_ids)
    if not is_in_vocabulary:
        _check_vocabulary("prompt", token_ids, vocab_size)
    _check_vocabulary("sampling.stop_token_ids", list(sampling.stop_token_ids), vocab_size)
    _check_vocabulary("sampling.logit_bias", list(sampling.logit_bias), vocab_size)
    bounded = common_pb2.SamplingParams()
    bounded.CopyFrom(sampling)
    # A node makes one token at least, which the client does not see where it wants none.
    bounded.max_tokens = min(max(1, sampling.max_tokens), room) if sampling.HasField("max_tokens") else room
    _check_min_tokens(bounded)
    return bounded


def check_prompt(
    request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, limits: Limits
) -> dict[str, Any]:
    """The field of `CheckedRequest` that holds the prompt, or `InvalidRequest`."""
    kind = request.WhichOneof("prompt")
    if kind == "text":
        _check(bool(request.text), "prompt.text", "must not be empty")
        _check_bytes("prompt.text", len(request.text.encode()), limits)
        return {"text": request.text}
    if kind == "chat":
        return {"chat": check_chat(request.chat, limits.max_prompt_bytes)}
    if kind == "tokens" and isinstance(request, inference_pb2.GenerateRequest):
        _check(bool(request.tokens.token_ids), "prompt.tokens", "must not be empty")
        return {"token_ids": tuple(request.tokens.token_ids)}
    known = [field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
    raise InvalidRequest("prompt", f"one of {', '.join(known[:-1])} and {known[-1]} must be set")


def _check_bytes(field: str, size: int, limits: Limits) -> None:
    _check(size <= limits.max_prompt_bytes, field, f"{limits.max_prompt_bytes} bytes at most, got {size}")


def _check_min_tokens(sampling: common_pb2.SamplingParams) -> None:
    got, most = sampling.min_tokens, sampling.max_tokens
    _check(got <= most, "sampling.min_tokens", f"must be in [0, {most}] (max_tokens, or what is left), got {got}")


def _check_vocabulary(field: str, token_ids: list[int], vocab_size: int) -> None:
    largest = max(token_ids, default=0)
    _check(largest < vocab_size, field, f"token ids must be below {vocab_size} (the vocabulary), got {largest}")


def _check(ok: bool, field: str, problem: str) -> None:
    if not ok:
        raise InvalidRequest(field, problem)


def _invalid_texts(body: bytes, name: str) -> Iterator[str]:
    """Paths of the fields of a message of that name in `body` that hold no UTF-8."""
    try:
        message = _bytes_twin(name).FromString(body)
    except DecodeError:
        return
    yield from _not_utf8(message)


def _not_utf8(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        choice = field.containing_oneof  # a prompt's field is called prompt.text, as everywhere here
        name = f"{choice.name}.{field.name}" if choice and not choice.name.startswith("_") else field.name
        for item in value if field.is_repeated else (value,):
            if isinstance(item, Message):
                yield from (f"{name}.{path}" for path in _not_utf8(item))
            elif isinstance(item, bytes) and not _is_utf8(item):
                yield name


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@functools.cache
def _bytes_twin(name: str) -> type[Message]:
    """A message with `bytes` in the place of each `string`: the same on the wire, and never refused for UTF-8."""
    pool = descriptor_pool.DescriptorPool()
    for module in (common_pb2, inference_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        for field in (field for message in file.message_type for field in message.field):
            if field.type == field.TYPE_STRING:
                field.type = field.TYPE_BYTES
        pool.Add(file)
    twin: type[Message] = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
    return twin
