"""Prompts as token ids, from a seeded generator. Pure; knows a vocabulary's size and no tokenizer.

Random tokens share no prefix, so they measure prefill itself; shared prefixes stand for system prompts and documents.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class PrefixShape:
    """`length` tokens at the start of each prompt are one of `num_prefixes` texts."""

    length: int
    num_prefixes: int


def random_prompts(num_prompts: int, length: int, vocab_size: int, rng: random.Random) -> list[Prompt]:
    """`num_prompts` prompts of `length` tokens, each token uniform over [0, vocab_size)."""
    if length < 1 or vocab_size < 1:
        raise ValueError(f"length and vocab_size must be at least 1, got {length} and {vocab_size}")
    vocabulary = range(vocab_size)
    return [tuple(rng.choices(vocabulary, k=length)) for _ in range(num_prompts)]


def shared_prefix_prompts(
    num_prompts: int, length: int, prefix: PrefixShape, vocab_size: int, rng: random.Random
) -> list[Prompt]:
    """Prompts of `length` tokens in all, the prefix among them. Each prefix is used equally often (+-1), shuffled."""
    if not 1 <= prefix.length < length:
        raise ValueError(f"the prefix must have 1 to {length - 1} tokens (less than the prompt), got {prefix.length}")
    if prefix.num_prefixes < 1:
        raise ValueError(f"num_prefixes must be at least 1, got {prefix.num_prefixes}")
    heads = random_prompts(prefix.num_prefixes, prefix.length, vocab_size, rng)
    tails = random_prompts(num_prompts, length - prefix.length, vocab_size, rng)
    prompts = [heads[i % len(heads)] + tail for i, tail in enumerate(tails)]
    rng.shuffle(prompts)
    return prompts
