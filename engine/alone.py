"""Runs requests to completion on an engine that has no others: for offline use, and to warm it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.errors import NoRoom
from engine.request import Request, SamplingParams
from kvstore.blocks import BlockHash, salted

if TYPE_CHECKING:
    from engine.engine import Engine

WARM_UP_TOKENS = 64  # enough work for each thread of a kernel, and fast on any machine
WARM_UP_PARAMS = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=2, ignore_eos=True)  # one decode step
MEASURE_S = 0.1  # a prefill step of at least this duration measures the speed of long prompts


def run_alone(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, root: BlockHash
) -> list[list[int]]:
    """The output tokens of each prompt, run to completion together. Raises `NoRoom` when blocks are lacking."""
    requests = [
        Request(f"generate-{index}", list(prompt), len(prompt), params, root, engine.layout.block_size)
        for index, prompt in enumerate(prompts)
    ]
    for request in requests:
        engine.add(request)
    while not all(request.is_finished for request in requests):
        outputs = engine.step()
        if not outputs:
            raise NoRoom("the blocks that these prompts need are held or pinned by others")
        for output in outputs:
            engine.unpin([block.block_id for block in output.full_blocks])
            if output.error is not None:
                raise output.error
    return [request.token_ids[request.num_prompt_tokens :] for request in requests]


def run_throw_away(engine: Engine) -> None:
    """Runs a prefill step and a decode step, as far as they fit into this engine."""
    _run_throw_away_of(engine, min(WARM_UP_TOKENS, _max_step_tokens(engine)), WARM_UP_PARAMS)


def measure_prefill(engine: Engine) -> None:
    """Runs prefill steps of growing length, as far as they fit, until one is long enough to measure long prompts.

    Only the last one counts: a step of few tokens takes longer per token.
    """
    num_tokens, params = WARM_UP_TOKENS, replace(WARM_UP_PARAMS, max_tokens=1)
    while True:
        num_tokens = min(num_tokens, _max_step_tokens(engine))
        engine.measure_anew()
        _run_throw_away_of(engine, num_tokens, params)
        speed = engine.long_prefill_tokens_per_s
        if num_tokens == _max_step_tokens(engine) or num_tokens >= MEASURE_S * speed:
            return
        num_tokens *= 2


def _run_throw_away_of(engine: Engine, num_tokens: int, params: SamplingParams) -> None:
    """Runs a request whose block names have a root of their own, so nobody can hit them."""
    if num_tokens > 0:
        prompt = [index % engine.vocab_size for index in range(num_tokens)]
        root = salted(engine.layout.root(), f"warm-up {num_tokens} {params.max_tokens}".encode())
        run_alone(engine, [prompt], params, root)


def _max_step_tokens(engine: Engine) -> int:
    return min(engine.config.max_num_batched_tokens, engine.max_model_len - WARM_UP_PARAMS.max_tokens)
