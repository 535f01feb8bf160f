"""Penalties on tokens that a request has already. Which these are is kept from one token to the next: to look for them
anew takes milliseconds where there are 32,000. It follows from the tokens, so whatever moves a request (preemption,
hand-off, failover) need not move it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from engine.request import Request, SamplingParams


class SeenTokens:
    """Each token once, in no order, on the device of the logits; a request's tokens only become more."""

    def __init__(self, device: torch.device, num_skipped: int = 0) -> None:
        """The first `num_skipped` tokens do not matter."""
        self.ids = torch.empty(0, dtype=torch.int64, device=device)
        self.times = torch.empty(0, dtype=torch.float32, device=device)  # in the output; 0: in the prompt alone
        self._places: dict[int, int] = {}  # in `ids`, by id
        self._num_read = num_skipped

    def read(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Takes in the tokens that it has not seen, and looks at no others."""
        times = Counter(dict.fromkeys(token_ids[self._num_read : num_prompt_tokens], 0))
        times.update(token_ids[max(self._num_read, num_prompt_tokens) :])
        self._num_read = len(token_ids)
        new = [token_id for token_id in times if token_id not in self._places]
        self._places.update(zip(new, range(len(self._places), len(self._places) + len(new)), strict=True))
        self.ids = torch.cat([self.ids, self.ids.new_tensor(new)])
        places = self.ids.new_tensor([self._places[token_id] for token_id in times])
        more = self.times.new_tensor(list(times.values()))
        self.times = functional.pad(self.times, (0, len(new))).index_add(0, places, more)


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def penalised(scores: Tensor, request: Request) -> Tensor:
    """Repetition counts prompt and output (as transformers), presence and frequency the output alone (as OpenAI).

    `scores` is float32 `[vocab]` and is left as it is.
    """
    params, seen = request.params, _seen_tokens(request, scores.device)
    old = scores[seen.ids]
    if params.repetition_penalty != 1.0:
        old = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    less = params.presence_penalty + params.frequency_penalty * seen.times
    return scores.index_copy(0, seen.ids, torch.where(seen.times > 0, old - less, old))


def _seen_tokens(request: Request, device: torch.device) -> SeenTokens:
    if request.seen_tokens is None:
        num_skipped = request.num_prompt_tokens if request.params.repetition_penalty == 1.0 else 0
        request.seen_tokens = SeenTokens(device, num_skipped)
    request.seen_tokens.read(request.token_ids, request.num_prompt_tokens)
    return request.seen_tokens
