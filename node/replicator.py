"""Publishes blocks that came from other machines into this machine's arena: hot blocks spread by being fetched.

The next reader here finds them mapped, which spares the wire and the other machine's store. It costs a slot here,
subject to eviction. Knows no request: the blocks are in memory, verified, as they came off the wire. That may be the
engine's memory, which keeps them as long as they wait.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash, Payload
from kvstore.client import KVClient
from kvstore.copies import copy_and_sum
from kvstore.quotas import SHARED, Owner
from node.publisher import Publisher

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 64 * 2**20  # as much as one round of a fetch; blocks beyond that are dropped
MAX_BATCH_BYTES = 4 * 2**20  # per write, for which the engine's own blocks may have to wait


def nothing() -> None:
    """The `let_go` of a payload in memory of its own: nothing to do."""


@dataclass(frozen=True)
class Replica:
    """A block to be published. `let_go` is called once when its payload is not needed any more."""

    block_hash: BlockHash
    payload: Payload
    owner: Owner = SHARED
    let_go: Callable[[], object] = nothing


class Replicator:
    """One per node: the waiting blocks, and the task that writes them after everything that the engine has produced."""

    def __init__(
        self, store: KVClient, publisher: Publisher | None, block_bytes: int, max_blocks: int = sys.maxsize
    ) -> None:
        """At most `max_blocks` wait, in addition to the limit in bytes.

        The blocks of `publisher` go first; None for a rank without a queue of its own.
        """
        self._store = store
        self._publisher = publisher
        self._max_waiting_blocks = max(1, min(max_blocks, MAX_WAITING_BYTES // block_bytes))
        self._max_batch_blocks = max(1, MAX_BATCH_BYTES // block_bytes)
        self._waiting: dict[BlockHash, Replica] = {}  # oldest first
        self._writing: asyncio.Task[None] | None = None

    def replicate(self, replicas: Iterable[Replica]) -> list[Replica]:
        """Accepts blocks, in the order of their chain, as far as there is room; returns the accepted ones at once.

        The owner's quota applies here as elsewhere: the store refuses what exceeds it.
        """
        taken: list[Replica] = []
        for replica in replicas if self._store.can_publish else ():
            if len(self._waiting) == self._max_waiting_blocks:
                break
            if replica.owner.quota_blocks != 0 and replica.block_hash not in self._waiting:
                self._waiting[replica.block_hash] = replica
                taken.append(replica)
        if self._waiting and self._writing is None:
            self._writing = asyncio.create_task(self._write_all())
        return taken

    async def close(self) -> None:
        """Drops what is waiting; a write in progress is completed."""
        self._drop_waiting()
        if self._writing is not None:
            await self._writing

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                if self._publisher is not None:
                    await self._publisher.flush()
                if self._waiting:  # otherwise it was closed meanwhile
                    await self._write(self._take_batch())
        except Exception:  # nobody waits for these blocks
            logger.exception("event=replicate_failed")
        finally:
            self._drop_waiting()
            self._writing = None

    def _take_batch(self) -> list[Replica]:
        """The next blocks that have one owner and fit into one write."""
        head = list(itertools.islice(self._waiting.values(), self._max_batch_blocks))
        batch = list(itertools.takewhile(lambda replica: replica.owner == head[0].owner, head))
        for replica in batch:
            del self._waiting[replica.block_hash]
        return batch

    async def _write(self, batch: Sequence[Replica]) -> None:
        def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
            return [copy_and_sum(view, batch[index].payload.view) for index, view in zip(indices, views, strict=True)]

        try:
            await self._store.publish([replica.block_hash for replica in batch], write, batch[0].owner)
        finally:
            for replica in batch:
                replica.let_go()

    def _drop_waiting(self) -> None:
        while self._waiting:
            self._waiting.pop(next(iter(self._waiting))).let_go()
