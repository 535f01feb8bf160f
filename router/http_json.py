"""Answers as JSON. Pure.

Python's encoder holds the interpreter's lock until it is through, on a thread, too. So a large answer is encoded in
pieces of some hundred KiB at most, between which everybody else's streams go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

PIECE_ITEMS = 128  # of a long list: tokens, with all that is told of each; a call has no more choices than that
CHOICES_DEPTH, LISTS_DEPTH = 1, 4  # in {"choices": [{"logprobs": {"tokens": []}}]}
_encode = json.JSONEncoder(separators=(",", ":")).encode


def encode(value: object) -> bytes:
    """On one line."""
    return _encode(value).encode()


def encode_large(value: object) -> bytes:
    """The same, in pieces: for a thread."""
    return "".join(_pieces(value, 0)).encode()


def _pieces(value: Any, depth: int) -> Iterator[str]:
    """As far down as tokens are listed, and a choice at a time."""
    if isinstance(value, dict) and value and depth < LISTS_DEPTH:
        for index, (name, item) in enumerate(value.items()):
            yield f"{',' if index else '{'}{_encode(name)}:"
            yield from _pieces(item, depth + 1)
        yield "}"
    elif isinstance(value, list) and len(value) > PIECE_ITEMS:
        for begin in range(0, len(value), PIECE_ITEMS):
            yield f"{',' if begin else '['}{_encode(value[begin : begin + PIECE_ITEMS])[1:-1]}"
        yield "]"
    elif isinstance(value, list) and value and depth == CHOICES_DEPTH:
        for index, item in enumerate(value):
            yield "," if index else "["
            yield from _pieces(item, depth + 1)
        yield "]"
    else:
        yield _encode(value)
