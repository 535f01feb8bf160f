"""Which tokens may come next, as decided by code that knows text: an engine knows only token ids.

A mask depends on the output tokens so far and on nothing else, so whatever moves a request (preemption, hand-off,
failover) need not move any state of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import InvalidRequest
from engine.request import Request

logger = logging.getLogger(__name__)

WORD_BITS = 32

Words = NDArray[np.uint32]


class TokenMask(Protocol):
    """One request's mask. Called on the engine's thread once per token, while the model computes; it must be fast."""

    def fill(self, output_ids: Sequence[int], words: Words) -> None:
        """Sets the bits of the tokens that may follow `output_ids`; bit 0 of word 0 is token 0.

        `words` is `[ceil(vocab / 32)]`, all zero at first. `output_ids` grows from call to call. Raises
        `InvalidRequest` when no mask can be computed, which ends the request; so does any other exception.
        """


class Masks:
    """The masks of a step's requests that have one, by row of the logits; `words` is `[masks, ceil(vocab / 32)]`."""

    def __init__(
        self, words: Words, vocab_size: int, index_of: dict[int, int], errors: dict[int, InvalidRequest]
    ) -> None:
        """`index_of` maps a row to its index in `words`; `errors` has the rows whose mask failed."""
        self.errors = errors
        self._words = words
        self._vocab_size = vocab_size
        self._index_of = index_of

    @property
    def rows(self) -> Sequence[int]:
        """The rows whose mask is known."""
        return list(self._index_of)

    def allowed(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The allowed tokens of these rows, bool `[len(rows), vocab]`, on `device`; at least one in each row."""
        packed = self._words[[self._index_of[row] for row in rows]].view(np.uint8)
        if device.type == "cpu":  # numpy's is several times as fast
            bits = np.unpackbits(packed, axis=-1, count=self._vocab_size, bitorder="little")
            return torch.from_numpy(bits.view(np.bool_))
        shifts = torch.arange(8, dtype=torch.uint8, device=device)  # the bits are moved, and unpacked there
        spread = torch.from_numpy(packed).to(device)[:, :, None] >> shifts & 1
        return spread.flatten(1)[:, : self._vocab_size].bool()


def fill_masks(requests: Sequence[Request], vocab_size: int) -> Masks | None:
    """The masks of all requests that have one, in one array; None if no request has one."""
    rows = [row for row, request in enumerate(requests) if request.mask is not None]
    if not rows:
        return None
    words = np.zeros((len(rows), -(-vocab_size // WORD_BITS)), dtype=np.uint32)
    index_of: dict[int, int] = {}
    errors: dict[int, InvalidRequest] = {}
    for index, row in enumerate(rows):
        try:
            _fill(requests[row], words[index], vocab_size)
            index_of[row] = index
        except InvalidRequest as error:
            errors[row] = error
        except Exception as error:  # others' code: it may cost its own request, not the engine that all of them share
            logger.exception("event=mask_failed request=%s", requests[row].request_id)
            errors[row] = InvalidRequest("sampling.grammar", f"its mask failed with {type(error).__name__}: {error}")
    return Masks(words, vocab_size, index_of, errors)


def _fill(request: Request, words: Words, vocab_size: int) -> None:
    assert request.mask is not None
    request.mask.fill(request.token_ids[request.num_prompt_tokens :], words)
    if vocab_size % WORD_BITS:  # bits beyond the vocabulary belong to no token
        words[-1] &= (1 << vocab_size % WORD_BITS) - 1
    if not words.any():
        raise InvalidRequest("sampling.grammar", "no token may come behind those that are there")
