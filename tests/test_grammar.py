"""Grammars as clients write them: what is refused, with which words, how soon; and what a compiled one allows."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import POCKET
from hypothesis import given, settings
from hypothesis import strategies as st

from batonpb import common_pb2
from grammar.compiler import MAX_REASON_CHARS, Compiler
from grammar.errors import GrammarError, InvalidGrammar, NoGrammars, TooManyGrammars
from grammar.queue import MAX_WAITING, GrammarQueue
from grammar.source import Grammar, grammar_of

EOS, VOCAB = 257, 258
COMPILER = Compiler(POCKET, [EOS], VOCAB)


def sampling(**fields: object) -> common_pb2.SamplingParams:
    if "choice" in fields:
        fields["choice"] = common_pb2.ChoiceGrammar(choices=fields["choice"])
    if isinstance(fields.get("json_schema"), dict):
        fields["json_schema"] = json.dumps(fields["json_schema"])
    return common_pb2.SamplingParams(**fields)


def grammar(**fields: object) -> Grammar:
    found = grammar_of(sampling(**fields))
    assert found is not None
    return found


def allowed(text: str, **fields: object) -> set[int] | None:
    """The tokens that may come behind `text`; None where it is no beginning of what the grammar tells."""
    matcher = COMPILER.matcher(grammar(**fields))
    if not matcher.consume_tokens(list(text.encode())):
        return None
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    assert not matcher.is_error()
    return set(np.unpackbits(bits, bitorder="little").nonzero()[0].tolist())


def accepts(text: str, **fields: object) -> bool:
    return EOS in (allowed(text, **fields) or ())


# --- what they mean ---


@pytest.mark.parametrize("choices", [["yes", "no"], ["a", "ab"], ['é\n"x\\', "\U0001f600\0\x7f"], ['" | "b', "/c/"]])
def test_a_choice_is_one_of_its_texts(choices: list[str]) -> None:
    texts = [choice.encode() for choice in choices]
    for text in choices:
        for end in range(len(text) + 1):
            head = text[:end].encode()
            nexts = {other[len(head)] for other in texts if other.startswith(head) and len(other) > len(head)}
            assert allowed(text[:end], choice=choices) == nexts | ({EOS} if head in texts else set())


@pytest.mark.parametrize(
    ("regex", "yes", "no"),
    [
        ("a[0-9]{3}(x|y)*", ["a123", "a123xyx"], ["", "a12", "a1234", "ba123"]),
        ("^abc$", ["abc"], ["abcd", "ab", "xabc"]),
        ("a.c", ["abc", "aéc"], ["a\nc"]),
        ("(?i)ok", ["OK", "ok"], ["k"]),
        ('a/\nx: "b"\nstart: x\n//', ['a/\nx: "b"\nstart: x\n//'], ["b"]),  # nothing of it is the library's language
        ("", [""], ["a"]),
    ],
)
def test_a_regex_matches_all_of_the_text(regex: str, yes: list[str], no: list[str]) -> None:
    if not regex:
        with pytest.raises(InvalidGrammar, match="1 to"):
            grammar(regex=regex)
        return
    assert all(accepts(text, regex=regex) for text in yes)
    assert not any(accepts(text, regex=regex) for text in no)


def test_json_has_white_space_within_a_bound_and_none_around_it() -> None:
    assert accepts('{"a": [1,\n  2]}', json_object=True)
    assert not accepts("[1]", json_object=True) and allowed(" ", json_object=True) is None
    assert allowed("{" + 32 * " ", json_object=True) == {ord('"'), ord("}")}
    assert allowed('{"a": 1}', json_object=True) == {EOS}
    assert allowed('{"a": ', json_schema={"type": "object", "x-guidance": {"whitespace_pattern": " *"}}) is not None


def test_properties_come_in_the_order_of_the_schema() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}, "required": ["a"]}
    assert accepts('{"b": 1, "a": 2}', json_schema=schema) and accepts('{"a": 2}', json_schema=schema)
    assert not accepts('{"a": 2, "b": 1}', json_schema=schema)


def test_special_tokens_are_not_text() -> None:
    inside = allowed('"', json_schema={"type": "string"})
    assert inside is not None and not inside & {256, EOS}


# --- what is refused ---

DEEP = '{"type":"array","items":' * 500 + "{}" + "}" * 500
REFUSED = {
    "json_object": [(sampling(json_object=False), "must be true")],
    "choice": [
        (sampling(choice=[]), "1 to 256 texts, got 0"),
        (sampling(choice=["x"] * 257), "got 257"),
        (sampling(choice=["x", ""]), "1 to 1024 characters, got 0"),
        (sampling(choice=["x" * 1025]), "got 1025"),
        (sampling(choice=["é" * 1024] * 64), "65536 bytes together"),
    ],
    "regex": [
        (sampling(regex="x" * 65_537), "1 to 65536 bytes, got 65537"),
        (sampling(regex="(?P<"), "unclosed"),
        (sampling(regex="(?=a)b"), "look-around"),
        (sampling(regex=r"(a)\1"), "backreferences"),
        (sampling(regex="[^\\s\\S]"), "no text matches"),
        (sampling(regex="(" * 20_000 + ")" * 20_000), "regex"),
    ],
    "json_schema": [
        (sampling(json_schema=""), "1 to 65536"),
        (sampling(json_schema="{"), "no JSON"),
        (sampling(json_schema="[" * 30_000), "no JSON"),
        (sampling(json_schema='{"minimum": NaN}'), "NaN is not JSON"),
        (sampling(json_schema="[]"), "must be a JSON object"),
        (sampling(json_schema="true"), "must be a JSON object"),
        (sampling(json_schema={"type": "object", "properties": {"a": False}, "required": ["a"]}), "nsatisfiable"),
        (sampling(json_schema=DEEP), "recursion"),
        (sampling(json_schema={"$ref": "#"}), "no text matches"),
        (sampling(json_schema={"$ref": "http://localhost:1/x"}), "http://localhost:1/x"),
        (sampling(json_schema={"$ref": "#/nowhere"}), "nowhere"),
        (sampling(json_schema={"type": "array", "uniqueItems": True}), "uniqueItems"),
        (sampling(json_schema={"uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (sampling(json_schema={"type": "string", "format": "nope"}), "nope"),
        (sampling(json_schema={"type": "string", "pattern": "("}), "unclosed"),
        (sampling(json_schema={"type": "what"}), "what"),
        (sampling(json_schema={"multipleOf": 10_001}), "10000 steps at most"),
        (sampling(json_schema={"items": [{"multipleOf": 0.9}, {"multipleOf": 99.99}]}), "10008"),
        (sampling(json_schema={"multipleOf": 1e-300}), "inf"),
        (sampling(json_schema={"multipleOf": 10**400}), "inf"),
        (sampling(json_schema={"multipleOf": -(10**400)}), "inf"),
        (sampling(json_schema='{"multipleOf": 1e999}'), "inf"),
    ],
}
CASES = [(kind, message, problem) for kind, cases in REFUSED.items() for message, problem in cases]


@pytest.mark.parametrize(("kind", "message", "problem"), CASES, ids=[f"{k}-{i}" for i, (k, _, _) in enumerate(CASES)])
def test_refusals_name_field_and_reason(kind: str, message: common_pb2.SamplingParams, problem: str) -> None:
    with pytest.raises(InvalidGrammar) as error:
        found = grammar_of(message)
        assert found is not None
        COMPILER.matcher(found)
    assert error.value.field == f"sampling.grammar.{kind}" and problem in str(error.value)
    assert len(str(error.value)) < MAX_REASON_CHARS + 100


def test_no_grammar_is_none() -> None:
    assert grammar_of(sampling(temperature=1.0)) is None


def test_a_model_that_allows_no_grammar(tmp_path: Path) -> None:
    plain = grammar(regex="a")
    with pytest.raises(NoGrammars, match="no end token"):
        Compiler(POCKET, []).matcher(plain)
    with pytest.raises(NoGrammars, match="tokenizer"):
        Compiler(tmp_path, [EOS]).matcher(plain)
    shutil.copy(POCKET / "config.json", tmp_path / "tokenizer.json")
    with pytest.raises(NoGrammars, match="tokenizer"):
        Compiler(tmp_path, [EOS]).matcher(plain)


# --- the queue ---


async def test_what_was_made_of_a_grammar_waits_for_nobody() -> None:
    let_go, made = threading.Event(), list[str]()

    def make(one: Grammar) -> str:
        assert one.text == "quick" or let_go.wait(30)
        made.append(one.text)
        return one.text.upper()

    queue, quick = GrammarQueue(make, max_kept=64), Grammar("regex", "quick")
    assert await queue.get(quick) == "QUICK"
    slow = [Grammar("regex", f"slow {n}") for n in range(MAX_WAITING)]
    waiting = [asyncio.create_task(queue.get(one)) for one in [*slow, slow[0]]]
    try:
        await asyncio.sleep(0)
        assert await queue.get(quick) == "QUICK"
        with pytest.raises(TooManyGrammars, match="32 others wait"):
            await queue.get(Grammar("regex", "one more"))
        waiting[0].cancel()
    finally:
        let_go.set()
    assert await asyncio.gather(*waiting[1:]) == [*(one.text.upper() for one in slow[1:]), "SLOW 0"]
    assert made == ["quick", *(one.text for one in slow)], "once each, in their order, whoever left"


async def test_the_last_grammars_are_kept_but_not_what_is_wrong_with_one() -> None:
    made = list[str]()

    def make(one: Grammar) -> None:
        made.append(one.text)
        if one.text == "bad":
            raise InvalidGrammar(one.field, "no text matches it")

    queue = GrammarQueue(make, max_kept=2)
    for text in "abacab":
        assert await queue.get(Grammar("regex", text)) is None
    assert made == ["a", "b", "c", "b"], "what was asked for last stays"
    for _ in range(2):
        with pytest.raises(InvalidGrammar, match="no text"):
            await queue.get(Grammar("regex", "bad"))
    assert made[4:] == ["bad", "bad"]


# --- what wants too much ---

BOMBS = {
    "repetitions of repetitions": {"regex": "((a{1000}){1000}){1000}"},
    "optional repetitions": {"regex": "(a?){500}a{500}"},
    "exponential automaton": {"regex": "(a|b)*a(a|b){60}"},
    "many searches": {"regex": "|".join(f".*{char}.{{300}}{char}" for char in "abcdefghijklmnopqrst")},
    "long regex": {"regex": "ab?" * 21_000},
    "wide regex": {"regex": "|".join(f".*{n:x}" for n in range(10_000))},
    "all properties optional": {"json_schema": {"properties": {f"p{n}": {"type": "string"} for n in range(1_500)}}},
    "product of unions": {
        "json_schema": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(8)]} for i in range(8)]}
    },
    "references that double": {
        "json_schema": {
            "$defs": {f"a{n}": {"allOf": 2 * [{"$ref": f"#/$defs/a{n + 1}"}]} for n in range(40)} | {"a40": {}},
            "$ref": "#/$defs/a0",
        }
    },
    "references in a circle": {
        "json_schema": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    },
    "many multiples": {"json_schema": {"prefixItems": [{"type": "integer", "multipleOf": 99}] * 100, "minItems": 100}},
    "a large multiple": {"json_schema": {"type": "integer", "multipleOf": 9_973}},
    "a long string": {"json_schema": {"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9}},
    "white space": {"json_schema": {"type": "object", "x-guidance": {"item_separator": "((,{1000}){1000}){1000}"}}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_wants_too_much_is_refused_or_goes_on_step_by_step(name: str) -> None:
    """Whatever happens: an answer soon (the test's own limit is what would tell), and no crash."""
    try:
        matcher = COMPILER.matcher(grammar(**BOMBS[name]))
    except GrammarError as error:
        assert error.field.startswith("sampling.grammar.")
        return
    for _ in range(100):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if matcher.is_error() or matcher.is_stopped():
            break
        ids = bits[:256].nonzero()[0]
        matcher.consume_token(int(ids[len(ids) // 2]) if len(ids) else EOS)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYWORDS = (
    "type enum const anyOf oneOf allOf not items prefixItems minItems maxItems properties required $ref $defs if then "
    "additionalProperties patternProperties pattern format minLength maxLength minimum maximum exclusiveMinimum "
    "multipleOf minProperties maxProperties x-guidance $id $schema $anchor contains uniqueItems"
).split()
TYPES = st.sampled_from(["string", "integer", "number", "object", "array", "null", "boolean", "date", "#", "^a+$"])
SCHEMAS = st.recursive(
    st.dictionaries(st.sampled_from(KEYWORDS), JSON_VALUES | TYPES, max_size=3),
    lambda inner: st.dictionaries(
        st.sampled_from(KEYWORDS),
        inner | TYPES | st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_size=4,
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(SCHEMAS.map(lambda schema: {"json_schema": schema}), st.text().map(lambda text: {"regex": text})))
def test_weird_grammars_compile_or_are_refused(fields: dict[str, object]) -> None:
    try:
        COMPILER.matcher(grammar(**fields))
    except GrammarError as error:
        assert error.problem and error.field.startswith("sampling.grammar.")
