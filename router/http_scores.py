"""Log probabilities of a prompt in the shapes that OpenAI's and vLLM's clients read. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from batonpb import common_pb2

Json = dict[str, Any]
Piece = Callable[[int], bytes]  # a token as it is written
LEAST_LOGPROB = -9999.0  # OpenAI's word for minus infinity, which JSON has not


@dataclass(frozen=True)
class Scored:
    """One token of a prompt."""

    token_id: int
    logprob: float | None  # None: it is the first one
    rank: int
    top: list[tuple[int, float]]  # alternatives, most likely first


def scored(scores: common_pb2.PromptLogprobs) -> Iterator[Scored]:
    """A prompt's tokens in order."""
    first, *others = scores.token_ids
    yield Scored(first, None, 0, [])
    logprobs, ranks, size = list(scores.logprobs), list(scores.ranks), scores.num_top
    top = list(zip(scores.top_token_ids, scores.top_logprobs, strict=True))
    for index, token_id in enumerate(others):
        alternatives = top[index * size : (index + 1) * size]
        yield Scored(
            token_id, finite(logprobs[index]), ranks[index], [(one, finite(value)) for one, value in alternatives]
        )


def prompt_entries(scores: common_pb2.PromptLogprobs, piece: Piece) -> list[Json | None]:
    """vLLM's `prompt_logprobs`: of each token an object, by token ids, of its own logprob and its alternatives'."""
    return [None if token.logprob is None else _entry(token, piece) for token in scored(scores)]


def _entry(token: Scored, piece: Piece) -> Json:
    entry = {str(token.token_id): _shown(token.logprob, token.rank, piece(token.token_id))}
    for rank, (token_id, logprob) in enumerate(token.top, 1):
        entry.setdefault(str(token_id), _shown(logprob, rank, piece(token_id)))
    return entry


def _shown(logprob: float | None, rank: int, data: bytes) -> Json:
    return {"logprob": logprob, "rank": rank, "decoded_token": data.decode(errors="replace")}


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
