"""What must hold together is bounded before the library makes one automaton of it: it has no bound of its own there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batonpb import common_pb2, inference_pb2
from grammar.errors import InvalidGrammar
from grammar.source import MAX_TOGETHER, grammar_of
from grammar.together import MAX_STEPS, TooIntricate, places
from router.errors import InvalidRequest
from router.tool_grammar import hold_to_tools
from router.validate_chat import check_chat

MANY = 24


def text(number: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f"a.*{number}.*"}


TEXTS = [text(number) for number in range(MANY)]
NESTED: dict[str, Any] = text(MANY)
for one in TEXTS:
    NESTED = one | {"anyOf": [NESTED]}
CHAIN = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} | text(number) for number in range(MANY)}
RECORD = {"type": "object", "properties": {f"p{number}": one for number, one in enumerate(TEXTS)}}
DATED = {"type": "object", "properties": {"at": {"type": "string", "format": "date-time"}}}

TOO_MUCH: dict[str, dict[str, Any]] = {
    "allOf": {"allOf": TEXTS},
    "nested alternatives": NESTED,
    "chain of references": {"$ref": "#/$defs/d0", "$defs": CHAIN | {f"d{MANY}": {"type": "string"}}},
    "one property": {"allOf": [{"type": "object", "properties": {"p": one}} for one in TEXTS]},
    "further properties": {"allOf": [{"additionalProperties": one} for one in TEXTS], "properties": {"p": {}}},
    "items": {"allOf": [{"type": "array", "items": one} for one in TEXTS]},
    "a reference to what is no path": {"$ref": "#other", "properties": {"p": {"allOf": TEXTS}}},
    "alternatives side by side": {"anyOf": TEXTS[:12], "oneOf": TEXTS[12:]},
    "multiples": {"type": "integer", "allOf": [{"multipleOf": 4999}, {"multipleOf": 4997}]},
}
FINE: dict[str, dict[str, Any]] = {
    "properties": RECORD,
    "alternatives": {"anyOf": TEXTS},
    "heirs": {"allOf": [RECORD, DATED]},
    "many dated ones": {"oneOf": [DATED | {"title": str(number)} for number in range(MANY)]},
    "as many as may be": {"allOf": TEXTS[:MAX_TOGETHER]},
    "a tree": {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"v": TEXTS[0], "l": {"$ref": "#/$defs/n"}}}}},
    "itself": {"$ref": "#"},
    "multiples": {"type": "integer", "allOf": [{"multipleOf": 10}, {"multipleOf": 25}]},
    "nonsense": {"allOf": 7, "anyOf": {"a": 1}, "properties": [1], "$ref": 5, "items": None, "multipleOf": "x"},
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_at_once_is_refused(name: str) -> None:
    with pytest.raises(InvalidGrammar, match="together"):
        grammar_of(common_pb2.SamplingParams(json_schema=json.dumps(TOO_MUCH[name])))


@pytest.mark.parametrize("name", FINE)
def test_what_holds_in_different_places_is_not_added_up(name: str) -> None:
    assert grammar_of(common_pb2.SamplingParams(json_schema=json.dumps(FINE[name]))) is not None


def test_the_walk_itself_is_bounded() -> None:
    with pytest.raises(TooIntricate):
        list(places({"properties": {str(number): {} for number in range(MAX_STEPS + 1)}}))


def test_tools_are_held_to_it_too() -> None:
    tools = [inference_pb2.Tool(name="f", parameters=json.dumps({"type": "object", "allOf": TEXTS}))]
    chat = inference_pb2.ChatPrompt(tools=tools, tool_choice=inference_pb2.TOOL_CHOICE_REQUIRED)
    chat.messages.add(role="user", content="x")
    with pytest.raises(InvalidRequest, match="together"):
        hold_to_tools(common_pb2.SamplingParams(), check_chat(chat, 1 << 20), {})
