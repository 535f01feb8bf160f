"""From a client's JSON to the messages that the core takes, the same ones as over gRPC. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import Message

from batonpb import common_pb2, inference_pb2
from router.errors import InvalidRequest
from router.http_grammars import hold_to_grammar, json_text
from router.http_models import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    NamedTool,
    Sampled,
    StreamOptions,
    Templated,
    TextPart,
    TokenizeRequest,
    Tool,
)
from router.validate import MAX_ANSWERS, MAX_LOGPROBS, MAX_REQUEST_ID_CHARS

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of completions; a chat goes on as long as the model's length lets it
MAX_CHOICES = 128  # prompts x n of one call
TOOL_CHOICES = {
    "auto": inference_pb2.TOOL_CHOICE_AUTO,
    "none": inference_pb2.TOOL_CHOICE_NONE,
    "required": inference_pb2.TOOL_CHOICE_REQUIRED,
}
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_SAME = (  # fields that SamplingParams has under the same name
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "ignore_eos", "include_stop_str_in_output"),
)


@dataclass(frozen=True)
class Asked:
    """One call: a message for each of its prompts, and how the answers are to be shown.

    `renamed`: how the client calls what the core calls otherwise, for errors.
    """

    messages: Sequence[inference_pb2.GenerateRequest]
    num_answers: int  # of each prompt
    num_logprobs: int | None  # alternatives to show; None: no logprobs
    is_stream: bool
    includes_usage: bool
    counts_usage: bool = False  # in each event, so far
    is_single_call: bool = False  # of tools
    echoes_logprobs: bool = False  # the prompt's, in front of the output's
    shows_prompt: bool = False  # the prompt's logprobs by themselves
    is_chat: bool = False  # which shows them beside the choices, once for all of these
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_scored(self) -> bool:
        """Whether the core tells logprobs of the prompts."""
        return self.echoes_logprobs or self.shows_prompt

    @property
    def is_large(self) -> bool:
        """Whether much may be told of each token."""
        return self.is_scored or self.num_logprobs is not None


def ask_chat(request: ChatRequest, request_id: str) -> Asked:
    """Raises `InvalidRequest`."""
    renamed = {"prompt": "messages", "logprobs": "top_logprobs"}
    message = inference_pb2.GenerateRequest(request_id=_shortened(request_id, "", request.n))
    sampling = _fill(message, request, renamed)
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        if max_tokens not in (None, request.max_completion_tokens):
            raise InvalidRequest("max_completion_tokens", f"and max_tokens differ; got max_tokens {max_tokens}")
        max_tokens, renamed["max_tokens"] = request.max_completion_tokens, "max_completion_tokens"
    if max_tokens is not None:
        sampling.max_tokens = max_tokens
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs to be true")
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    if num_logprobs is not None:
        sampling.logprobs = num_logprobs
    message.chat.CopyFrom(_chat(request.messages, request.tools))
    _set_template(message.chat, request)
    _choose_tool(message.chat, request)
    return Asked(
        [message],
        request.n or 1,
        num_logprobs,
        is_stream=bool(request.stream),
        includes_usage=_includes_usage(request),
        counts_usage=_includes_usage(request) and bool(_stream_options(request).continuous_usage_stats),
        is_single_call=request.parallel_tool_calls is False,
        shows_prompt=request.prompt_logprobs is not None,
        is_chat=True,
        renamed=renamed,
    )


def ask_completion(request: CompletionRequest, request_id: str) -> Asked:
    """Raises `InvalidRequest`."""
    renamed: dict[str, str] = {}
    shared = inference_pb2.GenerateRequest(echo=bool(request.echo))
    sampling = _fill(shared, request, renamed)
    sampling.max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if request.logprobs is not None:
        sampling.logprobs = request.logprobs
    echoes_logprobs = bool(request.echo) and request.logprobs is not None
    if echoes_logprobs and request.prompt_logprobs is None:
        renamed["prompt_logprobs"] = "logprobs"
    num_choices = len(request.prompt) * (request.n or 1)
    if num_choices > MAX_CHOICES:
        raise InvalidRequest("prompt", f"prompts times n may be {MAX_CHOICES} at most, got {num_choices}")
    messages = [_with_prompt(shared, prompt) for prompt in request.prompt]
    for index, message in enumerate(messages):  # each is a request of its own, and `baton explain` finds it
        message.request_id = _shortened(request_id, f"-{index}" if len(messages) > 1 else "", request.n)
    return Asked(
        messages,
        request.n or 1,
        request.logprobs,
        is_stream=bool(request.stream),
        includes_usage=_includes_usage(request),
        counts_usage=_includes_usage(request) and bool(_stream_options(request).continuous_usage_stats),
        echoes_logprobs=echoes_logprobs,
        shows_prompt=request.prompt_logprobs is not None,
        renamed=renamed,
    )


def ask_tokens(request: TokenizeRequest) -> inference_pb2.TokenizeRequest:
    """Raises `InvalidRequest`."""
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("prompt", "one of prompt and messages must be set")
    is_text = request.messages is None
    if request.add_special_tokens not in (None, is_text):
        raise InvalidRequest("add_special_tokens", f"must be {str(is_text).lower()} here, as requests have it")
    if request.messages is None:
        for name in Templated.model_fields:
            if getattr(request, name) not in (None, {}, name == "add_generation_prompt"):
                raise InvalidRequest(name, "goes with messages only")
        return inference_pb2.TokenizeRequest(text=request.prompt or "")
    chat = _chat(request.messages, request.tools)
    _set_template(chat, request)
    return inference_pb2.TokenizeRequest(chat=chat)


def _fill(
    message: inference_pb2.GenerateRequest, request: Sampled, renamed: dict[str, str]
) -> common_pb2.SamplingParams:
    """What all requests have in common, but for max_tokens and logprobs; returns the message's sampling."""
    message.model = request.model or ""
    message.n = request.n or 0
    message.priority = request.priority or 0
    if request.prompt_logprobs is not None and request.prompt_logprobs < 0:
        problem = f"must be in [0, {MAX_LOGPROBS}] (not all of a vocabulary), got {request.prompt_logprobs}"
        raise InvalidRequest("prompt_logprobs", problem)
    for name in ("ttft_slo_ms", "tpot_slo_ms", "prompt_logprobs"):
        _copy(message, name, getattr(request, name))
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidRequest("best_of", f"is not supported; only n, which is {request.n or 1}")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options", "needs stream to be true")
    sampling = message.sampling
    for name in _SAME:
        _copy(sampling, name, getattr(request, name))
    _copy(sampling, "top_k", 0 if request.top_k == -1 else request.top_k)
    _copy(sampling, "seed", None if request.seed is None else request.seed % 2**64)
    if request.no_stop_trim:
        sampling.include_stop_str_in_output = True
    sampling.stop_token_ids.extend(request.stop_token_ids or ())
    sampling.stop.extend([request.stop] if isinstance(request.stop, str) else request.stop or ())
    for key, bias in (request.logit_bias or {}).items():
        if not _TOKEN_ID.fullmatch(key) or int(key) >= 2**32:
            raise InvalidRequest("logit_bias", f"its names must be token ids, got {key[:32]!r}")
        sampling.logit_bias[int(key)] = bias
    hold_to_grammar(sampling, request, renamed)
    return sampling


def _shortened(request_id: str, suffix: str, n: int | None) -> str:
    """An id with a suffix, and with room for that which the core gives each of n answers."""
    room = MAX_REQUEST_ID_CHARS - len(suffix) - (len(f"-{MAX_ANSWERS - 1}") if n and n > 1 else 0)
    return request_id[:room] + suffix


def _copy(message: Message, name: str, value: object) -> None:
    if value is not None:
        setattr(message, name, value)


def _includes_usage(request: Sampled) -> bool:
    return bool(_stream_options(request).include_usage)


def _stream_options(request: Sampled) -> StreamOptions:
    return request.stream_options or StreamOptions()


def _with_prompt(shared: inference_pb2.GenerateRequest, prompt: str | list[int]) -> inference_pb2.GenerateRequest:
    message = inference_pb2.GenerateRequest()
    message.CopyFrom(shared)
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.tokens.token_ids.extend(prompt)
        message.tokens.SetInParent()
    return message


# --- chats ---


def _chat(turns: Sequence[ChatMessage], tools: Sequence[Tool] | None) -> inference_pb2.ChatPrompt:
    chat = inference_pb2.ChatPrompt()
    for index, turn in enumerate(turns):
        _add_turn(chat, turn, f"messages[{index}]")
    for tool in tools or ():
        function = tool.function
        parameters = "" if function.parameters is None else json_text(function.parameters, "tools")
        chat.tools.add(name=function.name, description=function.description or "", parameters=parameters)
    return chat


def _add_turn(chat: inference_pb2.ChatPrompt, turn: ChatMessage, name: str) -> None:
    """Templates know no developer, whose word is the system's."""
    if turn.content is None and not (turn.role == "assistant" and (turn.tool_calls or turn.refusal)):
        raise InvalidRequest(f"{name}.content", "must be set")
    if turn.role == "tool" and turn.tool_call_id is None:
        raise InvalidRequest(f"{name}.tool_call_id", "must be set where the role is tool")
    if turn.tool_calls and turn.role != "assistant":
        raise InvalidRequest(f"{name}.tool_calls", "only an assistant calls tools")
    message = chat.messages.add(
        role="system" if turn.role == "developer" else turn.role,
        content=_text(turn.content) or turn.refusal or "",
        tool_call_id=turn.tool_call_id or "",
        name=turn.name or "",
    )
    for call in turn.tool_calls or ():
        message.tool_calls.add(id=call.id, name=call.function.name, arguments=call.function.arguments)


def _text(content: str | list[TextPart] | None) -> str:
    if isinstance(content, list):
        return "\n".join(part.text for part in content)  # as vLLM joins them
    return content or ""


def _set_template(chat: inference_pb2.ChatPrompt, request: Templated) -> None:
    if request.chat_template_kwargs:
        chat.chat_template_kwargs = json_text(request.chat_template_kwargs, "chat_template_kwargs")
    _copy(chat, "reasoning_effort", request.reasoning_effort)
    _copy(chat, "add_generation_prompt", request.add_generation_prompt)
    _copy(chat, "continue_final_message", request.continue_final_message)


def _choose_tool(chat: inference_pb2.ChatPrompt, request: ChatRequest) -> None:
    choice = request.tool_choice
    if choice is None:
        return
    if not request.tools and choice not in ("none", "auto"):
        raise InvalidRequest("tool_choice", "needs tools")
    if isinstance(choice, NamedTool):
        chat.tool_choice, chat.tool_name = inference_pb2.TOOL_CHOICE_REQUIRED, choice.function.name
    else:
        chat.tool_choice = TOOL_CHOICES[choice]
    is_required = chat.tool_choice == inference_pb2.TOOL_CHOICE_REQUIRED
    chat.single_tool_call = is_required and request.parallel_tool_calls is False
