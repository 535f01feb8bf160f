"""Publishes full blocks into this machine's arena, in order, in the background. Knows no request and no gRPC.

A block stays pinned in the engine from the step that filled it until its bytes are in the arena. What cannot be
published is unpinned and forgotten; the only effect is that the next reader has a miss.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from engine.loop import EngineLoop
from engine.request import FullBlock
from kvstore.blocks import piece_hashes
from kvstore.client import KVClient
from kvstore.quotas import SHARED, Owner
from node.ranks import Ranks

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 16 * 2**20  # per write: readers get the first blocks of a chunk while the last are being copied
MAX_WRITES = 2  # at a time: one is copied while the other is reserved or committed
STALL_S, STALL_SHARE = 0.5, 0.25  # a write that takes this long must not keep more than this share of all blocks pinned


@dataclass(frozen=True)
class _Write:
    batch: Sequence[FullBlock]  # of one owner
    began_s: float
    task: asyncio.Task[None]


class Publisher:
    """One per node: a queue of pinned blocks, and the task that empties it."""

    def __init__(self, loop: EngineLoop, store: KVClient, num_blocks: int, ranks: Ranks | None = None) -> None:
        self._loop = loop
        self._store = store
        self._ranks = ranks
        self._pieces = loop.engine.pieces.numbers
        self._max_batch_blocks = max(1, MAX_BATCH_BYTES // (loop.engine.layout.block_bytes * len(self._pieces)))
        self._max_stalled_blocks = int(num_blocks * STALL_SHARE)
        self._write_began_s = 0.0
        self._queue: deque[tuple[FullBlock, Owner]] = deque()
        self._num_pinned_blocks = 0
        self._num_taken_blocks = 0  # total put into the queue
        self._num_settled_blocks = 0  # total published or given up, in the queue's order
        self.num_published_pieces = 0  # of this rank; new to the store
        self._settled = asyncio.Condition()
        self._writer: asyncio.Task[None] | None = None

    def publish(self, blocks: Sequence[FullBlock], owner: Owner = SHARED) -> bool:
        """Takes over the pins of `blocks`, and returns at once. False: they will not be published.

        Even accepted blocks are not stored if they do not fit into the owner's quota.
        """
        if not blocks:
            return True
        self._num_pinned_blocks += len(blocks)
        if not self._store.can_publish or self._is_stalled() or owner.quota_blocks == 0:
            self._unpin(blocks)
            return False
        self._queue.extend((block, owner) for block in blocks)
        self._num_taken_blocks += len(blocks)
        if self._writer is None:
            self._write_began_s = time.monotonic()
            self._writer = asyncio.create_task(self._write_all())
        return True

    async def flush(self) -> None:
        """Waits until everything accepted before this call is published or given up, and unpinned."""
        taken = self._num_taken_blocks
        async with self._settled:
            await self._settled.wait_for(lambda: self._num_settled_blocks >= taken)

    def _is_stalled(self) -> bool:
        """Whether the store is so slow, and so many blocks are pinned for it, that more should not be published."""
        is_late = self._writer is not None and time.monotonic() - self._write_began_s > STALL_S
        return is_late and self._num_pinned_blocks > self._max_stalled_blocks

    async def _write_all(self) -> None:
        writes: deque[_Write] = deque()  # under way, oldest first
        while self._queue or writes:
            while self._queue and len(writes) < MAX_WRITES:
                batch, owner = self._take_batch()
                writes.append(_Write(batch, time.monotonic(), asyncio.create_task(self._write(batch, owner))))
            self._write_began_s = writes[0].began_s
            await self._settle(writes.popleft())
        self._writer = None

    def _take_batch(self) -> tuple[list[FullBlock], Owner]:
        """The next blocks of the queue that have one owner and fit into one write."""
        owner = self._queue[0][1]
        batch: list[FullBlock] = []
        while self._queue and self._queue[0][1] == owner and len(batch) < self._max_batch_blocks:
            batch.append(self._queue.popleft()[0])
        return batch, owner

    async def _settle(self, write: _Write) -> None:
        try:
            await write.task
        except Exception:  # whatever it is, it only means a miss for a later reader
            logger.exception("event=publish_failed blocks=%d", len(write.batch))
        self._unpin(write.batch)
        self._num_settled_blocks += len(write.batch)
        async with self._settled:
            self._settled.notify_all()

    async def _write(self, batch: Sequence[FullBlock], owner: Owner) -> None:
        # two requests may have filled the same block in the same step
        blocks, num_pieces = list({block.block_hash: block for block in batch}.values()), len(self._pieces)

        def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
            ids = [blocks[index // num_pieces].block_id * num_pieces + index % num_pieces for index in indices]
            return self._loop.engine.export_pieces(ids, views)

        hashes = piece_hashes([block.block_hash for block in blocks], self._pieces)
        if self._ranks is None:
            num_published = await self._store.publish(hashes, write, owner)
        else:
            both = self._store.publish(hashes, write, owner), self._ranks.publish(blocks, owner)
            ours, theirs = await asyncio.gather(*both, return_exceptions=True)  # the blocks are pinned until both end
            if isinstance(ours, BaseException):
                raise ours
            if isinstance(theirs, BaseException):
                raise theirs
            num_published = ours
        self.num_published_pieces += num_published

    def _unpin(self, blocks: Sequence[FullBlock]) -> None:
        block_ids = [block.block_id for block in blocks]
        self._num_pinned_blocks -= len(block_ids)
        self._loop.post(lambda engine: engine.unpin(block_ids))
