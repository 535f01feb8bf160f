"""Checks of chats and tools: every limit is named, at its edge; what comes out is what templates take."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batonpb import inference_pb2
from router.errors import InvalidRequest
from router.tokenizer import PLAIN, Setting
from router.validate_chat import check_chat

Message, Tool, ToolCall = inference_pb2.ChatMessage, inference_pb2.Tool, inference_pb2.ToolCall
USER = Message(role="user", content="Hi")
REQUIRED = inference_pb2.TOOL_CHOICE_REQUIRED
LIMIT_BYTES = 1000


def chat(*messages: inference_pb2.ChatMessage, **fields: Any) -> inference_pb2.ChatPrompt:
    return inference_pb2.ChatPrompt(messages=messages or [USER], **fields)


def calling(*calls: inference_pb2.ToolCall, role: str = "assistant") -> inference_pb2.ChatPrompt:
    return chat(USER, Message(role=role, tool_calls=calls))


GOOD = [
    chat(Message(role="r" * 64, content="", name="n" * 64)),
    chat(Message(role="tool", content="x", tool_call_id="i" * 64)),
    calling(*[ToolCall(id="i" * 64, name="n" * 64, arguments="{}")] * 128),
    chat(tools=[Tool(name=f"n{n}") for n in range(128)], tool_choice=REQUIRED, tool_name="n7"),
    chat(tools=[Tool(name="f", parameters=json.dumps({"description": "x" * 978}))]),
]
BAD = [
    ("messages", inference_pb2.ChatPrompt(), "must not be empty"),
    ("messages.role", chat(Message(content="x")), "1 to 64"),
    ("messages.role", chat(Message(role="r" * 65)), "1 to 64"),
    ("messages.name", chat(Message(role="user", name="n" * 65)), "64 characters at most, got 65"),
    ("messages.tool_call_id", chat(Message(role="tool", tool_call_id="i" * 65)), "64 characters at most, got 65"),
    ("messages.tool_call_id", chat(Message(role="user", tool_call_id="i")), "role 'tool' only"),
    ("messages.tool_calls", calling(ToolCall(name="f"), role="user"), "role 'assistant' only"),
    ("messages.tool_calls", calling(*[ToolCall(name="f")] * 129), "128 at most, got 129"),
    ("messages.tool_calls.id", calling(ToolCall(id="i" * 65, name="f")), "64 characters at most"),
    ("messages.tool_calls.name", calling(ToolCall(name="")), "1 to 64 letters"),
    ("messages.tool_calls.name", calling(ToolCall(name="a b")), "got 'a b'"),
    ("messages.tool_calls.arguments", calling(ToolCall(name="f", arguments="[]")), "must be a JSON object"),
    ("messages.tool_calls.arguments", calling(ToolCall(name="f", arguments="{")), "must be a JSON object"),
    ("messages.tool_calls.arguments", calling(ToolCall(name="f", arguments='{"a": NaN}')), "must be a JSON object"),
    ("messages.tool_calls.arguments", calling(ToolCall(name="f", arguments='{"a": "\\udc00"}')), "a JSON object"),
    ("tools", chat(tools=[Tool(name=f"n{n}") for n in range(129)]), "128 at most, got 129"),
    ("tools.name", chat(tools=[Tool(name="")]), "1 to 64 letters"),
    ("tools.name", chat(tools=[Tool(name="n" * 65)]), "1 to 64 letters"),
    ("tools.name", chat(tools=[Tool(name="né")]), "1 to 64 letters"),
    ("tools.name", chat(tools=[Tool(name="f"), Tool(name="f")]), "'f' is there twice"),
    ("tools.parameters", chat(tools=[Tool(name="f", parameters="true")]), "must be a JSON object"),
    ("tools.parameters", chat(tools=[Tool(name="f", parameters='{"a":' * 300)]), "1000 bytes at most, got 1502"),
    ("chat_template_kwargs", chat(chat_template_kwargs="[]"), "must be a JSON object"),
    ("chat_template_kwargs", chat(chat_template_kwargs='{"a":' * 9000), "16384 bytes"),
    ("chat_template_kwargs", chat(chat_template_kwargs='{"a": 1e999, "b": NaN}'), "must be a JSON object"),
    *(
        ("chat_template_kwargs", chat(chat_template_kwargs=json.dumps({name: 1})), f"may not set '{name}'")
        for name in (
            *("messages", "tools", "documents", "bos_token", "eos_token", "pad_token", "add_generation_prompt"),
            *("continue_final_message", "raise_exception", "strftime_now", "namespace"),
        )
    ),
    *(
        ("chat_template_kwargs", chat(chat_template_kwargs=json.dumps({name: 1})), "those of variables")
        for name in ("", "_x", "__class__", "a b", "a-b", "n" * 65)
    ),
    ("reasoning_effort", chat(reasoning_effort="huge"), "none, minimal, low, medium, high, xhigh, max, got 'huge'"),
    (
        "reasoning_effort",
        chat(reasoning_effort="low", chat_template_kwargs='{"reasoning_effort": "high"}'),
        "and that in chat_template_kwargs differ",
    ),
    (
        "continue_final_message",
        chat(continue_final_message=True, add_generation_prompt=True),
        "and add_generation_prompt cannot both be true",
    ),
    ("tool_choice", chat(tools=[Tool(name="f")], tool_choice=7), "7"),
    ("tool_choice", chat(tool_choice=REQUIRED), "needs tools"),
    ("tool_name", chat(tools=[Tool(name="f")], tool_name="f"), "REQUIRED only"),
    ("single_tool_call", chat(tools=[Tool(name="f")], single_tool_call=True), "REQUIRED only"),
    ("tool_name", chat(tools=[Tool(name="f")], tool_name="g", tool_choice=REQUIRED), "'g' is none of the tools"),
    ("", chat(Message(role="user", content="é" * 501)), "1000 bytes at most, got 1002"),
    ("", calling(ToolCall(name="f", arguments=json.dumps({"a": "x" * 1000}))), "1000 bytes at most"),
]


@pytest.mark.parametrize("prompt", GOOD, ids=range(len(GOOD)))
def test_what_is_at_the_edge_is_fine(prompt: inference_pb2.ChatPrompt) -> None:
    assert check_chat(prompt, LIMIT_BYTES).messages


@pytest.mark.parametrize(("field", "prompt", "limit"), BAD, ids=[f"{field}-{n}" for n, (field, _, _) in enumerate(BAD)])
def test_what_is_beyond_names_field_and_limit(field: str, prompt: inference_pb2.ChatPrompt, limit: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check_chat(prompt, LIMIT_BYTES)
    is_size = "bytes at most" in limit
    assert error.value.field == ("prompt.chat" if is_size else f"prompt.chat.{field}") and limit in str(error.value)


def test_the_shapes_are_those_of_templates() -> None:
    call = ToolCall(id="c1", name="add", arguments=' {"a": [1, null]}')
    prompt = chat(
        USER,
        Message(role="assistant", content="Well:", tool_calls=[call, ToolCall(name="now")]),
        Message(role="tool", content="1", tool_call_id="c1", name="add"),
        tools=[Tool(name="add", description="Adds.", parameters='{"type": "object"}'), Tool(name="now")],
    )
    checked = check_chat(prompt, LIMIT_BYTES)
    assert checked.messages == (
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Well:",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": [1, None]}}},
                {"id": "", "type": "function", "function": {"name": "now", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "add"},
    )
    nothing = {"type": "object", "properties": {}}
    assert [tool["function"] for tool in checked.tools] == [
        {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
        {"name": "now", "description": "", "parameters": nothing},
    ]
    assert all(tool["type"] == "function" for tool in checked.tools)
    assert not checked.is_required


def test_how_a_chat_is_set() -> None:
    assert check_chat(chat(), LIMIT_BYTES).setting is PLAIN
    variables = '{"enable_thinking": false, "date_string": "today", "a": [1, {"b": null}]}'
    prompt = chat(chat_template_kwargs=variables, reasoning_effort="none", add_generation_prompt=False)
    setting = check_chat(prompt, LIMIT_BYTES).setting
    assert setting == Setting(json.loads(variables) | {"reasoning_effort": "none"}, opens_answer=False)
    assert check_chat(chat(add_generation_prompt=True), LIMIT_BYTES).setting == PLAIN
    for fields in ({}, {"add_generation_prompt": False}):
        going_on = check_chat(chat(continue_final_message=True, **fields), LIMIT_BYTES).setting
        assert going_on == Setting(opens_answer=False, continues=True)


def test_tools_that_are_not_to_be_called_are_not_shown() -> None:
    prompt = chat(tools=[Tool(name="f")], tool_choice=inference_pb2.TOOL_CHOICE_NONE)
    assert check_chat(prompt, LIMIT_BYTES).tools == ()
    checked = check_chat(chat(tools=[Tool(name="f")], tool_choice=REQUIRED, tool_name="f"), LIMIT_BYTES)
    assert checked.is_required and checked.is_single and checked.tool_name == "f" and len(checked.tools) == 1
