"""Publishes what came from other machines into this machine's arena: hot blocks spread by being fetched.

The next reader here finds them mapped, and the wire and the other machine's store are spared. It costs a slot here, for
which eviction chooses. Knows no request and no engine: the blocks lie in memory, checked, as they came off the wire.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable, Sequence

from kvstore.blocks import BlockHash, Payload
from kvstore.client import KVClient
from kvstore.copies import copy_and_sum
from kvstore.quotas import SHARED, Owner
from node.publisher import Publisher

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 64 * 2**20  # as much as one round of a fetch; what comes beyond that is let go
MAX_BATCH_BYTES = 4 * 2**20  # of one write: the engine's own blocks may have to wait for it


class Replicator:
    """One for each node: the blocks that wait, and the task that writes them behind all that the engine has made."""

    def __init__(self, store: KVClient, publisher: Publisher | None, block_bytes: int) -> None:
        """`publisher` has what goes before; None for a rank that has no queue of its own."""
        self._store = store
        self._publisher = publisher
        self._max_waiting_blocks = max(1, MAX_WAITING_BYTES // block_bytes)
        self._max_batch_blocks = max(1, MAX_BATCH_BYTES // block_bytes)
        self._waiting: dict[BlockHash, tuple[Payload, Owner]] = {}  # oldest first
        self._writing: asyncio.Task[None] | None = None

    def replicate(self, blocks: Iterable[tuple[BlockHash, Payload]], owner: Owner = SHARED) -> None:
        """Takes an owner's blocks, in the order of their chain, as far as there is room, and returns at once.

        The store refuses what does not fit into the owner's quota, which holds here as it does elsewhere.
        """
        if not self._store.can_publish or owner.quota_blocks == 0:
            return
        for block_hash, payload in blocks:
            if len(self._waiting) == self._max_waiting_blocks:
                break
            self._waiting[block_hash] = payload, owner
        if self._waiting and self._writing is None:
            self._writing = asyncio.create_task(self._write_all())

    async def close(self) -> None:
        """Lets go of what waits; what is being written is written to its end."""
        self._waiting.clear()
        if self._writing is not None:
            await self._writing

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                if self._publisher is not None:
                    await self._publisher.flush()
                if self._waiting:  # else it was closed meanwhile
                    await self._write(*self._take_batch())
        except Exception:  # nobody waits for these blocks
            logger.exception("event=replicate_failed")
            self._waiting.clear()
        finally:
            self._writing = None

    def _take_batch(self) -> tuple[list[BlockHash], list[Payload], Owner]:
        """The next blocks, as many as are one owner's and go into one write."""
        head = list(itertools.islice(self._waiting.items(), self._max_batch_blocks))
        owner = head[0][1][1]
        batch = list(itertools.takewhile(lambda item: item[1][1] == owner, head))
        for block_hash, _ in batch:
            del self._waiting[block_hash]
        return [block_hash for block_hash, _ in batch], [payload for _, (payload, _) in batch], owner

    async def _write(self, hashes: Sequence[BlockHash], payloads: Sequence[Payload], owner: Owner) -> None:
        def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
            return [copy_and_sum(view, payloads[index].view) for index, view in zip(indices, views, strict=True)]

        await self._store.publish(hashes, write, owner)
