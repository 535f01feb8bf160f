"""The Rank service: what the other ranks do for their leader, with their own pieces of blocks. Knows no request."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence

import grpc

from batonpb import rank_pb2, rank_pb2_grpc
from engine.errors import InvalidRequest
from engine.follower import Follower
from kvstore.blocks import HASH_BYTES, BlockHash, piece_hashes
from kvstore.client import KVClient
from kvstore.quotas import NO_TENANT, SHARED, Owner
from node.convert import statuses
from node.intake import Intake

MAX_LAG_S = 60.0  # a rank this far behind its leader's steps counts as lost


class RankService(rank_pb2_grpc.RankServicer):
    """One rank's side of `node.ranks.Ranks`. Failures of the store are misses; any other error ends the node."""

    def __init__(self, follower: Follower, store: KVClient, intake: Intake) -> None:
        self._follower = follower
        self._store = store
        self._intake = intake
        self._num_fetched_pieces = self._num_published_pieces = 0

    async def Publish(
        self, message: rank_pb2.PublishRequest, context: grpc.aio.ServicerContext
    ) -> rank_pb2.PublishResponse:
        async with statuses(context):
            hashes, block_ids, owner = self._checked(message.blocks)
            num_committed = 0
            if self._follower.is_writer:  # if several ranks hold the same heads, the first publishes them
                await self._wait_for_steps(message.blocks.after_steps)
                num_committed = await self._publish(hashes, block_ids, owner)
            return rank_pb2.PublishResponse(committed_pieces=num_committed)
        raise AssertionError("a status has ended the call")

    async def Fetch(self, message: rank_pb2.FetchRequest, context: grpc.aio.ServicerContext) -> rank_pb2.FetchResponse:
        async with statuses(context):
            hashes, block_ids, owner = self._checked(message.blocks)
            if not message.limit_s >= 0.0:  # excludes NaN
                raise InvalidRequest("limit_s", "must be 0 or more seconds")
            await self._wait_for_steps(message.blocks.after_steps)
            good_blocks = await self._fetch(hashes, block_ids, owner, message.limit_s or math.inf)
            return rank_pb2.FetchResponse(good_blocks=good_blocks)
        raise AssertionError("a status has ended the call")

    async def GetWork(self, _message: rank_pb2.GetWorkRequest, _context: grpc.aio.ServicerContext) -> rank_pb2.Work:
        return rank_pb2.Work(
            stage=self._follower.stage,
            fetched_bytes=self._num_fetched_pieces * self._intake.block_bytes,
            published_bytes=self._num_published_pieces * self._intake.block_bytes,
            **dataclasses.asdict(self._follower.work),
        )

    async def _publish(self, hashes: Sequence[BlockHash], block_ids: Sequence[int], owner: Owner) -> int:
        num_pieces = len(self._follower.pieces)

        def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
            ids = [block_ids[index // num_pieces] * num_pieces + index % num_pieces for index in indices]
            return self._follower.export_pieces(ids, views)

        num_committed = await self._store.publish(piece_hashes(hashes, self._intake.pieces), write, owner)
        self._num_published_pieces += num_committed
        return num_committed

    async def _fetch(self, hashes: Sequence[BlockHash], block_ids: Sequence[int], owner: Owner, limit_s: float) -> int:
        match = self._intake.whole(await self._store.match(piece_hashes(hashes, self._intake.pieces)))
        payloads = await self._store.fetch(match, limit_s)
        num_blocks = await asyncio.to_thread(self._follower.import_blocks, block_ids, payloads)
        self._num_fetched_pieces += num_blocks * len(self._intake.pieces)
        self._intake.keep(match, payloads, owner, {})
        return num_blocks

    async def _wait_for_steps(self, num_steps: int) -> None:
        if self._follower.wait_for_steps(num_steps, 0.0):
            return
        if not await asyncio.to_thread(self._follower.wait_for_steps, num_steps, MAX_LAG_S):
            raise TimeoutError(f"step {num_steps} has not ended within {MAX_LAG_S:.0f} s")

    def _checked(self, blocks: rank_pb2.Blocks) -> tuple[list[BlockHash], list[int], Owner]:
        """Hashes, block ids and owner, checked. Raises `InvalidRequest` for what no leader would ask."""
        num_blocks, max_steps = self._follower.num_blocks, self._follower.max_told_steps
        if len(blocks.hashes) != len(blocks.block_ids) or any(len(name) != HASH_BYTES for name in blocks.hashes):
            raise InvalidRequest("blocks", f"need a name of {HASH_BYTES} bytes each")
        if len(blocks.hashes) > num_blocks:
            raise InvalidRequest("blocks", f"must be {num_blocks} at most, got {len(blocks.hashes)}")
        hashes, block_ids = [BlockHash(name) for name in blocks.hashes], list(blocks.block_ids)
        if block_ids and max(block_ids) >= num_blocks:
            raise InvalidRequest("blocks.block_ids", f"must be below {num_blocks}")
        if blocks.after_steps > max_steps:  # nobody should wait for what will not come
            raise InvalidRequest("blocks.after_steps", f"must be {max_steps} at most now, got {blocks.after_steps}")
        if not blocks.tenant:
            return hashes, block_ids, SHARED
        if len(blocks.tenant) != len(NO_TENANT):
            raise InvalidRequest("blocks.tenant", f"must have {len(NO_TENANT)} bytes")
        quota = blocks.quota_pieces if blocks.HasField("quota_pieces") else None
        return hashes, block_ids, Owner(blocks.tenant, quota)
