"""Checks a chat and its tools, and converts them to the form that chat templates take. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from batonpb import inference_pb2
from router.errors import InvalidRequest
from router.tokenizer import PLAIN, Setting
from router.tools import NAME, parse_object

MAX_ROLE_CHARS = 64
MAX_NAME_CHARS = 64  # of who speaks
MAX_CALL_ID_CHARS = 64
MAX_CALLS = 128  # of one message
MAX_TOOLS = 128
FIELD = "prompt.chat"
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}  # of a tool that names none
MAX_VARIABLES_BYTES = 1 << 14
VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
# What a template is given anyway, and what it calls. Names of special tokens end in `_token`.
OTHERS = frozenset(
    "messages tools documents add_generation_prompt continue_final_message raise_exception strftime_now "
    "range dict lipsum cycler joiner namespace self super caller varargs kwargs loop".split()
)
EFFORT = "reasoning_effort"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class Chat:
    """Messages and tools in the form that `transformers` gives to templates."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()  # also empty if the model must not see them
    is_required: bool = False  # at least one call is required
    tool_name: str = ""  # the only tool that may be called in that case; empty: any
    is_single: bool = False  # exactly one call then
    setting: Setting = PLAIN  # in the chat template


def check_chat(prompt: inference_pb2.ChatPrompt, max_bytes: int) -> Chat:
    """The checked chat. Raises `InvalidRequest`. `max_bytes` bounds all texts in it together, as UTF-8."""
    _check(bool(prompt.messages), "messages", "must not be empty")
    for message in prompt.messages:
        _check_message(message)
    _check_tools(prompt)
    size = _num_bytes(prompt)
    if size > max_bytes:
        raise InvalidRequest(FIELD, f"{max_bytes} bytes at most, got {size}")
    is_hidden = prompt.tool_choice == inference_pb2.TOOL_CHOICE_NONE
    return Chat(
        messages=tuple(_message(message) for message in prompt.messages),
        tools=() if is_hidden else tuple(_tool(tool) for tool in prompt.tools),
        is_required=prompt.tool_choice == inference_pb2.TOOL_CHOICE_REQUIRED,
        tool_name=prompt.tool_name,
        is_single=prompt.single_tool_call or bool(prompt.tool_name),
        setting=_setting(prompt),
    )


def _check_message(message: inference_pb2.ChatMessage) -> None:
    _check(1 <= len(message.role) <= MAX_ROLE_CHARS, "messages.role", f"must have 1 to {MAX_ROLE_CHARS} characters")
    _check_length("messages.name", message.name, MAX_NAME_CHARS)
    _check_length("messages.tool_call_id", message.tool_call_id, MAX_CALL_ID_CHARS)
    _check(not message.tool_call_id or message.role == "tool", "messages.tool_call_id", "goes with role 'tool' only")
    calls = message.tool_calls
    _check(not calls or message.role == "assistant", "messages.tool_calls", "go with role 'assistant' only")
    _check(len(calls) <= MAX_CALLS, "messages.tool_calls", f"{MAX_CALLS} at most, got {len(calls)}")
    for call in calls:
        _check_length("messages.tool_calls.id", call.id, MAX_CALL_ID_CHARS)
        _check_name("messages.tool_calls.name", call.name)


def _check_tools(prompt: inference_pb2.ChatPrompt) -> None:
    tools, choice = prompt.tools, prompt.tool_choice
    _check(len(tools) <= MAX_TOOLS, "tools", f"{MAX_TOOLS} at most, got {len(tools)}")
    names = [tool.name for tool in tools]
    for name in names:
        _check_name("tools.name", name)
    twice = next((name for name in names if names.count(name) > 1), None)
    _check(twice is None, "tools.name", f"{twice!r} is there twice")
    _check(choice in inference_pb2.ToolChoice.values(), "tool_choice", f"is none that is known: {choice}")
    is_required = choice == inference_pb2.TOOL_CHOICE_REQUIRED
    _check(bool(tools) or not is_required, "tool_choice", "REQUIRED needs tools")
    _check(is_required or not prompt.single_tool_call, "single_tool_call", "goes with tool_choice REQUIRED only")
    if prompt.tool_name:
        _check(is_required, "tool_name", "goes with tool_choice REQUIRED only")
        _check(prompt.tool_name in names, "tool_name", f"{prompt.tool_name[:128]!r} is none of the tools")


def _setting(prompt: inference_pb2.ChatPrompt) -> Setting:
    continues, is_given = prompt.continue_final_message, prompt.HasField("add_generation_prompt")
    if continues:
        no_opening = not is_given or not prompt.add_generation_prompt
        _check(no_opening, "continue_final_message", "and add_generation_prompt cannot both be true")
    elif not is_given and not prompt.chat_template_kwargs and not prompt.reasoning_effort:
        return PLAIN
    opens_answer = not continues and (not is_given or prompt.add_generation_prompt)
    return Setting(_variables(prompt), opens_answer, continues)


def _variables(prompt: inference_pb2.ChatPrompt) -> dict[str, Any]:
    """The template's variables, none of which may replace one that it is given anyway."""
    name, text, effort = "chat_template_kwargs", prompt.chat_template_kwargs, prompt.reasoning_effort
    size = len(text.encode())
    _check(size <= MAX_VARIABLES_BYTES, name, f"{MAX_VARIABLES_BYTES} bytes at most, got {size}")
    variables = _object(name, text)
    for key in variables:
        _check(bool(VARIABLE.fullmatch(key)), name, f"its names must be those of variables, got {key[:64]!r}")
        _check(key not in OTHERS and not key.endswith("_token"), name, f"may not set {key!r}")
    if effort:
        _check(effort in EFFORTS, EFFORT, f"must be one of {', '.join(EFFORTS)}, got {effort[:64]!r}")
        _check(variables.get(EFFORT, effort) == effort, EFFORT, f"and that in {name} differ")
        variables[EFFORT] = effort
    return variables


def _num_bytes(prompt: inference_pb2.ChatPrompt) -> int:
    texts: list[str] = []
    for message in prompt.messages:
        texts.append(message.content)
        texts += [call.arguments for call in message.tool_calls]
    for tool in prompt.tools:
        texts += [tool.description, tool.parameters]
    return sum(len(text.encode()) for text in texts)


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    """The message with only the keys that are set, as templates test for them."""
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        out["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    if message.name:
        out["name"] = message.name
    return out


def _call(call: inference_pb2.ToolCall) -> dict[str, Any]:
    arguments = _object("messages.tool_calls.arguments", call.arguments)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tool(tool: inference_pb2.Tool) -> dict[str, Any]:
    parameters = _object("tools.parameters", tool.parameters) or NO_PARAMETERS
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _object(field: str, text: str) -> dict[str, Any]:
    value = parse_object(text) if text.strip() else {}
    if value is None:
        raise InvalidRequest(f"{FIELD}.{field}", "must be a JSON object")
    return value


def _check_name(field: str, name: str) -> None:
    _check(bool(NAME.fullmatch(name)), field, f"must be 1 to 64 letters, digits, '_' and '-', got {name[:128]!r}")


def _check_length(field: str, text: str, limit: int) -> None:
    _check(len(text) <= limit, field, f"{limit} characters at most, got {len(text)}")


def _check(ok: bool, field: str, problem: str) -> None:
    if not ok:
        raise InvalidRequest(f"{FIELD}.{field}", problem)
