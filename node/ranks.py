"""The other ranks, as a wide node's leader calls them outside of steps: to publish and to fetch their pieces.

Each rank moves its own share of a block's bytes, between its own cache and its own machine's arena. The leader sets no
deadline on a call: until its answer, a rank may read or write the blocks, so they stay pinned. A rank that breaks a
call counts as lost, and the node with it. So does one that does not report its work each second, because calls to it
would never end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc

from batonpb import rank_pb2, rank_pb2_grpc
from engine.loop import EngineLoop
from engine.request import FullBlock, Request
from kvstore.blocks import BlockHash
from kvstore.quotas import NO_TENANT, Owner
from node.gate import AUTHORIZATION

ASK_S = 1.0  # how often ranks are asked for their work

T = TypeVar("T")


class Ranks:
    """One per wide node. `on_lost` is called when a rank is lost, and ends the node."""

    def __init__(
        self,
        loop: EngineLoop,
        channels: Sequence[grpc.aio.Channel],
        on_lost: Callable[[BaseException], None],
        token: str = "",
    ) -> None:
        """`token` is the cluster's; "" if the ranks require none."""
        self.work = {rank: rank_pb2.Work() for rank in range(1, len(channels) + 1)}  # as last reported by each
        self._loop = loop
        self._channels = channels
        self._stubs = [rank_pb2_grpc.RankStub(channel) for channel in channels]  # type: ignore[no-untyped-call]
        self._metadata = ((AUTHORIZATION, f"Bearer {token}"),) if token else None
        self._on_lost = on_lost
        self._calls: set[asyncio.Task[Any]] = set()
        self._watching: list[asyncio.Task[None]] = []

    def watch(self, timeout_s: float) -> None:
        """From now on a rank that is silent for `timeout_s` is lost."""
        self._watching = [asyncio.create_task(self._watch(rank, timeout_s)) for rank in self.work]

    async def publish(self, blocks: Sequence[FullBlock], owner: Owner) -> None:
        """Returns when all ranks have published their pieces of these pinned blocks, or given them up."""
        steps = self._loop.engine.num_told_steps
        message = _blocks([b.block_hash for b in blocks], [b.block_id for b in blocks], steps, owner)
        await self._to_end(
            self._ask(lambda stub: stub.Publish(rank_pb2.PublishRequest(blocks=message), metadata=self._metadata))
        )

    async def fetch(self, request: Request, hashes: Sequence[BlockHash], owner: Owner, limit_s: float) -> int:
        """Fetches the blocks after what a held request has into all caches; returns how many of them all ranks have.

        Raises `UnknownRequest`. Runs to completion even when the caller is cancelled.
        """
        return await self._to_end(self._fetch(request, hashes, owner, limit_s))

    async def close(self) -> None:
        """Waits for the running calls; they always end, as a lost rank ends the node."""
        await asyncio.gather(*self._calls, return_exceptions=True)
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def _watch(self, rank: int, timeout_s: float) -> None:
        heard_s = time.monotonic()
        while True:
            try:
                call = self._stubs[rank - 1].GetWork(
                    rank_pb2.GetWorkRequest(), metadata=self._metadata, timeout=timeout_s
                )
                self.work[rank] = await call
                heard_s = time.monotonic()
            except grpc.aio.AioRpcError as error:
                is_broken = error.code() is grpc.StatusCode.UNAVAILABLE  # the channel recovers, or the rank is lost
                if not is_broken or time.monotonic() - heard_s > timeout_s:
                    self._on_lost(error)
                    return
            await asyncio.sleep(ASK_S)

    async def _fetch(self, request: Request, hashes: Sequence[BlockHash], owner: Owner, limit_s: float) -> int:
        block_ids, steps = await self._loop.call(
            lambda engine: (engine.pin_held(request.request_id, len(hashes)), engine.num_told_steps)
        )
        blocks = _blocks(hashes, block_ids, steps, owner)
        message = rank_pb2.FetchRequest(blocks=blocks, limit_s=0.0 if math.isinf(limit_s) else limit_s)
        answers = await self._ask(
            lambda stub: stub.Fetch(message, metadata=self._metadata)
        )  # stay pinned for good if a rank is lost
        self._loop.post(lambda engine: engine.unpin(block_ids))
        return min(int(answer.good_blocks) for answer in answers)

    async def _ask(self, call: Callable[[Any], Any]) -> list[Any]:
        try:
            return await asyncio.gather(*(call(stub) for stub in self._stubs))
        except grpc.aio.AioRpcError as error:
            self._on_lost(error)
            raise

    async def _to_end(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return await asyncio.shield(task)


def _blocks(hashes: Sequence[BlockHash], block_ids: Sequence[int], steps: int, owner: Owner) -> rank_pb2.Blocks:
    return rank_pb2.Blocks(
        hashes=hashes,
        block_ids=block_ids,
        after_steps=steps,
        tenant=b"" if owner.tenant == NO_TENANT else owner.tenant,
        quota_pieces=owner.quota_blocks,
    )
