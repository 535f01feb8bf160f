"""A grammar as a client wrote it, and limits on its size. Pure; knows nothing of its meaning, nor of the library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeGuard

from batonpb import common_pb2
from grammar.errors import InvalidGrammar
from grammar.together import TooIntricate, places

FIELD = "sampling.grammar"
MAX_TEXT_BYTES = 64 * 2**10
MAX_LARK_BYTES = 128 * 2**10  # written by a router, for all tools of a chat
MAX_CHOICES = 256
MAX_CHOICE_CHARS = 1024
# A multiple of m is matched by an automaton with m states per digit position, and the library does not limit
# building it: 10,000 take 20 ms and 13 MB, 1,000,000 take 5 s and 400 MB.
MAX_MULTIPLES = 10_000
MAX_DECIMALS = 32
MAX_TOGETHER = 8  # patterns; see grammar.together


@dataclass(frozen=True)
class Grammar:
    """What the output's text must match. `text` is the schema, the regex, the choices as a JSON list, or Lark."""

    kind: str  # the field's name in `SamplingParams`
    text: str

    @property
    def field(self) -> str:
        return f"{FIELD}.{self.kind}"


def grammar_of(sampling: common_pb2.SamplingParams) -> Grammar | None:
    """The grammar of a request, checked for its size; None if there is none. Raises `InvalidGrammar`."""
    kind = sampling.WhichOneof("grammar")
    if kind is None:
        return None
    if kind == "json_object":
        _check(sampling.json_object, kind, "must be true where it is set")
        return Grammar(kind, "")
    if kind == "choice":
        return Grammar(kind, _checked_choices(list(sampling.choice.choices)))
    text: str = getattr(sampling, kind)
    size, most = len(text.encode()), MAX_LARK_BYTES if kind == "lark" else MAX_TEXT_BYTES
    _check(1 <= size <= most, kind, f"must have 1 to {most} bytes, got {size}")
    if kind == "json_schema":
        _check_schema(text)
    return Grammar(kind, text)


def _checked_choices(choices: list[str]) -> str:
    _check(1 <= len(choices) <= MAX_CHOICES, "choice", f"must have 1 to {MAX_CHOICES} texts, got {len(choices)}")
    for choice in choices:
        fits = 1 <= len(choice) <= MAX_CHOICE_CHARS
        _check(fits, "choice", f"texts must have 1 to {MAX_CHOICE_CHARS} characters, got {len(choice)}")
    size = sum(len(choice.encode()) for choice in choices)
    _check(size <= MAX_TEXT_BYTES, "choice", f"texts may have {MAX_TEXT_BYTES} bytes together, got {size}")
    return json.dumps(choices, ensure_ascii=False)


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammar(f"{FIELD}.json_schema", f"is no JSON: {error}") from None
    _check(isinstance(schema, dict), "json_schema", "must be a JSON object")
    check_multiples(schema, f"{FIELD}.json_schema")
    check_together(schema, f"{FIELD}.json_schema")


def check_multiples(schemas: Any, field: str) -> None:
    """Raises `InvalidGrammar` if the `multipleOf` of one schema or several are more work than allowed."""
    sizes = [_states(value) for value in _multiples(schemas)]
    limit = f"multipleOf takes {MAX_MULTIPLES} steps at most, all together, counted in units of its last decimal"
    if sum(sizes) > MAX_MULTIPLES:
        raise InvalidGrammar(field, f"{limit}, got {sum(sizes):.6g}")


def check_together(schema: Any, field: str) -> None:
    """Raises `InvalidGrammar` if more patterns or multiples must hold together than the library can combine."""
    if not isinstance(schema, dict):
        return
    try:
        for base in places(schema):
            count = sum(name in one for one in base for name in ("pattern", "format"))
            if count > MAX_TOGETHER:
                raise InvalidGrammar(
                    field, f"{MAX_TOGETHER} patterns and formats at most may hold together, got {count}"
                )
            numbers = {one["multipleOf"] for one in base if _is_number(one.get("multipleOf"))}
            if math.prod(_states(number) for number in numbers if number) > MAX_MULTIPLES:
                raise InvalidGrammar(field, f"multiples that hold together may take {MAX_MULTIPLES} steps at most")
    except TooIntricate:
        raise InvalidGrammar(field, "has too many combinations of allOf, anyOf, oneOf and $ref") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _multiples(schema: Any) -> Iterator[int | float]:
    """The values of all `multipleOf`. Iterative, as the JSON parser allows more depth than Python's stack."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            number = value.get("multipleOf")
            if _is_number(number):
                yield number


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _states(number: int | float) -> float:
    """A number in units of its last decimal; 0.25 is 25. Infinite if it is too large, or has too many decimals."""
    if isinstance(number, int):
        return abs(number) if abs(number) <= MAX_MULTIPLES else math.inf
    exact = Decimal(repr(number))
    if not exact.is_finite() or abs(exact.adjusted()) > MAX_DECIMALS:
        return math.inf
    return float(abs(exact).scaleb(max(0, -int(exact.normalize().as_tuple().exponent))))


def _check(ok: bool, kind: str, problem: str) -> None:
    if not ok:
        raise InvalidGrammar(f"{FIELD}.{kind}", problem)
