"""Calls of tools in a model's text, the same whatever pieces it comes in; and the grammar of calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import POCKET
from hypothesis import given
from hypothesis import strategies as st

from batonpb import inference_pb2
from router.tokenizer import Tokenizer
from router.tools import ToolCallParser, parse_call, parse_object, required_grammar

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


def tool(name: str, **parameters: object) -> dict:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "maxLength": 8}},
}
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("tool_name", "text", "is_accepted"),
    [
        ("", PARIS, True),
        ("", NOW, True),
        ("", f"{PARIS}\n{NOW}", True),
        ("now", NOW, True),
        ("now", PARIS, False),
        ("", PARIS.replace("city", "town"), False),
        ("", PARIS.replace("Paris", "Petersburg"), False),
        ("", PARIS.replace("weather", "news"), False),
        ("", PARIS.replace(": ", ":" + " " * 32), False),  # the frame is as it is
        ("", PARIS.replace("Paris", "Rome").replace('"city": ', '"city":' + " " * 32), True),
        ("", PARIS.replace('"city": ', '"city":' + " " * 33), False),
        ("", "Hello", False),
        ("", "", False),
    ],
    ids=range(13),
)
def test_the_grammar_takes_calls_and_nothing_else(tool_name: str, text: str, is_accepted: bool) -> None:
    llguidance = pytest.importorskip("llguidance")
    own = {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": " *"}}  # which is not a client's to set
    grammar = required_grammar([tool("weather", **CITY, **own), tool("now", type="object")], tool_name)
    # Tokens are bytes, and the last one ends the text.
    tokens = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokens, grammar)
    assert not matcher.is_error(), matcher.get_error()
    is_taken = matcher.consume_tokens(list(text.encode()))
    assert (is_taken and matcher.is_accepting()) == is_accepted
    if is_accepted:
        assert part([text])[0] == "" and part([text])[1]


@pytest.mark.parametrize("is_special", [False, True])
def test_tags_that_are_tokens_are_taken_as_tokens(tmp_path: Path, is_special: bool) -> None:
    """As with Qwen's tokenizers: otherwise the model would have to spell what it always writes as one token."""
    llguidance = pytest.importorskip("llguidance")
    source = json.loads((POCKET / "tokenizer.json").read_text())
    for token_id, tag in ((258, "<tool_call>"), (259, "</tool_call>")):
        token = source["added_tokens"][0] | {"id": token_id, "content": tag, "special": is_special}
        source["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    tokenizer = Tokenizer(tmp_path)
    grammar = required_grammar([tool("now", type="object")], "", tokenizer.added_tokens)
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer(json.dumps(source), n_vocab=260, eos_token=[257]), grammar)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokenizer.encode(NOW)
    assert 258 in token_ids and token_ids[-1] == 259
    assert matcher.consume_tokens(token_ids[token_ids.index(258) :]) and matcher.is_accepting()
