"""What of a JSON schema must hold together at one place of a text: the library makes one automaton of it. Pure.

It bounds what it looks at, not how large each thing is that it looks at: of 14 patterns in an `allOf` it is done in
10 ms, of 20 in 6 s, and of 30 the memory is full before. So schemas are walked as the library merges them: by `allOf`,
`$ref` and alternatives beside other keywords, and by properties of one name in what is merged.
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
    """There are more places than anybody looks at."""


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
        elif alternatives:  # one of each holds; all of them is more, and is soon counted
            waiting.append(([*base, *(branch for group in alternatives for branch in group)], done))
        waiting += [(children, frozenset()) for children in _children(base) if children]


def _joined(root: Schema, given: Sequence[Any], chosen: frozenset[int]) -> tuple[list[Schema], list[list[Any]]]:
    """All that holds where these do, each once, and the lists of alternatives that are still to be chosen from."""
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
    """What holds for each property and item; of one schema each by itself, of several also further ones with each."""
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
    """What a reference names; where that is not told by a path, the whole, which is more."""
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
