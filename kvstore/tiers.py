"""Between an arena and the disk behind it: demotion of blocks that are evicted, promotion of blocks that are requested.

An evicted block that is worth a place on disk (`eviction.ADMISSIONS`) is copied at once, before its slot's next writer
gets the slot, and written in the background. The directory is told that this arena has it `ON_DISK`; a reader, even on
the same machine, then asks the store for it, and the store brings it back into a slot before it answers.

All I/O runs on one thread, so no record is overwritten under a reader. Writes are given to it one at a time, so a read
waits for at most one of them; the writes it overtakes are to other records, because the one it reads is held. A disk
that is full or broken is left alone for a while, with a log line: every failure is a miss.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import xxhash

from kvstore.arena import Arena, Evicted, Reservation, Written
from kvstore.arena_map import ArenaMap
from kvstore.blocks import BlockHash
from kvstore.directory import ON_DISK
from kvstore.errors import ArenaFull
from kvstore.ssd import BlockFile, DiskIndex, Record
from kvstore.tally import DISK, StoreTally

logger = logging.getLogger(__name__)

T = TypeVar("T")
Changed = Callable[[Iterable[tuple[BlockHash, int]], Iterable[BlockHash]], None]

_MAX_PENDING_BYTES = 64 << 20  # copies waiting for the disk; what is evicted beyond that is lost
_PAUSE_S = 30.0  # after an error
# Per question: less than a reader waits that could compute the blocks soon. It can ask again for the rest.
_READ_S = 0.15


class DiskTier:
    """The disk behind one arena. All methods are called on one event loop, and none raises because of the disk."""

    def __init__(self, file: BlockFile, arena: Arena, arena_map: ArenaMap, changed: Changed, tally: StoreTally) -> None:
        self._file = file
        self._tally = tally
        self._index = DiskIndex(file.num_records)
        self._arena = arena
        self._map = arena_map
        self._changed = changed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-disk")
        self._tasks: set[asyncio.Task[None]] = set()
        self._promoting = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._writer_id = ""  # writer id under which a promotion holds slots
        self._pending_bytes = 0
        self._paused_until_s = 0.0

    @classmethod
    async def open(
        cls,
        make_file: Callable[[], BlockFile],
        arena: Arena,
        arena_map: ArenaMap,
        changed: Changed,
        tally: StoreTally,
    ) -> DiskTier | None:
        """The tier, with what an earlier store left there; None, with a log line, if the disk cannot be used."""
        try:
            tier = cls(make_file(), arena, arena_map, changed, tally)
        except OSError as error:
            logger.warning("event=no_disk error=%r", str(error))
            return None
        try:
            tier._index.restore(await tier._on_thread(tier._file.records))
        except OSError as error:
            logger.warning("event=no_disk error=%r", str(error))
            await tier.stop()
            return None
        logger.info("event=disk_up blocks=%d records=%d", len(tier._index), tier._index.num_records)
        return tier

    async def stop(self) -> None:
        """Waits for running reads and writes."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)
        self._file.close()

    @property
    def writer_id(self) -> str:
        """The writer that needs no lock: it lives as long as the store does."""
        return self._writer_id

    @property
    def index(self) -> DiskIndex:
        """The books, for reading only."""
        return self._index

    def inventory(self) -> list[tuple[BlockHash, int]]:
        """Blocks that only the disk holds, with the slot `ON_DISK`."""
        return [(block_hash, ON_DISK) for block_hash in self._index if not self._arena.holds(block_hash)]

    def demote(self, evicted: Sequence[Evicted]) -> None:
        """Copies the blocks worth keeping, before their slots are written again, and announces where each block is."""
        self._tally.lost((block.block_hash, self._map.last_access(block.slot)) for block in evicted)
        kept = [(block.block_hash, ON_DISK) for block in evicted if block.block_hash in self._index]
        self._changed(kept, [block.block_hash for block in evicted if block.block_hash not in self._index])
        for block in evicted:
            if block.is_admitted and not self._is_paused() and self._pending_bytes < _MAX_PENDING_BYTES:
                self._begin(block)

    def is_needed(self, hashes: Iterable[BlockHash]) -> bool:
        """Whether one of these blocks is on disk alone."""
        return any(block_hash in self._index and not self._arena.holds(block_hash) for block_hash in hashes)

    async def promote(self, hashes: Sequence[BlockHash]) -> None:
        """Brings blocks back into the arena, in order, as many as time allows."""
        deadline_s = time.monotonic() + _READ_S
        try:
            async with asyncio.timeout(_READ_S):
                await self._promoting.acquire()
        except TimeoutError:
            return
        try:
            await self._promote(hashes, deadline_s)
        finally:
            self._promoting.release()

    def remove(self, hashes: Iterable[BlockHash]) -> tuple[list[BlockHash], Awaitable[None]]:
        """Forgets those of these blocks that are held, and returns them; their records are erased when awaited."""
        records = {block_hash: record for block_hash in hashes if (record := self._index.peek(block_hash)) is not None}
        for block_hash in records:
            self._index.drop(block_hash)
        # Submitted now, before any other write to one of these records.
        erasing = asyncio.get_running_loop().run_in_executor(
            self._thread, self._erase_all, [record.number for record in records.values()]
        )
        return list(records), erasing

    async def verifies(self, record: Record) -> bool:
        """Whether the record's bytes match its checksum."""

        def check() -> bool:
            try:
                return self._file.read(record, memoryview(bytearray(self._map.slot_bytes)))
            except OSError as error:
                self._pause(error)
                return False

        return await self._on_thread(check)

    async def _promote(self, hashes: Sequence[BlockHash], deadline_s: float) -> None:
        wanted = [block_hash for block_hash in hashes if self.is_needed([block_hash])]
        if not wanted or self._is_paused():
            return
        self._writer_id = uuid.uuid4().hex
        try:
            reservations = self._arena.reserve(wanted, self._writer_id, beside=hashes)
        except ArenaFull:
            return
        self.demote(self._arena.take_evicted())
        todo = []
        for block_hash, item in zip(wanted, reservations, strict=True):
            record = self._index.find(block_hash)
            if item is not None and record is not None:
                todo.append((block_hash, item, record))
        # Cancelled only when the store ends; the slots stay reserved then.
        written, damaged = await self._on_thread(partial(self._read_all, todo, deadline_s))
        promoted = self._arena.commit(self._writer_id, written)
        self._tally.num_promoted += len(promoted)
        self._changed(promoted, ())
        self._arena.abandon(self._writer_id)
        for block_hash in damaged:
            self._index.drop(block_hash)
        self._changed((), [block_hash for block_hash in damaged if not self._arena.holds(block_hash)])

    def _read_all(
        self, todo: Sequence[tuple[BlockHash, Reservation, Record]], deadline_s: float
    ) -> tuple[list[Written], list[BlockHash]]:
        """On the disk's thread: fills slots. Returns those read correctly, and the blocks that were not."""
        written: list[Written] = []
        damaged: list[BlockHash] = []
        for block_hash, item, record in todo:
            if time.monotonic() > deadline_s:
                break
            try:
                if self._file.read(record, self._map.view(item.slot)):
                    written.append(Written(item.slot, item.generation, record.checksum))
                    continue
                self._file.erase(record.number)
            except OSError as error:
                self._pause(error)
            damaged.append(block_hash)
        return written, damaged

    def _begin(self, block: Evicted) -> None:
        begun = self._index.begin(block.block_hash)
        if begun is None:
            return
        number, lost = begun
        if lost is not None:
            self._tally.evicted(lost, DISK)
            if not self._arena.holds(lost):
                self._changed((), [lost])
        payload = bytes(self._map.view(block.slot))
        self._pending_bytes += len(payload)
        task = asyncio.create_task(self._write(number, block, payload))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, number: int, block: Evicted, payload: bytes) -> None:
        async with self._writing:
            record = await self._on_thread(partial(self._write_one, number, block, payload))
        self._pending_bytes -= len(payload)
        self._index.finish(block.block_hash, record)
        self._tally.num_demoted += record is not None
        if record is not None and not self._arena.holds(block.block_hash):
            self._changed([(block.block_hash, ON_DISK)], ())

    def _write_one(self, number: int, block: Evicted, payload: bytes) -> Record | None:
        """On the disk's thread. A copy that does not match its writer's checksum is not kept."""
        if self._is_paused() or xxhash.xxh3_64_intdigest(payload) != block.checksum:
            return None
        try:
            return self._file.write(number, block.block_hash, block.checksum, payload)
        except OSError as error:
            self._pause(error)
            return None

    def _erase_all(self, numbers: Sequence[int]) -> None:
        """On the disk's thread."""
        try:
            for number in numbers:
                self._file.erase(number)
        except OSError as error:
            self._pause(error)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until_s

    def _pause(self, error: OSError) -> None:
        if not self._is_paused():
            logger.warning("event=disk_paused seconds=%.0f error=%r", _PAUSE_S, str(error))
        self._paused_until_s = time.monotonic() + _PAUSE_S
