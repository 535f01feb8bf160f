"""The grammar of an answer in which tools have a say: what it takes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import POCKET
from llguidance import LLMatcher, LLTokenizer

from batonpb import common_pb2
from grammar.compiler import LIMITS
from router.errors import InvalidRequest
from router.tokenizer import Tokenizer
from router.tool_grammar import calls_grammar, hold_to_tools
from router.tools import ToolCallParser
from router.validate_chat import NO_PARAMETERS, Chat


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


NEWS = '{"headline": "x"}'
TOOLS = (tool("weather", **CITY), tool("now", **NO_PARAMETERS))
CHOICE = common_pb2.ChoiceGrammar(choices=["yes", 'no "way"'])


def asked(chat: Chat, **grammar: Any) -> str:
    sampling = common_pb2.SamplingParams(**grammar)
    assert hold_to_tools(sampling, chat, ())
    return sampling.lark


def accepts(grammar: str, text: str) -> bool:
    """Tokens are bytes, and the last one ends the text."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(list(text.encode()))) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("tool_name", "text", "is_accepted"),
    [
        ("", PARIS, True),
        ("", NOW, True),
        ("", f"{PARIS}\n{NOW}", True),
        ("now", NOW, True),
        ("now", f"{NOW}\n{NOW}", False),
        ("now", PARIS, False),
        ("", NOW.replace("{}", '{"zone": 1}'), False),  # it names no parameters, so there are none
        ("", PARIS.replace("city", "town"), False),
        ("", PARIS.replace("Paris", "Petersburg"), False),
        ("", PARIS.replace("Paris", "\\ud800"), False),
        ("", PARIS.replace("weather", "news"), False),
        ("", PARIS.replace(": ", ":" + " " * 32), False),  # the frame is as it is
        ("", PARIS.replace("Paris", "Rome").replace('"city": ', '"city":' + " " * 32), True),
        ("", PARIS.replace('"city": ', '"city":' + " " * 33), False),
        ("", "Hello", False),
        ("", "", False),
    ],
    ids=range(16),
)
def test_a_required_call_is_one_and_nothing_else(tool_name: str, text: str, is_accepted: bool) -> None:
    own = {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": " *"}}  # which is not a client's to set
    tools = (tool("weather", **CITY, **own), TOOLS[1])
    grammar = asked(Chat((), tools, is_required=True, tool_name=tool_name, is_single=bool(tool_name)))
    assert accepts(grammar, text) == is_accepted
    if is_accepted:
        parser = ToolCallParser("id/0")
        parts = [parser.feed(text), parser.finish()]
        assert not "".join(part for part, _ in parts) and any(calls for _, calls in parts)


@pytest.mark.parametrize(
    ("grammar", "text", "is_accepted"),
    [
        ({"json_schema": json.dumps({"properties": {"headline": {"type": "string"}}})}, NEWS, True),
        ({"json_schema": json.dumps({"properties": {"headline": {"type": "number"}}})}, NEWS, False),
        ({"json_object": True}, NEWS, True),
        ({"json_object": True}, f"{PARIS}\n{NEWS}", False),
        ({"json_object": True}, "[]", False),
        ({"choice": CHOICE}, 'no "way"', True),
        ({"choice": CHOICE}, "maybe", False),
        ({"choice": CHOICE}, f"{PARIS}\n{NOW}", True),
    ],
    ids=range(8),
)
def test_beside_tools_a_grammar_is_that_of_an_answer_without_calls(
    grammar: dict[str, Any], text: str, is_accepted: bool
) -> None:
    assert accepts(asked(Chat((), TOOLS), **grammar), text) == is_accepted
    assert accepts(asked(Chat((), TOOLS), **grammar), PARIS)


def test_tools_without_a_say_change_nothing() -> None:
    for chat in (Chat(()), Chat((), TOOLS)):
        sampling = common_pb2.SamplingParams(seed=1)
        assert not hold_to_tools(sampling, chat, ()) and sampling == common_pb2.SamplingParams(seed=1)
    sampling = common_pb2.SamplingParams(regex="a")
    assert not hold_to_tools(sampling, Chat(()), ()) and sampling.regex == "a"


REQUIRED = Chat((), TOOLS, is_required=True)
REFUSED: list[tuple[Chat, dict[str, Any], str]] = [
    (REQUIRED, {"json_object": True}, "prompt.chat.tool_choice: REQUIRED goes without sampling.grammar only"),
    (Chat((), TOOLS), {"regex": "a"}, "sampling.grammar.regex: goes without tools, or with tool_choice NONE, only"),
    (
        Chat((), (*TOOLS, tool("say", type="string")), is_required=True),
        {},
        "prompt.chat.tools.parameters: must be of type object, in the tool 'say'",
    ),
    (
        Chat((), (tool("a", items={"multipleOf": 6000}), tool("b", items={"multipleOf": 6000})), is_required=True),
        {},
        "prompt.chat.tools: multipleOf takes 10000 steps at most, all together",
    ),
]


@pytest.mark.parametrize(("chat", "grammar", "problem"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(chat: Chat, grammar: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        asked(chat, **grammar)
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize("is_special", [False, True])
def test_tags_that_are_tokens_of_a_text_are_taken_as_tokens(tmp_path: Path, is_special: bool) -> None:
    """As with Qwen's tokenizers: otherwise the model would have to spell what it always writes as one token.

    Special tokens are in no text, so there the model has to.
    """
    source = json.loads((POCKET / "tokenizer.json").read_text())
    for token_id, tag in ((258, "<tool_call>"), (259, "</tool_call>")):
        token = source["added_tokens"][0] | {"id": token_id, "content": tag, "special": is_special}
        source["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    tokenizer = Tokenizer(tmp_path)
    grammar = calls_grammar({"now": {"type": "object"}}, tokenizer.added_tokens)
    matcher = LLMatcher(LLTokenizer(json.dumps(source), n_vocab=260, eos_token=[257]), grammar)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = [258, *NOW.removeprefix("<tool_call>").removesuffix("</tool_call>").encode(), 259]
    assert tokenizer.encode(NOW, is_template=True) == token_ids
    written = list(NOW.encode()) if is_special else token_ids
    assert tokenizer.decode(written) == NOW
    assert matcher.consume_tokens(written) and matcher.is_accepting()
