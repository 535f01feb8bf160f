"""Log probabilities of tokens that are there already, out of the logits in front of each. Knows no request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.request import PromptLogprobs

SLICE_ROWS = 64  # at a time, for each takes several times the memory of its logits


def score(logits: Tensor, token_ids: Sequence[int], num_top: int) -> PromptLogprobs:
    """Of the token that came behind each row of `logits`, float32 `[len(token_ids), vocab]`, on any device.

    As in `engine.sampler` these are of the raw logits. `num_top` is at most the vocabulary.
    """
    scores = PromptLogprobs(num_top)
    taken_ids = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    for begin in range(0, len(token_ids), SLICE_ROWS):
        rows = slice(begin, begin + SLICE_ROWS)
        logprobs = logits[rows].log_softmax(-1)
        taken = logprobs.gather(1, taken_ids[rows, None])  # [rows, 1]
        top = logprobs.topk(num_top)
        scores.logprobs += taken[:, 0].tolist()
        scores.ranks += ((logprobs > taken).sum(1) + 1).tolist()
        scores.top_ids += top.indices.flatten().tolist()
        scores.top_logprobs += top.values.flatten().tolist()
    return scores
