"""Requests over time: Mooncake's traces read, and traces of the same shape made. Pure but for reading a file.

A trace is one JSON object a line: `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, the names
of the prompt's blocks of 512 tokens, the last, partly filled one included. Equal names mean equal prefixes.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512
GRAIN_S = 3.0  # Mooncake's time stamps are multiples of it
MAX_TOKENS = 1 << 24  # of one request; a trace that says more is broken


class BadTrace(ValueError):
    """A line that is no request; names the line and the field."""


@dataclass(frozen=True)
class TracedRequest:
    """One request of a trace."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]  # names, ceil(input_tokens / 512) of them


def read_trace(path: Path, rng: random.Random, grain_s: float = GRAIN_S, scale: float = 1.0) -> list[TracedRequest]:
    """A trace in order of arrival. Raises `BadTrace`, OSError.

    Each request comes at a random moment of its `grain_s`, or bursts that never were would be measured; then time is
    divided by `scale`: 2.0 is twice the load.
    """
    requests = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                requests.append(_parse(line, f"{path.name}, line {number}"))
    jittered = [(request.arrival_s + rng.uniform(0.0, grain_s)) / scale for request in requests]
    order = sorted(range(len(requests)), key=jittered.__getitem__)
    return [_at(requests[index], jittered[index]) for index in order]


def _parse(line: str, where: str) -> TracedRequest:
    try:
        data = json.loads(line)
        timestamp, blocks = data["timestamp"], data["hash_ids"]
        lengths = (data["input_length"], data["output_length"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadTrace(f"{where}: not a request of a trace: {error!r}") from error
    if not isinstance(timestamp, int | float) or not 0 <= timestamp < 1e12:
        raise BadTrace(f"{where}: timestamp must be milliseconds, got {timestamp!r}")
    if any(type(length) is not int or not 1 <= length <= MAX_TOKENS for length in lengths):
        raise BadTrace(f"{where}: input_length and output_length must be 1 to {MAX_TOKENS}, got {lengths!r}")
    if not isinstance(blocks, list) or any(type(block) is not int for block in blocks):
        raise BadTrace(f"{where}: hash_ids must be a list of whole numbers")
    if len(blocks) != -(-lengths[0] // BLOCK_TOKENS):
        raise BadTrace(f"{where}: {len(blocks)} hash_ids for {lengths[0]} tokens; one for each {BLOCK_TOKENS}")
    return TracedRequest(timestamp / 1000.0, lengths[0], lengths[1], tuple(blocks))


def _at(request: TracedRequest, arrival_s: float) -> TracedRequest:
    return TracedRequest(arrival_s, request.input_tokens, request.output_tokens, request.blocks)


@dataclass(frozen=True)
class TraceShape:
    """What a made trace looks like; the defaults are near the conversation trace's."""

    requests_per_s: float = 3.4
    turns: float = 1.65  # of a conversation, on average
    think_s: float = 110.0  # between two turns, median
    first_tokens: float = 5800.0  # of a conversation's first prompt, median
    turn_tokens: float = 1100.0  # that each further turn adds, median
    spread: float = 1.1  # of lengths: sigma of their logarithm
    output_tokens: float = 330.0  # median
    max_input_tokens: int = 126_000


def make_trace(num_requests: int, rng: random.Random, shape: TraceShape = TraceShape()) -> list[TracedRequest]:
    """Conversations that begin with the same system prompt, come at random and grow turn by turn."""
    names = itertools.count(1)  # 0 is the system prompt's block
    found: list[TracedRequest] = []
    start_s, span_s = 0.0, num_requests / shape.requests_per_s
    while start_s < span_s or len(found) < num_requests:
        start_s += rng.expovariate(shape.requests_per_s / shape.turns)
        found += _conversation(start_s, names, rng, shape)
    found.sort(key=lambda request: request.arrival_s)  # later turns of late conversations are cut off
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
        at_s += _lognormal(shape.think_s, 0.9, rng)
        tokens += output + _lognormal(shape.turn_tokens, shape.spread, rng)
    return turns


def _lognormal(median: float, sigma: float, rng: random.Random) -> float:
    return median * float(2.718281828459045 ** (sigma * rng.gauss(0.0, 1.0)))
