"""Several answers to one prompt, of which the others follow the first: they set out when it has begun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from batonpb import common_pb2, inference_pb2


class Lead:
    """What the first has for those that follow it: that it has begun, and the prompt's logprobs."""

    def __init__(self) -> None:
        self._begins = asyncio.Event()
        self._scores: common_pb2.PromptLogprobs | None = None

    def tell(self, scores: common_pb2.PromptLogprobs | None) -> None:
        """For each of its responses; the first one has the logprobs, where they were asked for."""
        self._scores = self._scores or scores
        self._begins.set()

    async def begins(self) -> common_pb2.PromptLogprobs | None:
        await self._begins.wait()
        return self._scores


async def after(
    lead: Lead, stream: AsyncGenerator[inference_pb2.GenerateResponse, None]
) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
    """The stream, which is not begun before its lead; the prompt's logprobs come with its first response, too."""
    scores = await lead.begins()
    async with aclosing(stream):
        async for response in stream:
            if scores is not None:
                response.prompt_logprobs.CopyFrom(scores)
                scores = None
            yield response
