"""What a store reports to its operator, and does for it: stats, list, inspect, evict, drain. Knows no socket.

Nothing here counts as a use of a block, so looking does not change the order of eviction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from typing import Any

import xxhash

from kvstore import told
from kvstore.arena import Arena
from kvstore.arena_map import READY, WRITING, ArenaMap
from kvstore.blocks import HASH_BYTES, BlockHash
from kvstore.frames import MAX_ROWS, Ask, Verb
from kvstore.service import StoreService
from kvstore.tally import CONTROL, DATA, DISK, MEMORY, StoreTally
from kvstore.tiers import DiskTier
from kvstore.told import UNKNOWN, BlockDetail, BlockRow, StoreStats, TierStats

MAX_INSPECTED = 64  # blocks in one question; their bytes are read
_PART = 1000  # blocks evicted before the event loop runs other tasks

Place = tuple[BlockHash, str, int]  # tier, and slot or record there


class Admin:
    """Answers for one store. All methods are called on its event loop."""

    def __init__(
        self, service: StoreService, arena: Arena, arena_map: ArenaMap, disk: DiskTier | None, tally: StoreTally
    ) -> None:
        self._service = service
        self._arena = arena
        self._map = arena_map
        self._disk = disk
        self._tally = tally

    async def answer(self, question: Ask) -> bytes:
        """The JSON that `kvstore.told` describes."""
        match question.verb:
            case Verb.STATS:
                answer: dict[str, Any] = {
                    "store": asdict(self.store_stats()),
                    "tiers": [asdict(tier) for tier in self.tier_stats()],
                }
            case Verb.LIST:
                answer = await self._list(question)
            case Verb.INSPECT:
                answer = await self._inspect(question.hashes)
            case Verb.EVICT:
                answer = await self._evict(question.hashes)
            case Verb.EVICT_ALL:
                held = [block_hash for block_hash, _, _ in self._places()]
                answer = await self._evict(list(dict.fromkeys(held)))
            case Verb.DRAIN | Verb.UNDRAIN:
                self._service.drain(question.verb is Verb.DRAIN)
                answer = {"draining": self._service.is_draining}
        return told.encode(answer)

    def store_stats(self) -> StoreStats:
        tally = self._tally
        return StoreStats(
            arena_id=self._service.arena_id,
            draining=self._service.is_draining,
            uptime_s=round(tally.uptime_s, 3),
            slot_bytes=self._map.slot_bytes,
            num_writers=len(self._service.writers()),
            num_committed=tally.num_committed,
            num_demoted=tally.num_demoted,
            num_promoted=tally.num_promoted,
            num_mapped_reads=tally.num_mapped_reads,
            num_full=tally.num_full,
            num_draining=tally.num_draining,
            num_reaped=tally.num_reaped,
            num_refused_control=tally.refused_frames[CONTROL],
            num_refused_data=tally.refused_frames[DATA],
        )

    def tier_stats(self) -> list[TierStats]:
        """Of the memory, and of the disk where there is one."""
        arena, capacity = self._arena, self._map.num_slots
        tiers = [self._tier_stats(MEMORY, capacity, arena.num_writing, arena.num_free)]
        if self._disk is not None:
            index = self._disk.index
            num_free = index.num_records - len(index) - index.num_writing
            tiers.append(self._tier_stats(DISK, index.num_records, index.num_writing, num_free))
        return tiers

    def _tier_stats(self, tier: str, capacity: int, num_writing: int, num_free: int) -> TierStats:
        sums, num_blocks = self._tally.tiers[tier], capacity - num_writing - num_free
        return TierStats(
            tier=tier,
            capacity_blocks=capacity,
            num_blocks=num_blocks,
            num_writing=num_writing,
            num_free=num_free,
            num_bytes=num_blocks * self._map.slot_bytes,
            num_hits=sums.num_hits,
            num_misses=sums.num_misses,
            num_evicted=sums.num_evicted,
            num_removed=sums.num_removed,
        )

    def _places(self) -> Iterator[Place]:
        """The places of all readable blocks."""
        in_memory = ((block_hash, MEMORY, slot) for block_hash, slot in self._arena.blocks())
        records = self._disk.index.items() if self._disk is not None else []
        return chain(in_memory, ((block_hash, DISK, record.number) for block_hash, record in records))

    async def _list(self, question: Ask) -> dict[str, Any]:
        """One page, in the order in which blocks came; changes between two pages shift the later ones."""
        # Two copies are made here; another thread searches them.
        found = await asyncio.to_thread(_starting_with, question.prefix, list(self._places()))
        page = islice(found, question.offset, question.offset + min(question.limit, MAX_ROWS))
        return {"blocks": [asdict(self._row(*place)) for place in page], "num_blocks": len(found)}

    def _row(self, block_hash: BlockHash, tier: str, place: int) -> BlockRow:
        age_s, num_reads = self._uses(block_hash, tier, place)
        return BlockRow(
            hash=block_hash.hex(),
            tier=tier,
            place=place,
            num_bytes=self._map.slot_bytes,
            age_s=age_s,
            num_reads=num_reads,
        )

    def _uses(self, block_hash: BlockHash, tier: str, place: int) -> tuple[float, int]:
        """Seconds since the last use, and reads over the wire, as far as known."""
        if tier == MEMORY and self._arena.slot(block_hash) == place:
            self._tally.stamped(block_hash, self._map.last_access(place))
        uses = self._tally.uses(block_hash)
        return (UNKNOWN, UNKNOWN) if uses is None else (round(self._tally.age_s(uses), 3), uses.num_reads)

    async def _inspect(self, hashes: Sequence[BlockHash]) -> dict[str, Any]:
        if len(hashes) > MAX_INSPECTED:
            return {"error": f"{len(hashes)} blocks to inspect; at most {MAX_INSPECTED} at a time"}
        details = [detail for block_hash in hashes for detail in await self._details(block_hash)]
        return {"blocks": [asdict(detail) for detail in details]}

    async def _details(self, block_hash: BlockHash) -> list[BlockDetail]:
        details = []
        slot = self._arena.slot(block_hash)
        if slot is not None:
            details.append(await self._slot_detail(block_hash, slot))
        record = self._disk.index.peek(block_hash) if self._disk is not None else None
        if self._disk is not None and record is not None:
            age_s, num_reads = self._uses(block_hash, DISK, record.number)
            verifies = await self._disk.verifies(record)
            detail = BlockDetail(
                hash=block_hash.hex(),
                tier=DISK,
                place=record.number,
                state="ready",
                length=self._map.slot_bytes,
                checksum=f"{record.checksum:016x}",
                verifies=verifies,
                age_s=age_s,
                num_reads=num_reads,
            )
            details.append(detail)
        return details

    async def _slot_detail(self, block_hash: BlockHash, slot: int) -> BlockDetail:
        """What the slot's header says, as every reader of the mapping sees it, and whether the bytes match."""
        age_s, num_reads = self._uses(block_hash, MEMORY, slot)
        header = self._map.header(slot)
        sum_ = await asyncio.to_thread(xxhash.xxh3_64_intdigest, self._map.view(slot))
        is_sound = (header.state, header.key, header.length) == (READY, block_hash, self._map.slot_bytes)
        is_same = self._map.generation(slot) == header.generation
        return BlockDetail(
            hash=block_hash.hex(),
            tier=MEMORY,
            place=slot,
            state={READY: "ready", WRITING: "writing"}.get(header.state, "free"),
            generation=header.generation,
            length=header.length,
            checksum=f"{header.checksum:016x}",
            verifies=is_sound and is_same and sum_ == header.checksum,
            age_s=age_s,
            num_reads=num_reads,
        )

    async def _evict(self, hashes: Sequence[BlockHash]) -> dict[str, Any]:
        num_memory = num_disk = 0
        for start in range(0, len(hashes), _PART):
            in_memory, on_disk = await self._service.remove(hashes[start : start + _PART])
            num_memory, num_disk = num_memory + in_memory, num_disk + on_disk
        return {"num_memory_blocks": num_memory, "num_disk_blocks": num_disk}


def _starting_with(prefix: str, places: Sequence[Place]) -> list[Place]:
    low, high = (bytes.fromhex(prefix.ljust(2 * HASH_BYTES, digit)) for digit in "0f")
    return [place for place in places if low <= place[0] <= high]
