"""Lengths of prompts and answers, drawn as in ShareGPT's conversations. Pure."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

_FEWEST_TOKENS = 64  # below that nearly no draw would fit


@dataclass(frozen=True)
class ShareGptShape:
    """Log-normal lengths in tokens, within the bounds by which `vllm bench serve` filters ShareGPT.

    The means are near those of its 1,000 prompts: about 220 tokens in and 200 out.
    """

    input_tokens: float = 155.0  # median
    input_spread: float = 1.4  # sigma of the logarithm
    output_tokens: float = 130.0
    output_spread: float = 1.0
    min_tokens: int = 4
    max_input_tokens: int = 1024
    max_total_tokens: int = 2048


def sharegpt_lengths(
    count: int, max_total_tokens: int, rng: random.Random, shape: ShareGptShape = ShareGptShape()
) -> list[tuple[int, int]]:
    """`count` pairs (tokens in, tokens out) of at most `max_total_tokens`, which is at least 64."""
    limit = min(max_total_tokens, shape.max_total_tokens)
    if limit < _FEWEST_TOKENS:
        raise ValueError(f"{limit} tokens are too few for conversations (at least {_FEWEST_TOKENS})")
    found: list[tuple[int, int]] = []
    while len(found) < count:
        num_in = round(shape.input_tokens * math.exp(rng.gauss(0.0, shape.input_spread)))
        num_out = round(shape.output_tokens * math.exp(rng.gauss(0.0, shape.output_spread)))
        if min(num_in, num_out) >= shape.min_tokens and num_in <= shape.max_input_tokens and num_in + num_out <= limit:
            found.append((num_in, num_out))
    return found
