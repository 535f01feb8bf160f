"""Which tokens may come next, told by somebody who knows text: an engine knows token ids alone.

A mask follows from the output tokens so far and from nothing else, so whatever moves a request (preemption, hand-off,
failover) need not move any state of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import InvalidRequest
from engine.request import Request

WORD_BITS = 32

Words = NDArray[np.uint32]


class TokenMask(Protocol):
    """One request's. Called on the engine's thread once for each token, while a GPU computes; it should be quick."""

    def fill(self, output_ids: Sequence[int], words: Words) -> None:
        """Sets the bits of the tokens that may come behind `output_ids`, bit 0 of word 0 for token 0.

        `words` is `[ceil(vocab / 32)]` and comes zeroed. Calls for one request come with outputs that grow. Raises
        `InvalidRequest` where nothing can be told, which ends the request.
        """


class Masks:
    """Of the requests in a step that have one; `words` is `[len(row_of), ceil(vocab / 32)]`."""

    def __init__(self, words: Words, row_of: dict[int, int], errors: dict[int, InvalidRequest]) -> None:
        """`row_of` and `errors` go by a request's place in the step."""
        self._words = words
        self._row_of = row_of
        self.errors = errors

    def __contains__(self, place: int) -> bool:
        return place in self._row_of

    def allowed_ids(self, place: int, logits: Tensor) -> Tensor:
        """The ids that a request may take, ascending, on the device of its `logits`, `[vocab]`."""
        row = self._words[self._row_of[place]].view(np.uint8)
        if logits.device.type == "cpu":  # numpy's is several times as fast
            return torch.from_numpy(np.unpackbits(row, bitorder="little").nonzero()[0])
        bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
        return (torch.from_numpy(row).to(logits.device)[:, None] >> bits & 1).flatten().nonzero()[:, 0]


def fill_masks(requests: Sequence[Request], vocab_size: int) -> Masks | None:
    """The masks of all requests that have one, each in a row of the same memory; None where no request has one."""
    places = [place for place, request in enumerate(requests) if request.mask is not None]
    if not places:
        return None
    words = np.zeros((len(places), -(-vocab_size // WORD_BITS)), dtype=np.uint32)
    row_of: dict[int, int] = {}
    errors: dict[int, InvalidRequest] = {}
    for row, place in enumerate(places):
        try:
            _fill(requests[place], words[row], vocab_size)
            row_of[place] = row
        except InvalidRequest as error:
            errors[place] = error
    return Masks(words, row_of, errors)


def _fill(request: Request, words: Words, vocab_size: int) -> None:
    assert request.mask is not None
    request.mask.fill(request.token_ids[request.num_prompt_tokens :], words)
    if vocab_size % WORD_BITS:  # bits behind the vocabulary stand for no token
        words[-1] &= (1 << vocab_size % WORD_BITS) - 1
    if not words.any():
        raise InvalidRequest("sampling.grammar", "no token may come behind those that are there")
