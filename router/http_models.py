"""What clients may send over HTTP: OpenAI's requests and vLLM's well-known extras, as pydantic models.

They hold shapes, and what fits a proto's numbers. Ranges are `validate.py`'s to check, for both doors; here they only
stand in the schema that `/openapi.json` shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic.config import JsonDict

from router.errors import InvalidRequest
from router.http_idle import is_idle, show_idle

MAX_PROMPTS = 128
MAX_PROMPT_TOKENS = 1 << 20
MAX_MESSAGES = 4096
MAX_PARTS = 1024


def _unicode(value: str) -> str:
    """JSON can write halves of characters, "\\ud800"; no other text can."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    return value


Text = Annotated[str, AfterValidator(_unicode)]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Uint32 = Annotated[int, Field(ge=0, lt=2**32)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
TokenIds = Annotated[list[Uint32], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
Texts = Annotated[list[Text], Field(max_length=MAX_PARTS, fail_fast=True)]
ModelT = TypeVar("ModelT", bound=BaseModel)


def _in(low: float | None, high: float | None = None) -> Any:
    """An optional field whose range the schema shows and the core checks."""
    limits: JsonDict = {} if low is None else {"minimum": low}
    return Field(default=None, json_schema_extra=limits | ({} if high is None else {"maximum": high}))


class Closed(BaseModel):
    """An object with the fields that it has, and of the types that they have: "1" is no number."""

    model_config = ConfigDict(strict=True, extra="forbid")


class TextPart(Closed):
    type: Literal["text"]
    text: Text


class FunctionCall(Closed):
    name: Text
    arguments: Text


class ToolCall(Closed):
    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # what comes out of a stream goes in again


class ChatMessage(Closed):
    """A turn. What clients send back of an answer is taken, too: refusal, annotations and so on."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_call_id: Text | None = None
    refusal: Text | None = None
    annotations: Annotated[list[Any], Field(max_length=MAX_PARTS)] | None = None
    reasoning_content: Text | None = None
    audio: None = None
    function_call: None = None


class Function(Closed):
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Closed):
    type: Literal["function"]
    function: Function


class NamedFunction(Closed):
    name: Text


class NamedTool(Closed):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Closed):
    name: Text | None = None
    description: Text | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Closed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Closed):
    """vLLM's. One of them."""

    json_: Text | dict[str, Any] | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Texts | None = None
    json_object: bool | None = None


class StreamOptions(Closed):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's; goes with include_usage
    include_obfuscation: bool | None = None


class Sampled(Closed):
    """What chats and completions have in common."""

    model_config = ConfigDict(json_schema_extra=show_idle)

    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, lt=2**32)] | None = _in(1, 16)
    seed: Seed | None = None
    stop: Text | Texts | None = None
    temperature: float | None = _in(0, 2)
    top_p: float | None = _in(None, 1)
    top_k: Int32 | None = _in(-1)
    min_p: float | None = _in(0, 1)
    repetition_penalty: float | None = _in(None, 2)
    presence_penalty: float | None = _in(-2, 2)
    frequency_penalty: float | None = _in(-2, 2)
    logit_bias: dict[str, float] | None = None
    max_tokens: Uint32 | None = _in(1)
    prompt_logprobs: Int32 | None = _in(0, 20)  # vLLM's
    min_tokens: Uint32 | None = None
    stop_token_ids: Annotated[list[Uint32], Field(max_length=1024, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None  # SGLang's name for it
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Text | dict[str, Any] | None = None
    guided_regex: Text | None = None
    guided_choice: Texts | None = None
    regex: Text | None = None  # SGLang's names for guided_regex and guided_json
    json_schema: Text | dict[str, Any] | None = None
    priority: Int32 | None = _in(-100, 100)
    ttft_slo_ms: Uint32 | None = _in(1)
    tpot_slo_ms: Uint32 | None = _in(1)
    best_of: Uint32 | None = None
    request_id: Text | None = None  # vLLM's; X-Request-Id goes before it
    rid: Text | None = None  # SGLang's, likewise


class Templated(Closed):
    """How messages are set in the chat template."""

    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatRequest(Sampled, Templated):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Uint32 | None = _in(1)
    logprobs: bool | None = None
    top_logprobs: Uint32 | None = _in(0, 20)
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    echo: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None  # the template writes them


def _prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [_unicode(value)]
    if isinstance(value, list) and value:
        if type(value[0]) is int:
            return [_token_ids(value)]
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"may hold {MAX_PROMPTS} prompts at most, got {len(value)}")
        if all(isinstance(item, str) for item in value):
            return [_unicode(item) for item in value]
        if all(isinstance(item, list) for item in value):
            return [_token_ids(item) for item in value]
    raise ValueError("must be a string, strings, token ids or lists of token ids, and not empty")


def _token_ids(value: list[Any]) -> list[int]:
    if len(value) > MAX_PROMPT_TOKENS:
        raise ValueError(f"may have {MAX_PROMPT_TOKENS} tokens at most, got {len(value)}")
    if not all(type(item) is int and 0 <= item < 2**32 for item in value):
        raise ValueError("token ids must be integers in [0, 2^32)")
    return value


_IDS: JsonDict = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}}
_STRING: JsonDict = {"type": "string", "minLength": 1}
_STRINGS: JsonDict = {"type": "array", "items": _STRING, "minItems": 1, "maxItems": MAX_PROMPTS}
_MANY_IDS: JsonDict = {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS}
Prompts = Annotated[
    list[Any],
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [_STRING, _STRINGS, _IDS | {"minItems": 1}, _MANY_IDS]}),
]


class CompletionRequest(Sampled):
    prompt: Prompts
    max_tokens: Uint32 | None = _in(0)  # 0 with echo or prompt_logprobs
    logprobs: Uint32 | None = _in(0, 20)
    echo: bool | None = None
    add_special_tokens: Literal[True] | None = None


class TokenizeRequest(Templated):
    """vLLM's; one of `prompt` and `messages`."""

    model_config = ConfigDict(json_schema_extra=show_idle)

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Closed):
    model: Text | None = None
    tokens: TokenIds


def read(kind: type[ModelT], body: dict[str, Any]) -> ModelT:
    """The request in a JSON object. Raises `InvalidRequest`, which names the field as JSON has it."""
    given = {name: value for name, value in body.items() if name in kind.model_fields or not is_idle(name, value)}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        first = max(found, key=lambda one: _depth(one["loc"]))  # of a union's kinds, the one that fitted best
        problem = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            problem = f"{str(first['loc'][-1])[:64]!r} is no field that is known here"
        raise InvalidRequest(_name(first["loc"]), problem[:1].lower() + problem[1:]) from None


def _names(models: Iterable[type[BaseModel]]) -> frozenset[str]:
    fields = [(name, field) for model in models for name, field in model.model_fields.items()]
    return frozenset(field.alias or name for name, field in fields)


_MODELS: tuple[type[BaseModel], ...] = (
    *(ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, ChatMessage, TextPart, ToolCall),
    *(FunctionCall, Tool, Function, NamedTool, ResponseFormat, JsonSchema, StructuredOutputs, StreamOptions),
)
_FIELDS = _names(_MODELS)


def _name(loc: tuple[int | str, ...]) -> str:
    """messages[0].content of pydantic's place of an error, which also tells which kind of a union it tried."""
    name = ""
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part in _FIELDS or not name:
            name += f".{part}" if name else part
    return name


def _depth(loc: tuple[int | str, ...]) -> int:
    return sum(isinstance(part, int) or part in _FIELDS for part in loc)
