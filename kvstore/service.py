"""What a store answers to each message: the arena's books, the disk behind them and the directory, without a socket."""

from __future__ import annotations

from kvstore.announcer import Announcer
from kvstore.arena import Arena
from kvstore.arena_map import ArenaMap
from kvstore.blocks import BlockHash
from kvstore.errors import ArenaFull
from kvstore.frames import BlockInfo, Commit, Committed, Get, Got, Reserve, Reserved, Status, part_blocks
from kvstore.tiers import DiskTier


class StoreService:
    """Answers for one arena. All methods are called on one event loop; none waits for more than disk and directory."""

    def __init__(
        self, arena_id: str, arena: Arena, arena_map: ArenaMap, announcer: Announcer, disk: DiskTier | None
    ) -> None:
        self._arena_id = arena_id
        self._arena = arena
        self._map = arena_map
        self._announcer = announcer
        self._disk = disk

    def inventory(self) -> list[tuple[BlockHash, int]]:
        """All blocks that can be had here, and their slots."""
        return [*self._arena.blocks(), *(self._disk.inventory() if self._disk else ())]

    def reserve(self, question: Reserve) -> Reserved:
        if question.arena_id != self._arena_id:
            return Reserved(question.request_id, Status.STALE)
        try:
            reservations = self._arena.reserve(question.hashes, question.writer_id)
        except ArenaFull:
            return Reserved(question.request_id, Status.FULL)
        evicted = self._arena.take_evicted()
        if self._disk is not None:
            self._disk.demote(evicted)
        else:
            self._announcer.changed((), [block.block_hash for block in evicted])
        return Reserved(question.request_id, Status.OK, reservations)

    async def commit(self, question: Commit) -> Committed:
        if question.arena_id != self._arena_id:
            return Committed(question.request_id, Status.STALE)
        blocks = self._arena.commit(question.writer_id, question.written)
        self._announcer.changed(blocks)
        await self._announcer.flushed()  # who hears that it is committed may tell others to look for it
        return Committed(question.request_id, Status.OK, len(blocks))

    def needs_disk(self, question: Get) -> bool:
        """Whether `promote` has something to do, and the answer has to wait for it."""
        return self._disk is not None and self._disk.is_needed(question.hashes)

    async def promote(self, question: Get) -> None:
        """Brings what is asked for, and only the disk has, back into slots."""
        if self._disk is not None:
            await self._disk.promote(question.hashes)

    def get(self, question: Get) -> tuple[Got, list[int]]:
        """What there is, and in which slots. One that is evicted on its way fails the reader's check of the bytes."""
        infos, slots = [], []
        for block_hash in question.hashes[: part_blocks(self._map.slot_bytes)]:
            slot = self._arena.find(block_hash)
            if slot is None:
                break  # whoever asks wants a run
            infos.append(BlockInfo(block_hash, self._map.slot_bytes, self._map.header(slot).checksum))
            slots.append(slot)
        return Got(question.request_id, infos), slots

    def abandon(self, writer_id: str) -> int:
        """Takes back what a writer that is dead had reserved."""
        return self._arena.abandon(writer_id)

    def writers(self) -> set[str]:
        """Writers that hold slots and whose locks tell whether they live."""
        return self._arena.writers() - ({self._disk.writer_id} if self._disk else set())
