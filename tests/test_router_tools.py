"""Calls of tools in a model's text, the same whatever pieces it comes in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batonpb import inference_pb2
from router.tools import ToolCallParser, parse_call, parse_object

ADD = '{"name": "add", "arguments": {"a": 1,  "b": "\\u00fc}"}}'
F = '{"name": "f", "arguments": {}}'
ADD_ARGUMENTS = '{"a": 1,  "b": "\\u00fc}"}'


def part(pieces: list[str], key: str = "id/0") -> tuple[str, list[inference_pb2.ToolCall]]:
    parser = ToolCallParser(key)
    fed = [*(parser.feed(piece) for piece in pieces), parser.finish()]
    return "".join(text for text, _ in fed), [call for _, calls in fed for call in calls]


def calls_of(text: str) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in part([text])[1]]


WELL_FORMED = [
    (f"<tool_call>\n{ADD}\n</tool_call>", ""),
    (f"<tool_call>{ADD}</tool_call>", ""),
    (f"Let me see.\n\n<tool_call>\n{ADD}\n</tool_call>\n", "Let me see."),
    (f"<tool_call>\n{ADD}\n</tool_call>\nDone.", "\nDone."),
    (f"<tool_call>\n{ADD}\n", ""),  # it ended with its tokens, and with the object
    (f"<tool_call>\n{ADD}\n</tool", ""),
    (f"a < b <tool <tool_call>\n{ADD}\n</tool_call>", "a < b <tool"),
    (f"<tool_call> <tool_call>{ADD}</tool_call>", "<tool_call>"),
    (f"<tool_call>{{\n<tool_call>{ADD}</tool_call>", "<tool_call>{"),
    (f'<tool_call>{{"a": "b\n<tool_call>{ADD}</tool_call>', '<tool_call>{"a": "b'),
    (f"<tool_call>{{}}</tool_call><tool_call>{ADD}</tool_call>", "<tool_call>{}</tool_call>"),
]


@pytest.mark.parametrize(("text", "around"), WELL_FORMED, ids=range(len(WELL_FORMED)))
def test_calls_and_the_text_around_them(text: str, around: str) -> None:
    assert part([text])[0] == around
    assert calls_of(text) == [("add", ADD_ARGUMENTS)]


def test_several_calls_have_ids_of_their_own_and_the_same_ones_each_time() -> None:
    text = f"x<tool_call>\n{ADD}\n</tool_call>\n<tool_call>\n{ADD}\n</tool_call>"
    ids = [call.id for call in part([text])[1]]
    assert len(set(ids)) == 2 and ids == [call.id for call in part(list(text))[1]]
    assert all(len(call_id) == 29 and call_id.startswith("call_") and int(call_id[5:], 16) for call_id in ids)
    assert not set(ids) & {call.id for call in part([text], "id/1")[1]}


def test_a_closing_tag_inside_of_a_string_closes_nothing() -> None:
    arguments = json.dumps({"text": '</tool_call> "<tool_call>" \\'})
    assert calls_of(f'<tool_call>{{"arguments": {arguments}, "name": "say"}}</tool_call>') == [("say", arguments)]


MALFORMED = [
    "no call at all",
    "  spaces around \n",
    "<tool_call>",
    "  <tool_call>\n  ",
    "<tool_call></tool_call>",
    "<tool_call>nothing</tool_call>",
    '<tool_call>["name"]</tool_call>',
    '<tool_call>{"name": "add"}</tool_call>',
    '<tool_call>{"name": "add", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": "a b", "arguments": {}}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"x": "\\ud800"}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {}',
    '<tool_call>{"name": "add", "arguments": {}} more',
    f"<tool_call>{'[' * 100_000}</tool_call>",
    f'<tool_call>{{"name": "add", "arguments": {{"x": {"[" * 100_000}</tool_call>',
    f"<tool_call>{ADD}{ADD}</tool_call>",
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_no_call_is_text_to_the_last_character(text: str) -> None:
    assert part([text]) == (text, [])


FRAGMENTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<tool",
            "_call>",
            "</",
            "<",
            ">",
            "\n",
            " ",
            '"',
            "\\",
            "{",
            "}",
            "é😀",
            "Hi.",
        ),
        *(
            ADD,
            '{"name": "f", "arguments": {}}',
            f"<tool_call>\n{ADD}\n</tool_call>",
            '"a": "b"',
            "[",
            "]",
            "null",
            ",",
        ),
    ]
)


@given(st.lists(FRAGMENTS, max_size=14).map("".join), st.data())
def test_any_pieces_give_the_same(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert part(pieces) == part([text]) == part(list(text))
    assert all(parse_object(call.arguments) is not None for call in part(pieces)[1])


@given(st.lists(FRAGMENTS, max_size=14).map("".join))
def test_nothing_is_lost_but_calls_and_the_whitespace_around_them(text: str) -> None:
    around, calls = part([text])
    if not calls:
        assert around == text
    written = {"add": ADD, "f": F}
    called = sum(len("<tool_call></tool_call>") + num_solid(written[call.name]) for call in calls)
    lost = num_solid(text) - num_solid(around)
    assert called - len("</tool_call>") <= lost <= called  # the last tag may be missing


def num_solid(text: str) -> int:
    """Characters that are no whitespace."""
    return len("".join(text.split()))


@given(st.text(max_size=40))
def test_text_goes_on_at_once(text: str) -> None:
    """But for what may be the beginning of a call: a part of its tag, and whitespace before it."""
    given_out, _ = ToolCallParser("k").feed(text)
    held = text[len(given_out) :]
    assert text.startswith(given_out)
    assert "<tool_call>" in text or "<tool_call>".startswith(held.lstrip(" \t\r\n"))


def test_arguments_are_as_they_are_written() -> None:
    text = '{ "arguments" : {"b":1.50, "a" :[1 ,2]} , "name":"f", "arguments": { "last":1e2 }}'
    assert parse_call(text) == ("f", '{ "last":1e2 }')


def test_a_number_beyond_all_bounds_is_one_all_the_same() -> None:
    """JSON allows it, and so does a grammar of numbers."""
    text = '{"name": "f", "arguments": {"a": -1e999, "b": 1e999}}'
    assert parse_call(text) == ("f", '{"a": -1e999, "b": 1e999}')
    assert parse_object(text) == {"name": "f", "arguments": {"a": -1.7976931348623157e308, "b": 1.7976931348623157e308}}
