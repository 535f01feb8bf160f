"""The grammar of an answer with tools: required calls, or the choice between calls and the client's own grammar.

It is written in llguidance's Lark, with JSON Schemas inside. Pure; whether it can be enforced, the library decides.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from batonpb import common_pb2
from grammar.compiler import JSON_OPTIONS
from grammar.errors import InvalidGrammar
from grammar.source import check_multiples, check_together
from router.errors import InvalidRequest
from router.tools import CLOSE, OPEN
from router.validate_chat import FIELD, NO_PARAMETERS, Chat

TOOLS = f"{FIELD}.tools"


def hold_to_tools(sampling: common_pb2.SamplingParams, chat: Chat, added_tokens: Collection[str]) -> bool:
    """Replaces the client's grammar by the one that the chat's tools need. Returns whether they need one.

    If tools may be called, a client's grammar is an alternative to calls. Raises `InvalidRequest`.
    """
    kind = sampling.WhichOneof("grammar")
    if not chat.tools or not (chat.is_required or kind):
        return False
    if chat.is_required and kind:
        raise InvalidRequest(f"{FIELD}.tool_choice", "REQUIRED goes without sampling.grammar only")
    arguments = schemas(chat)
    try:
        check_multiples(list(arguments.values()), TOOLS)
        for schema in arguments.values():
            check_together(schema, TOOLS)
    except InvalidGrammar as error:
        raise InvalidRequest(error.field, error.problem) from error
    answer = _answer(sampling) if kind else ""
    sampling.lark = calls_grammar(arguments, added_tokens, chat.is_single, answer)
    return True


def schemas(chat: Chat) -> dict[str, dict[str, Any]]:
    """The JSON schemas of the arguments, by the names of the tools that may be called.

    Raises `InvalidRequest` for arguments that cannot be an object.
    """
    functions = [tool["function"] for tool in chat.tools]
    return {one["name"]: _arguments(one) for one in functions if chat.tool_name in ("", one["name"])}


def calls_grammar(
    schemas: Mapping[str, dict[str, Any]], added_tokens: Collection[str], is_single: bool = False, answer: str = ""
) -> str:
    """The Lark grammar of one or more calls, exactly one if `is_single`; or else of `answer`, itself Lark, if given.

    `schemas` has the arguments' schemas by tool name, each on its own: "#/$defs" refers to the schema itself.
    A tag that is one of the tokenizer's `added_tokens` is written as that token, which the library would not match as
    text.
    """
    opening, closing = (tag if tag in added_tokens else json.dumps(tag) for tag in (OPEN, CLOSE))
    rules = ["start: calls | answer", f"answer: {answer}"] if answer else ["start: calls"]
    rules.append("calls: call" if is_single else 'calls: call ("\\n" call)*')
    rules.append("call: " + " | ".join(f"call_{n}" for n in range(len(schemas))))
    for n, (name, schema) in enumerate(schemas.items()):
        head, tail = json.dumps(f'\n{{"name": "{name}", "arguments": '), json.dumps("}\n")
        rules.append(f"call_{n}: {opening} {head} arguments_{n} {tail} {closing}")
        rules.append(f"arguments_{n}: {_json(schema)}")
    return "\n".join(rules) + "\n"


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = dict(function["parameters"])
    kinds = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise InvalidRequest(f"{TOOLS}.parameters", f"must be of type object, in the tool {function['name']!r}")
    return schema | ({"additionalProperties": False} if schema == NO_PARAMETERS else {"type": "object"})


def _answer(sampling: common_pb2.SamplingParams) -> str:
    """The client's grammar as an alternative to calls. Raises `InvalidRequest` if it cannot be one."""
    kind = sampling.WhichOneof("grammar")
    if kind == "regex":
        raise InvalidRequest("sampling.grammar.regex", "goes without tools, or with tool_choice NONE, only")
    if kind == "choice":
        return " | ".join(json.dumps(choice) for choice in sampling.choice.choices)
    return _json({"type": "object"} if kind == "json_object" else json.loads(sampling.json_schema))


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': JSON_OPTIONS})}"
