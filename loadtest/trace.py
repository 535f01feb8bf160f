"""Requests over time: reads Mooncake's traces, and generates similar ones. Pure except for reading a file.

A trace is one JSON object per line: `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, the
names of the prompt's blocks of 512 tokens, including the last, partly filled one. Equal names mean equal prefixes.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

BLOCK_TOKENS = 512
GRAIN_S = 3.0  # Mooncake's time stamps are multiples of it
EARLIER_S = 900.0  # conversations of a made trace begin so long before it
MAX_TOKENS = 1 << 24  # of one request; a trace that says more is broken


class BadTrace(ValueError):
    """A line that is not a request; names the line and the field."""


@dataclass(frozen=True)
class TracedRequest:
    """One request of a trace."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]  # names, ceil(input_tokens / 512) of them

    def faster(self, scale: float) -> TracedRequest:
        """The same request in a trace that is `scale` times as fast."""
        return replace(self, arrival_s=self.arrival_s / scale)


def read_trace(path: Path, rng: random.Random, grain_s: float = GRAIN_S, scale: float = 1.0) -> list[TracedRequest]:
    """A trace in order of arrival. Raises `BadTrace`, OSError.

    Each request is put at a random moment of its `grain_s`; otherwise the clock's grain would look like bursts. Then
    time is divided by `scale`: 2.0 is twice the load.
    """
    requests = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                requests.append(_parse(line, f"{path.name}, line {number}"))
    jittered = [(request.arrival_s + rng.uniform(0.0, grain_s)) / scale for request in requests]
    order = sorted(range(len(requests)), key=jittered.__getitem__)
    return [replace(requests[index], arrival_s=jittered[index]) for index in order]


def _parse(line: str, where: str) -> TracedRequest:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadTrace(f"{where}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadTrace(f"{where}: must be an object, got {type(data).__name__}")
    timestamp, blocks = data.get("timestamp"), data.get("hash_ids")
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not 0 <= timestamp < 1e12:
        raise BadTrace(f"{where}: timestamp must be milliseconds below 1e12, got {timestamp!r}")
    for field in ("input_length", "output_length"):
        length = data.get(field)
        if type(length) is not int or not 1 <= length <= MAX_TOKENS:
            raise BadTrace(f"{where}: {field} must be 1 to {MAX_TOKENS} tokens, got {length!r}")
    if not isinstance(blocks, list) or any(type(block) is not int for block in blocks):
        raise BadTrace(f"{where}: hash_ids must be a list of whole numbers")
    num_tokens = data["input_length"]
    if len(blocks) != -(-num_tokens // BLOCK_TOKENS):
        raise BadTrace(
            f"{where}: hash_ids must be one for each {BLOCK_TOKENS} of {num_tokens} tokens, got {len(blocks)}"
        )
    return TracedRequest(timestamp / 1000.0, num_tokens, data["output_length"], tuple(blocks))


@dataclass(frozen=True)
class TraceShape:
    """The parameters of a generated trace; the defaults are near the conversation trace's."""

    requests_per_s: float = 3.4
    turns: float = 1.65  # of a conversation, on average
    think_s: float = 110.0  # between two turns, median
    think_spread: float = 1.4  # sigma of its logarithm
    first_tokens: float = 5800.0  # of a conversation's first prompt, median
    turn_tokens: float = 1100.0  # that each further turn adds, median
    spread: float = 1.1  # of lengths: sigma of their logarithm
    output_tokens: float = 270.0  # median
    max_input_tokens: int = 126_000


def make_trace(num_requests: int, rng: random.Random, shape: TraceShape = TraceShape()) -> list[TracedRequest]:
    """Conversations that share a system prompt, arrive at random and grow turn by turn.

    Some of them began before the trace, as if it was cut out of a longer period.
    """
    names = itertools.count(1)  # 0 is the system prompt's block
    found: list[TracedRequest] = []  # in order of arrival
    start_s = -EARLIER_S
    while len(found) < num_requests or found[num_requests - 1].arrival_s > start_s:
        start_s += rng.expovariate(shape.requests_per_s / shape.turns)
        for request in _conversation(start_s, names, rng, shape):
            if request.arrival_s >= 0.0:
                insort(found, request, key=lambda request: request.arrival_s)
    return found[:num_requests]


def _conversation(
    start_s: float, names: itertools.count[int], rng: random.Random, shape: TraceShape
) -> Sequence[TracedRequest]:
    tokens = _lognormal(shape.first_tokens, shape.spread, rng)
    full: list[int] = [0]  # names of full blocks
    turns: list[TracedRequest] = []
    at_s = start_s
    while tokens <= shape.max_input_tokens:
        output = max(1, min(2000, round(_lognormal(shape.output_tokens, 0.7, rng))))
        count = max(1, round(tokens))
        full += [next(names) for _ in range(count // BLOCK_TOKENS - len(full))]
        tail = [next(names)] if count % BLOCK_TOKENS and count // BLOCK_TOKENS else []
        blocks = tuple((full[: max(1, count // BLOCK_TOKENS)] + tail)[: -(-count // BLOCK_TOKENS)])
        turns.append(TracedRequest(at_s, count, output, blocks))
        if rng.random() < 1.0 / shape.turns:
            break
        at_s += _lognormal(shape.think_s, shape.think_spread, rng)
        tokens += output + _lognormal(shape.turn_tokens, shape.spread, rng)
    return turns


def _lognormal(median: float, sigma: float, rng: random.Random) -> float:
    return median * math.exp(sigma * rng.gauss(0.0, 1.0))
