"""Log probabilities of a prompt in the shapes that OpenAI's and vLLM's clients read. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from batonpb import common_pb2
from router.errors import InvalidRequest

Json = dict[str, Any]
Piece = Callable[[int], bytes]  # a token as it is written
LEAST_LOGPROB = -9999.0  # OpenAI's word for minus infinity, which JSON has not
# Of all prompts of a call whose answer is one object; four times what one prompt may have. Each takes some 65 bytes of
# JSON, and several times that until it is written.
MAX_ENTRIES = 1 << 19


@dataclass(frozen=True)
class Scored:
    """One token of a prompt."""

    token_id: int
    logprob: float | None  # None: it is the first one
    rank: int
    top: list[tuple[int, float]]  # alternatives, most likely first


class Entries:
    """How many logprobs of prompts an answer holds."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, scores: common_pb2.PromptLogprobs) -> None:
        """Raises `InvalidRequest` for more than an answer may have."""
        self._count += len(scores.token_ids) * (scores.num_top + 1)
        if self._count > MAX_ENTRIES:
            problem = f"tokens of all prompts times it and one more may be {MAX_ENTRIES} at most"
            raise InvalidRequest("prompt_logprobs", f"{problem} where the answer is no stream")


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
