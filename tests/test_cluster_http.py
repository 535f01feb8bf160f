"""A prefill and a decode node behind the HTTP door, asked by the `openai` client as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import POCKET, RedisProcess
from harness import ProcessCluster
from openai import AsyncOpenAI

pytestmark = [pytest.mark.cluster]


@pytest.fixture
async def client(redis_process: RedisProcess, short_dir: Path) -> AsyncIterator[AsyncOpenAI]:
    cluster = ProcessCluster(POCKET, redis_process.url, short_dir)
    try:
        await cluster.start(prefill=1, decode=1)
        address = cluster.processes["router"].record["http_address"]
        async with AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
            yield client
        await cluster.assert_quiet()
    finally:
        await cluster.stop()


async def test_a_conversation_hits_what_was_said(client: AsyncOpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "What is a generator in Python? " * 8}]
    asked: dict[str, Any] = {"model": "pocket", "messages": turns, "max_tokens": 24, "temperature": 0}
    asked |= {"logit_bias": {"257": -100}}  # it goes on to the end of its 24 tokens
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last = [
        chunk async for chunk in await client.chat.completions.create(**asked, stream=True, stream_options=options)
    ]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    first = last.usage
    assert text and first is not None and first.completion_tokens == 24
    usages = [chunk.usage for chunk in pieces if chunk.usage is not None]
    assert len(usages) == len(pieces) and {usage.prompt_tokens for usage in usages} == {first.prompt_tokens}
    counts = [usage.completion_tokens for usage in usages]
    assert counts == sorted(counts) and counts[0] < counts[-1] == 24

    turns += [{"role": "assistant", "content": text}, {"role": "user", "content": "And a list?"}]
    # What LangChain and its like send along.
    further: dict[str, Any] = {"n": 1, "stream": False, "user": "u", "seed": None, "parallel_tool_calls": None}
    further |= {"extra_body": {"top_k": -1, "repetition_penalty": 1.0, "best_of": 1, "skip_special_tokens": True}}
    answer = await client.chat.completions.create(**asked, **further)
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens > first.prompt_tokens and answer.choices[0].message.content
    details = usage.prompt_tokens_details
    assert details is not None and (details.cached_tokens or 0) >= first.prompt_tokens // 16 * 16
