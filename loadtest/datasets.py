"""The sessions of a run, for its data set, model and endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.config import BenchConfig, BenchError, Data
from loadtest.exchange import ModelInfo
from loadtest.prompts import PrefixShape
from loadtest.replay import replay_prompts, scaled
from loadtest.sharegpt import BadShareGpt, read_sharegpt
from loadtest.trace import BadTrace, TracedRequest, make_trace, read_trace
from loadtest.wording import Vocabulary, Wording, Words
from loadtest.workload import (
    Dice,
    Session,
    Shape,
    as_text,
    conversations,
    from_prompts,
    random_sessions,
    sharegpt_like,
)

_UNKNOWN_VOCABULARY = 256  # ids that any model has


@dataclass(frozen=True)
class Material:
    """What a run sends. `times_s` is set if the data set has times of its own."""

    sessions: list[Session]
    times_s: list[float] | None = None
    left_out: int = 0  # requests that are longer than the model takes


def material_for(config: BenchConfig, model: ModelInfo, dice: Dice) -> Material:
    """Raises `BenchError` for requests that the model cannot take, and for an invalid file."""
    data = config.data
    wording = _wording(data) if _needs_text(config) else None
    vocab_size = wording.vocab_size if wording else model.vocab_size or _UNKNOWN_VOCABULARY
    try:
        material = _make(data, model.max_model_len, vocab_size, dice)
    except (BadTrace, BadShareGpt, OSError) as error:
        raise BenchError(f"--dataset-path: {error}") from error
    except ValueError as error:
        raise BenchError(str(error)) from error
    if not material.sessions:
        raise BenchError(f"--dataset {data.kind}: no request is left that the model takes")
    if wording is None:
        return material
    return Material(as_text(material.sessions, wording), material.times_s, material.left_out)


def _needs_text(config: BenchConfig) -> bool:
    """Token ids go over gRPC, and in single prompts to /v1/completions; an answer over HTTP is text."""
    return config.backend == "openai-chat" or (config.backend == "openai" and config.data.turns > 1)


def _wording(data: Data) -> Wording:
    try:
        return Vocabulary(data.tokenizer) if data.tokenizer else Words()
    except (ValueError, OSError) as error:
        raise BenchError(f"--tokenizer: {error}") from error


def _make(data: Data, max_model_len: int, vocab_size: int, dice: Dice) -> Material:
    if data.kind == "trace":
        return _traced(data, max_model_len, vocab_size, dice)
    if data.kind == "sharegpt":
        if data.file is None:
            return Material(sharegpt_like(data.num_prompts, max_model_len, vocab_size, dice))
        return _from_sharegpt(data, max_model_len, dice)
    prefix = PrefixShape(data.prefix_len, data.num_prefixes) if data.kind == "shared-prefix" else None
    is_multi = data.kind == "multi-turn"
    shape = Shape(data.input_len, data.output_len, prefix, data.turns if is_multi else 1, data.think_s)
    _check_length(shape, max_model_len)
    make = conversations if is_multi else random_sessions
    return Material(make(data.num_prompts, shape, vocab_size, dice))


def _check_length(shape: Shape, max_model_len: int) -> None:
    needed = shape.turns * (shape.input_len + shape.output_len)
    if max_model_len and needed > max_model_len:
        turns = f"{shape.turns} turns of " if shape.turns > 1 else ""
        wanted = f"{turns}--input-len {shape.input_len} + --output-len {shape.output_len}"
        raise BenchError(f"{wanted} is more than the {max_model_len} tokens that the model takes")


def _from_sharegpt(data: Data, max_model_len: int, dice: Dice) -> Material:
    """The requested number of conversations, drawn from the file; all of them if it has fewer."""
    assert data.file is not None
    sessions = read_sharegpt(data.file, _wording(data).count, data.turns, max_model_len)
    dice.of("sharegpt").shuffle(sessions)
    return Material(sessions[: data.num_prompts])


def _traced(data: Data, max_model_len: int, vocab_size: int, dice: Dice) -> Material:
    rng = dice.of("trace")
    if data.file is None:
        requests: Sequence[TracedRequest] = [
            request.faster(data.time_scale) for request in make_trace(data.num_prompts, rng)
        ]
    else:
        requests = read_trace(data.file, rng, data.trace_grain_s, data.time_scale)[: data.num_prompts]
    block_tokens = data.trace_block_tokens
    fitting = [r for r in requests if not max_model_len or sum(scaled(r, block_tokens)) <= max_model_len]
    nonce = f"{dice.seed}/{dice.nonce}"
    prompts = replay_prompts(fitting, block_tokens, vocab_size, nonce)
    sessions = from_prompts(prompts, [scaled(request, block_tokens)[1] for request in fitting])
    start_s = fitting[0].arrival_s if fitting else 0.0
    times_s = [request.arrival_s - start_s for request in fitting]
    return Material(sessions, times_s, len(requests) - len(fitting))
