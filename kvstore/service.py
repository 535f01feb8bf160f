"""A store's answer to each message: the arena's books, the disk behind them and the directory, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set

from kvstore.announcer import Announcer
from kvstore.arena import Arena, Evicted
from kvstore.arena_map import NO_KEY, ArenaMap
from kvstore.blocks import BlockHash
from kvstore.errors import ArenaFull
from kvstore.frames import (
    MAX_BLOCKS,
    BlockInfo,
    Commit,
    Committed,
    Filled,
    Get,
    Got,
    Reserve,
    Reserved,
    Status,
)
from kvstore.quotas import Owner
from kvstore.tally import DISK, MEMORY, StoreTally
from kvstore.tiers import DiskTier


class StoreService:
    """Answers for one arena. All methods are called on one event loop; they wait for disk and directory at most."""

    def __init__(  # noqa: PLR0913
        self,
        arena_id: str,
        arena: Arena,
        arena_map: ArenaMap,
        announcer: Announcer,
        disk: DiskTier | None,
        tally: StoreTally,
    ) -> None:
        self.arena_id = arena_id
        self._arena = arena
        self._map = arena_map
        self._announcer = announcer
        self._disk = disk
        self._tally = tally
        self.is_draining = False  # takes no new blocks; promotions go on

    def inventory(self) -> list[tuple[BlockHash, int]]:
        """All blocks that can be read here, and their slots."""
        return [*self._arena.blocks(), *(self._disk.inventory() if self._disk else ())]

    def reserve(self, question: Reserve) -> Reserved:
        if question.arena_id != self.arena_id:
            return Reserved(question.request_id, Status.STALE)
        if self.is_draining:
            self._tally.num_draining += 1
            return Reserved(question.request_id, Status.DRAINING)
        for block_hash in question.hashes:
            self._tally.asked(block_hash, self._tier_of(block_hash))
        try:
            reservations = self._arena.reserve(question.hashes, question.writer_id, owner=question.owner)
        except ArenaFull:
            self._tally.num_full += 1
            return Reserved(question.request_id, Status.FULL)
        self._let_go()
        return Reserved(question.request_id, Status.OK, reservations)

    def commit(self, question: Commit) -> Committed:
        """Makes blocks readable through the mapping at once; the directory announces them to others a moment later."""
        if question.arena_id != self.arena_id:
            return Committed(question.request_id, Status.STALE)
        blocks = self._arena.commit(question.writer_id, question.written)
        self._tally.came(block_hash for block_hash, _ in blocks)
        self._announcer.changed(blocks)
        return Committed(question.request_id, Status.OK, len(blocks))

    def filled(self, question: Filled) -> Reserved:
        """Commits what is in lent slots, and lends more. The writer does not wait for the answer."""
        if question.arena_id != self.arena_id:
            return Reserved(question.request_id, Status.STALE)
        hashes = [fill.block_hash for fill in question.fills if fill.block_hash != NO_KEY]
        for block_hash in hashes:
            self._tally.asked(block_hash, self._tier_of(block_hash))
        blocks = self._arena.name(question.writer_id, question.fills, Owner(question.tenant))
        self._tally.came(block_hash for block_hash, _ in blocks)
        self._announcer.changed(blocks)
        if self.is_draining:
            return Reserved(question.request_id, Status.DRAINING)
        lent = self._arena.lend(min(question.num_wanted, MAX_BLOCKS), question.writer_id, hashes)
        self._let_go()
        return Reserved(question.request_id, Status.OK, lent)

    def needs_disk(self, question: Get) -> bool:
        """Whether `promote` has work to do that the answer must wait for."""
        return self._disk is not None and self._disk.is_needed(question.hashes)

    async def promote(self, question: Get) -> frozenset[BlockHash]:
        """Brings the requested blocks that only the disk has back into slots; returns those."""
        if self._disk is None:
            return frozenset()
        on_disk = frozenset(block_hash for block_hash in question.hashes if self._tier_of(block_hash) == DISK)
        await self._disk.promote(question.hashes)
        return on_disk

    def get(self, question: Get, promoted: Set[BlockHash] = frozenset()) -> tuple[Got, list[int]]:
        """The leading run that is present, and its slots; blocks of `promoted` count as hits of the disk.

        A block that is evicted while it is being sent fails the reader's checksum.
        """
        infos, slots = [], []
        for block_hash in question.hashes:
            slot = self._arena.find_for_copy(block_hash)
            if slot is None:
                self._tally.missed(block_hash, self._disk is not None)
                break  # a reader only wants a leading run
            self._tally.read(block_hash, DISK if block_hash in promoted else MEMORY)
            infos.append(BlockInfo(block_hash, self._map.slot_bytes, self._map.checksum(slot)))
            slots.append(slot)
        return Got(question.request_id, infos), slots

    def drain(self, is_draining: bool) -> None:
        """Stops or resumes accepting new blocks; the directory is told."""
        self.is_draining = self._map.is_draining = is_draining
        self._announcer.beat_soon()

    async def remove(self, hashes: Sequence[BlockHash]) -> tuple[int, int]:
        """Drops blocks, except those being written; returns how many from memory, and how many from disk."""
        self._arena.evict(hashes)
        in_memory = [block.block_hash for block in self._arena.take_evicted()]
        self._tally.removed(in_memory, MEMORY)
        if self._disk is None:
            self._announcer.changed((), in_memory)
            await self._announcer.flushed()
            return len(in_memory), 0
        on_disk, erased = self._disk.remove(hashes)
        self._tally.removed(on_disk, DISK)
        self._announcer.changed((), {*in_memory, *on_disk})
        await erased
        await self._announcer.flushed()
        return len(in_memory), len(on_disk)

    def abandon(self, writer_id: str) -> int:
        """Takes back what a dead writer had reserved; returns how many slots."""
        self._tally.num_reaped += 1
        return self._arena.abandon(writer_id)

    def writers(self) -> set[str]:
        """Writers that hold slots, and whose locks tell whether they are alive."""
        return self._arena.writers() - ({self._disk.writer_id} if self._disk else set())

    def _let_go(self) -> None:
        """Of what was evicted for a writer."""
        evicted = self._arena.take_evicted()
        if self._disk is not None:
            self._disk.demote(evicted)
        elif evicted:  # noted after the answer, for which a writer waits, but before any other message
            asyncio.get_running_loop().call_soon(self._lost, evicted)

    def _lost(self, evicted: Sequence[Evicted]) -> None:
        self._tally.lost((block.block_hash, self._map.last_access(block.slot)) for block in evicted)
        self._announcer.changed((), [block.block_hash for block in evicted])

    def _tier_of(self, block_hash: BlockHash) -> str | None:
        """Where a block can be had; None: nowhere."""
        if self._arena.holds(block_hash):
            return MEMORY
        return DISK if self._disk is not None and block_hash in self._disk.index else None
