"""Which parts of a JSON schema must hold together at one place of a text. Pure.

The library merges those into one automaton, whose size its limits do not bound: it handles 14 patterns in an `allOf`
in 10 ms, 20 in 6 s, and 30 fill the memory. So schemas are walked here the way the library merges them: by `allOf`,
`$ref` and alternatives beside other keywords, and by properties of the same name in what is merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

MAX_STEPS = 50_000  # subschemas looked at, over all places; about 50 ms
BRANCHES = ("anyOf", "oneOf")
ASIDE = ("if", "then", "else", "not")  # counted as if they held
ITEMS = ("items", "prefixItems", "additionalItems", "contains", "unevaluatedItems")
FURTHER = ("additionalProperties", "unevaluatedProperties", "propertyNames")

Schema = dict[str, Any]
Place = tuple[list[Schema], frozenset[int]]  # what holds there, and which lists of alternatives were chosen from


class TooIntricate(Exception):
    """The schema has more places than are checked."""


def places(schema: Schema) -> Iterator[list[Schema]]:
    """For each place, the subschemas that must hold there together. Raises `TooIntricate`."""
    waiting: list[Place] = [([schema], frozenset())]
    seen: set[tuple[frozenset[int], frozenset[int]]] = set()
    steps = 0
    while waiting:
        given, chosen = waiting.pop()
        base, alternatives = _joined(schema, given, chosen)
        key = frozenset(map(id, base)), chosen
        if key in seen:
            continue
        seen.add(key)
        steps += len(base)
        if steps > MAX_STEPS:
            raise TooIntricate
        yield base
        done = chosen | {id(group) for group in alternatives}
        if len(alternatives) == 1:
            waiting += [([*base, branch], done) for branch in alternatives[0]]
        elif alternatives:  # one of each holds; counting all of them is an upper bound, and fast
            waiting.append(([*base, *(branch for group in alternatives for branch in group)], done))
        waiting += [(children, frozenset()) for children in _children(base) if children]


def _joined(root: Schema, given: Sequence[Any], chosen: frozenset[int]) -> tuple[list[Schema], list[list[Any]]]:
    """All subschemas that hold where these do, once each, and the lists of alternatives that are still open."""
    found: dict[int, Schema] = {}
    alternatives: list[list[Any]] = []
    waiting = list(given)
    while waiting:
        one = waiting.pop()
        if not isinstance(one, dict) or id(one) in found:
            continue
        found[id(one)] = one
        waiting += _listed(one.get("allOf")) + [one[name] for name in ASIDE if name in one]
        if "$ref" in one:
            waiting += _target(root, one["$ref"])
        groups = [_listed(one[name]) for name in BRANCHES if isinstance(one.get(name), list)]
        alternatives += [group for group in groups if id(group) not in chosen]
    return list(found.values()), alternatives


def _children(base: Sequence[Schema]) -> Iterator[list[Any]]:
    """What must hold for each property and item, with what applies to all of them if several schemas are merged."""
    named: dict[str, list[Any]] = {}
    further: list[Any] = []
    items: list[Any] = []
    for one in base:
        for name, child in _mapped(one.get("properties")).items():
            named.setdefault(name, []).append(child)
        further += _mapped(one.get("patternProperties")).values()
        further += [one[name] for name in FURTHER if name in one]
        for name in ITEMS:
            child = one.get(name)
            items += child if isinstance(child, list) else [child]
    if len(base) == 1:
        yield from ([child] for children in named.values() for child in children)
        yield from ([child] for child in [*further, *items])
    else:
        yield from ([*children, *further] for children in named.values())
        yield further
        yield items


def _target(root: Schema, reference: Any) -> list[Any]:
    """What a reference names; if it is not a path, the whole schema, which is a safe upper bound."""
    value: Any = root
    if isinstance(reference, str) and reference.startswith("#/"):
        for part in reference[2:].split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list) and name.isdecimal() and int(name[:9]) < len(value):
                value = value[int(name)]
            else:
                value = value.get(name) if isinstance(value, dict) else None
    return [root if value is None else value]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapped(value: Any) -> Schema:
    return value if isinstance(value, dict) else {}
