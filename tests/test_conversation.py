"""A conversation through a real cluster: each turn hits what the turns before it left, also what decoding filled."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import POCKET, RedisProcess
from harness import ProcessCluster, reference

pytestmark = pytest.mark.cluster

BLOCK_SIZE = 16
TURN_TOKENS = 40  # of the answer: two to three full blocks that decoding fills
QUESTIONS = (
    "A generator is a function that yields. What else is there to know about it, and when is it of use?\n",
    "And what does `send` do?\n",
    "How is it closed?\n",
    "What happens to the `finally` clauses of a generator that nobody ever closes?\n",
    "Thank you. Is it the same for coroutines?\n",
)


@pytest.fixture
async def cluster() -> AsyncIterator[ProcessCluster]:
    redis_process = RedisProcess()
    folder = Path(tempfile.mkdtemp(prefix="baton-", dir="/dev/shm"))
    cluster = ProcessCluster(POCKET, redis_process.url, folder, max_num_batched_tokens=64)
    try:
        await cluster.start(prefill=1, decode=1)
        yield cluster
    finally:
        await cluster.stop()
        redis_process.close()
        shutil.rmtree(folder, ignore_errors=True)


async def test_each_of_five_turns_hits_the_blocks_of_all_before(cluster: ProcessCluster) -> None:
    history: list[int] = [256]  # the beginning of a text
    prompts, answers, num_legs = [], [], 0
    for question in QUESTIONS:
        # The last token that was put out was never computed; a block that it fills is nobody's.
        computed = max(0, len(history) - 1) // BLOCK_SIZE * BLOCK_SIZE
        prompt = history + list(question.encode())
        answer = await cluster.generate(prompt, max_tokens=TURN_TOKENS, ignore_eos=True)
        assert answer.usage is not None and answer.timeline is not None
        assert answer.usage.local_hit_tokens + answer.usage.store_hit_tokens == computed
        num_legs += 1 + bool(answer.timeline.prefill_node)
        prompts.append(prompt)
        answers.append(answer.token_ids)
        history = prompt + answer.token_ids
        await cluster.assert_quiet()  # pins are given back when the blocks are published
    assert answers == [reference(POCKET, [prompt], TURN_TOKENS, ignore_eos=True)[0] for prompt in prompts]
    assert num_legs > len(QUESTIONS), "no turn was handed over"
