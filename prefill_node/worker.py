"""The first leg of a request: fetch the hit, run the rest in chunks, publish each chunk's full blocks, one token.

Knows no gRPC and no other node. Whatever the store fails to do costs computation, never the answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from engine.loop import EngineLoop, OutputStream
from engine.request import FinishReason, OutputToken, Request
from kvstore.client import KVClient
from node.admission import Admission
from node.fetcher import Fetcher
from node.publisher import Publisher

logger = logging.getLogger(__name__)

FLUSH_WAIT_S = 2.0  # for the last blocks to reach the arena; after that the decode node computes what it misses


@dataclass(frozen=True)
class Prefilled:
    """What a prefill leg leaves: its token, and how it came to it. Hits in tokens.

    `queue_s` goes from receipt until the first step with this request: room, the store's blocks and the engine's queue
    are waited for. `compute_s` goes from there to the token.
    """

    token: OutputToken
    finish_reason: FinishReason
    local_hit_tokens: int
    store_hit_tokens: int
    queue_s: float
    compute_s: float


class PrefillWorker:
    """Runs prefill legs on one engine."""

    def __init__(self, loop: EngineLoop, store: KVClient, publisher: Publisher, admission: Admission) -> None:
        self._loop = loop
        self._store = store
        self._publisher = publisher
        self._admission = admission

    async def prefill(self, request: Request) -> Prefilled:
        """One token for `request`, whose `handoff_after` is 1. Raises `Draining`, `Busy`, `InvalidRequest`."""
        received = time.perf_counter()  # the engine's clock
        with self._admission.leg(request) as outputs:
            await self._admission.hold_in_turn(request)
            await Fetcher(self._loop, self._store, request).fetch()
            await self._loop.call(lambda engine: engine.release(request.request_id))
            token, finish_reason = await self._first_token(outputs)
            computed = time.perf_counter()
            await self._flush()
        assert request.started_s is not None, "a token came from no step"
        return Prefilled(
            token=token,
            finish_reason=finish_reason,
            local_hit_tokens=request.num_local_hit_tokens,
            store_hit_tokens=request.num_store_hit_tokens,
            queue_s=request.started_s - received,
            compute_s=computed - request.started_s,
        )

    async def _first_token(self, outputs: OutputStream) -> tuple[OutputToken, FinishReason]:
        async for output in outputs:
            self._publisher.publish(output.full_blocks)
            if output.finish_reason is not None:
                return output.tokens[-1], output.finish_reason
        raise RuntimeError("the engine ended a prefill leg without a token")

    async def _flush(self) -> None:
        try:
            async with asyncio.timeout(FLUSH_WAIT_S):
                await self._publisher.flush()
        except TimeoutError:
            logger.warning("event=flush_late waited_s=%.1f", FLUSH_WAIT_S)
