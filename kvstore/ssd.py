"""Blocks on disk: one file of fixed-size records that survives a restart, and the books of which block is in which.

    blocks.kv   records of `record_stride(slot_bytes)` bytes: a header of 128, then the block

A record's header names the block, its checksum, its length, the root of the model's names and the format's version,
and has a checksum of its own. A header that does not verify is a free record, so another model's file, or half of
one, is simply empty. A block is checked when it is read: what is damaged or cut off is a miss, and forgotten.

`DiskIndex` is pure. `BlockFile` does the I/O and raises OSError.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kvstore.arena_map import ALIGN_BYTES
from kvstore.blocks import HASH_BYTES, BlockHash
from kvstore.eviction import LRU, Eviction

HEADER_BYTES = 128
MAGIC, VERSION = b"BATNDISK", 1
# magic, version, bytes of a block, root of the model's names, block, its checksum, number of the write; last, xxh3_64
_HEADER = struct.Struct("<8sIQ16s16sQQ")
_SUM = struct.Struct("<Q")


def record_stride(slot_bytes: int) -> int:
    """Bytes from one record to the next."""
    return -(-(HEADER_BYTES + slot_bytes) // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True)
class Record:
    """Where a block is on disk, and its checksum."""

    number: int
    checksum: int  # xxh3_64 of the block
    sequence: int = 0  # of the write; the higher, the later


class DiskIndex:
    """Which block is in which record. A record is free, being written, or held; only held ones are evicted."""

    def __init__(self, num_records: int) -> None:
        self.num_records = num_records
        self._free = list(range(num_records - 1, -1, -1))
        self._held: dict[BlockHash, Record] = {}
        self._writing: dict[BlockHash, int] = {}  # block -> record
        self._eviction: Eviction[BlockHash] = LRU()

    def restore(self, found: Iterable[tuple[BlockHash, Record]]) -> None:
        """Takes over what a file holds. If a block is there twice, the later write counts."""
        latest: dict[BlockHash, Record] = {}
        for block_hash, record in sorted(found, key=lambda item: item[1].sequence):
            latest.pop(block_hash, None)
            latest[block_hash] = record
        self._held = latest
        for block_hash in latest:
            self._eviction.insert(block_hash)
        taken = {record.number for record in latest.values()}
        self._free = [number for number in range(self.num_records - 1, -1, -1) if number not in taken]

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._held

    def __iter__(self) -> Iterator[BlockHash]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_writing(self) -> int:
        return len(self._writing)

    def items(self) -> list[tuple[BlockHash, Record]]:
        """All blocks that are held, and where."""
        return list(self._held.items())

    def peek(self, block_hash: BlockHash) -> Record | None:
        """Where a block is. Does not count as a use, unlike `find`."""
        return self._held.get(block_hash)

    def find(self, block_hash: BlockHash) -> Record | None:
        """Where a block is; counts as a use."""
        record = self._held.get(block_hash)
        if record is not None:
            self._eviction.touch(block_hash)
        return record

    def begin(self, block_hash: BlockHash) -> tuple[int, BlockHash | None] | None:
        """A record to write the block to, and the block evicted for it, if any; None if there is nothing to do."""
        if block_hash in self._held or block_hash in self._writing:
            return None
        lost = None
        if self._free:
            number = self._free.pop()
        else:
            lost = self._eviction.victim()
            if lost is None:
                return None
            number = self._held.pop(lost).number
        self._writing[block_hash] = number
        return number, lost

    def finish(self, block_hash: BlockHash, record: Record | None) -> None:
        """The write is over; None: it failed."""
        number = self._writing.pop(block_hash)
        if record is None:
            self._free.append(number)
        else:
            self._held[block_hash] = record
            self._eviction.insert(block_hash)

    def drop(self, block_hash: BlockHash) -> None:
        """Forgets a block; does nothing if it is not held."""
        record = self._held.pop(block_hash, None)
        if record is not None:
            self._eviction.remove(block_hash)
            self._free.append(record.number)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the books balance."""
        numbers = [*self._free, *self._writing.values(), *(record.number for record in self._held.values())]
        assert sorted(numbers) == list(range(self.num_records)), "a record is lost or in two states"
        assert sorted(self._eviction) == sorted(self._held), "eviction knows other blocks than are held"


class BlockFile:
    """The file. All methods raise OSError, and are called by one thread at a time."""

    def __init__(self, folder: Path, max_bytes: int, slot_bytes: int, root: bytes) -> None:
        """Raises BlockingIOError when another store has the folder, ValueError when `max_bytes` holds no block."""
        self.num_records = max_bytes // record_stride(slot_bytes)
        if self.num_records < 1:
            raise ValueError(f"disk_bytes: {max_bytes} hold no block of {slot_bytes} bytes")
        self._slot_bytes = slot_bytes
        self._root = root[:HASH_BYTES].ljust(HASH_BYTES, b"\0")
        self._sequence = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(folder / "blocks.kv", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_size > self._at(self.num_records):
                os.ftruncate(self._fd, self._at(self.num_records))
        except OSError:
            os.close(self._fd)
            raise

    def records(self) -> list[tuple[BlockHash, Record]]:
        """All records whose headers verify. Reads headers only."""
        found = []
        last = min(self.num_records, -(-os.fstat(self._fd).st_size // record_stride(self._slot_bytes)))
        for number in range(last):
            item = self._parse(number, os.pread(self._fd, HEADER_BYTES, self._at(number)))
            if item is not None:
                found.append(item)
        self._sequence = max((record.sequence for _, record in found), default=0)
        return found

    def write(self, number: int, block_hash: BlockHash, checksum: int, payload: bytes | memoryview) -> Record:
        """Puts a block into a record. The header is written last: an interrupted write leaves a free record."""
        self.erase(number)
        self._write(payload, self._at(number) + HEADER_BYTES)
        self._sequence += 1
        head = _HEADER.pack(MAGIC, VERSION, self._slot_bytes, self._root, block_hash, checksum, self._sequence)
        self._write(head + _SUM.pack(xxhash.xxh3_64_intdigest(head)), self._at(number))
        return Record(number, checksum, self._sequence)

    def read(self, record: Record, target: memoryview) -> bool:
        """Fills `target` with the block. False: it is not what was written, or not any more."""
        num_read = os.preadv(self._fd, [target], self._at(record.number) + HEADER_BYTES)
        return num_read == len(target) and xxhash.xxh3_64_intdigest(target) == record.checksum

    def erase(self, number: int) -> None:
        """Marks a record as free."""
        self._write(bytes(HEADER_BYTES), self._at(number))

    def close(self) -> None:
        os.close(self._fd)

    def _at(self, number: int) -> int:
        return number * record_stride(self._slot_bytes)

    def _parse(self, number: int, text: bytes) -> tuple[BlockHash, Record] | None:
        head = text[: _HEADER.size]
        if len(text) < HEADER_BYTES or head[: len(MAGIC)] != MAGIC:
            return None
        if _SUM.unpack_from(text, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(head):
            return None
        _, version, slot_bytes, root, key, checksum, sequence = _HEADER.unpack(head)
        if (version, slot_bytes, root) != (VERSION, self._slot_bytes, self._root):
            return None
        return BlockHash(key), Record(number, checksum, sequence)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        if os.pwrite(self._fd, data, offset) != len(data):  # as by a disk that is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
