"""Prompts for a trace: each block hash becomes tokens, so that what the trace reuses is reused. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence

from loadtest.prompts import Prompt
from loadtest.trace import BLOCK_TOKENS, TracedRequest


def scaled(request: TracedRequest, block_tokens: int) -> tuple[int, int]:
    """Tokens in and out if a block is `block_tokens` instead of 512, for models with a shorter context."""
    if block_tokens == BLOCK_TOKENS:
        return request.input_tokens, request.output_tokens
    full, rest = divmod(request.input_tokens, BLOCK_TOKENS)
    num_out = max(1, round(request.output_tokens * block_tokens / BLOCK_TOKENS))
    return full * block_tokens + -(-rest * block_tokens // BLOCK_TOKENS), num_out


def replay_prompts(requests: Sequence[TracedRequest], block_tokens: int, vocab_size: int, nonce: str) -> list[Prompt]:
    """The prompt of each request. Equal hashes give equal tokens; a different `nonce` gives different tokens."""
    vocabulary = range(vocab_size)
    blocks: dict[int, list[int]] = {}
    prompts = []
    for request in requests:
        tokens: list[int] = []
        for name in request.blocks:
            if name not in blocks:
                blocks[name] = random.Random(f"{nonce}/{name}").choices(vocabulary, k=block_tokens)
            tokens += blocks[name]
        prompts.append(tuple(tokens[: scaled(request, block_tokens)[0]]))
    return prompts
