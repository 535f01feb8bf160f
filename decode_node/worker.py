"""The second leg of a request: hold blocks, fetch while others publish, compute the rest, stream tokens.

Also the only leg of a request that skips the prefill leg. Knows no gRPC and no other node. Blocks that fill up during
decoding are published too, for the next turn of the conversation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from engine.loop import EngineLoop, OutputStream
from engine.request import FinishReason, FullBlock, OutputToken, Request, RequestOutput
from kvstore.quotas import SHARED, Owner
from node.admission import Admission
from node.fetcher import Fetcher
from node.intake import Intake
from node.publisher import Publisher

Publish = Callable[[Sequence[FullBlock]], object]  # takes over the blocks' pins


class DecodeLeg:
    """An admitted request. It fetches from the start on. To be `run` once; its last tokens come with its end."""

    def __init__(
        self, fetcher: Fetcher, publish: Publish, request: Request, outputs: OutputStream, free_blocks: int
    ) -> None:
        self.request = request
        self.free_blocks = free_blocks  # of the node, after this request's
        self.finish_reason: FinishReason | None = None
        self.compute_s = 0.0  # from its first step to its first token
        self.queue_s = 0.0  # from `run` to its first step
        self.fetch_s = 0.0  # part of that: until it had its blocks
        self._ran_s = 0.0
        self._fetcher = fetcher
        self._publish = publish
        self._waiting: list[RequestOutput] = []  # not yet taken by `run`
        self._has_waiting = asyncio.Event()
        self._is_started = asyncio.Event()
        self._fetching = asyncio.create_task(fetcher.follow(self._is_started))
        self._listening = asyncio.create_task(self._listen(outputs))

    async def run(self, token_ids: Sequence[int], num_coming_blocks: int = 0) -> AsyncIterator[list[OutputToken]]:
        """Yields the tokens after `token_ids`, which were sampled elsewhere; those that have accumulated come together.

        The first `num_coming_blocks` of the request's blocks are announced to be in an arena or on their way into one.

        Raises `InvalidRequest` if the request's mask allows no token; earlier tokens have been yielded by then.
        """
        # 1. The tokens, before the last blocks: with them, even the block that ends the prompt need not be computed.
        # The engine looks at a held request only when it is told to, which nobody does now.
        self._ran_s = time.perf_counter()
        self._is_started.set()
        await self._fetching
        for token_id in token_ids:
            self.request.append(token_id)
        # 2. Missing blocks: the last blocks of prefill are published while its token travels. Those that do not
        # come are computed.
        await self._fetcher.release(num_coming_blocks)
        self.fetch_s = time.perf_counter() - self._ran_s
        # 3. The tokens, until the last.
        while self.finish_reason is None:
            outputs = await self._take()
            last = outputs[-1]
            if last.error is None:
                self.finish_reason = last.finish_reason
            if tokens := [token for output in outputs for token in output.tokens]:
                yield tokens
            if last.error is not None:
                raise last.error

    def close(self) -> None:
        self._fetching.cancel()
        self._listening.cancel()

    async def _listen(self, outputs: OutputStream) -> None:
        """Takes outputs as they come, so that a slow reader of the tokens does not keep blocks pinned."""
        try:
            async for output in outputs:
                if output.tokens and not self.compute_s and self.request.started_s is not None:
                    self.compute_s = time.perf_counter() - self.request.started_s  # the engine's clock
                    self.queue_s = max(0.0, self.request.started_s - self._ran_s)
                self._publish(output.full_blocks)
                self._waiting.append(output)
                self._has_waiting.set()
        finally:
            self._has_waiting.set()

    async def _take(self) -> list[RequestOutput]:
        """At least one output. Raises the error that ended the engine's stream early."""
        await self._has_waiting.wait()
        self._has_waiting.clear()
        outputs, self._waiting = self._waiting, []
        if not outputs:
            await self._listening
            raise RuntimeError("the engine ended a request without a reason")
        return outputs


class DecodeWorker:
    """Runs decode legs on one engine."""

    def __init__(self, loop: EngineLoop, intake: Intake, publisher: Publisher, admission: Admission) -> None:
        self._loop = loop
        self._intake = intake
        self._publisher = publisher
        self._admission = admission

    @asynccontextmanager
    async def admit(self, request: Request, owner: Owner = SHARED) -> AsyncIterator[DecodeLeg]:
        """Holds blocks for `request` inside the context. They belong to `owner`.

        Raises `Draining`, `NoRoom`, `InvalidRequest`.
        """
        with self._admission.leg(request) as outputs:
            free_blocks = await self._admission.hold(request)
            fetcher = Fetcher(self._loop, self._intake, request, owner)
            publish = partial(self._publisher.publish, owner=owner)
            leg = DecodeLeg(fetcher, publish, request, outputs, free_blocks)
            try:
                yield leg
            finally:
                leg.close()
