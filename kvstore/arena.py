"""The arena: fixed-size slots for blocks in one flat buffer, and the books of who is in which. Pure: no I/O, no clock.

The buffer is `num_slots` headers of 64 bytes, then, at a page's border, the slots. `ArenaMap` reads and writes that
buffer and is all that a process which merely maps it needs; `Arena` keeps the books and lives in the store process.

A header's generation is a seqlock: odd while the slot is being written, even and different after each change. It is
made odd before a writer hears of the slot, and even last of all. So a reader copies the bytes, looks at the
generation again, and knows whether it has the block that it asked for.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from kvstore.blocks import HASH_BYTES, BlockHash
from kvstore.errors import ArenaFull
from kvstore.eviction import LRU, Eviction, SecondTouch

HEADER_BYTES = 64
PAGE_BYTES = 4096
ALIGN_BYTES = 64  # of each slot

FREE, WRITING, READY = 0, 1, 2

# A header as eight aligned words of 64 bits, each read or written at one go:
# generation, state, length, key (two words), checksum (xxh3_64 of the payload), last access, unused.
_WORDS = HEADER_BYTES // 8
_GENERATION, _STATE, _LENGTH, _KEY, _CHECKSUM, _LAST_ACCESS = 0, 1, 2, 3, 5, 6
_NO_KEY = bytes(HASH_BYTES)


def slot_stride(slot_bytes: int) -> int:
    """Bytes from one slot to the next."""
    return -(-slot_bytes // ALIGN_BYTES) * ALIGN_BYTES


def slots_offset(num_slots: int) -> int:
    """Bytes before the first slot."""
    return -(-num_slots * HEADER_BYTES // PAGE_BYTES) * PAGE_BYTES


def arena_bytes(num_slots: int, slot_bytes: int) -> int:
    """Size of the buffer of an arena."""
    return slots_offset(num_slots) + num_slots * slot_stride(slot_bytes)


def slots_within(memory_bytes: int, slot_bytes: int) -> int:
    """How many slots an arena of at most `memory_bytes` has; 0 when not even one fits."""
    num_slots = memory_bytes // (slot_stride(slot_bytes) + HEADER_BYTES)
    while num_slots and arena_bytes(num_slots, slot_bytes) > memory_bytes:
        num_slots -= 1
    return num_slots


@dataclass(frozen=True)
class Header:
    """One slot's header, as read at one moment."""

    generation: int
    state: int
    length: int  # bytes
    key: bytes
    checksum: int
    last_access: int


class ArenaMap:
    """The slots and headers of a mapped arena. `buffer` is writable and of `arena_bytes` bytes."""

    def __init__(self, buffer: memoryview, num_slots: int, slot_bytes: int) -> None:
        if len(buffer) < arena_bytes(num_slots, slot_bytes):
            raise ValueError(f"{num_slots} slots of {slot_bytes} bytes do not fit in {len(buffer)} bytes")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._headers = buffer[: num_slots * HEADER_BYTES]
        self._words = self._headers.cast("Q")
        self._slots = buffer[slots_offset(num_slots) :]
        self._stride = slot_stride(slot_bytes)

    def view(self, slot: int) -> memoryview:
        """The slot's bytes, writable."""
        start = slot * self._stride
        return self._slots[start : start + self.slot_bytes]

    def generation(self, slot: int) -> int:
        return self._words[slot * _WORDS]

    def last_access(self, slot: int) -> int:
        return self._words[slot * _WORDS + _LAST_ACCESS]

    def header(self, slot: int) -> Header:
        at = slot * _WORDS
        key = bytes(self._headers[(at + _KEY) * 8 : (at + _KEY) * 8 + HASH_BYTES])
        words = self._words[at : at + _WORDS].tolist()
        return Header(words[_GENERATION], words[_STATE], words[_LENGTH], key, words[_CHECKSUM], words[_LAST_ACCESS])

    def read(self, slot: int, block_hash: BlockHash, now: int) -> MappedPayload | None:
        """The block, if the slot holds it now. Stamps the slot with `now`, any number that grows, as lately used."""
        if not 0 <= slot < self.num_slots:
            return None
        generation = self.generation(slot)  # first of all: what is read below belongs to it or is_valid says no
        header = self.header(slot)
        if generation % 2 or header.state != READY or header.key != block_hash or header.length != self.slot_bytes:
            return None
        self._words[slot * _WORDS + _LAST_ACCESS] = now
        return MappedPayload(self, slot, generation)

    def begin(self, slot: int, key: bytes) -> int:
        """Marks a slot as being written; returns its new, odd generation."""
        at = slot * _WORDS
        generation = self._words[at + _GENERATION] + 1
        self._words[at + _GENERATION] = generation
        self._fill(at, WRITING, 0, key, 0)
        return generation

    def finish(self, slot: int, key: bytes, checksum: int) -> None:
        """Marks a slot as holding a block."""
        self._fill(slot * _WORDS, READY, self.slot_bytes, key, checksum)
        self._words[slot * _WORDS + _GENERATION] += 1

    def clear(self, slot: int) -> None:
        """Marks a slot that was being written as holding nothing."""
        self._fill(slot * _WORDS, FREE, 0, _NO_KEY, 0)
        self._words[slot * _WORDS + _GENERATION] += 1

    def _fill(self, at: int, state: int, length: int, key: bytes, checksum: int) -> None:
        self._words[at + _STATE] = state
        self._words[at + _LENGTH] = length
        self._headers[(at + _KEY) * 8 : (at + _KEY) * 8 + HASH_BYTES] = key
        self._words[at + _CHECKSUM] = checksum


class MappedPayload:
    """A block in a mapped slot: a `kvstore.blocks.Payload` that costs no call and no copy of its own."""

    __slots__ = ("_generation", "_map", "_slot", "view")

    def __init__(self, arena_map: ArenaMap, slot: int, generation: int) -> None:
        self._map = arena_map
        self._slot = slot
        self._generation = generation
        self.view = arena_map.view(slot)

    def is_valid(self) -> bool:
        """Whether the slot has held the block all the time until now."""
        return self._map.generation(self._slot) == self._generation


@dataclass(frozen=True)
class Reservation:
    """The right of one writer to fill a slot, until it commits or dies."""

    slot: int
    generation: int  # odd


@dataclass(frozen=True)
class Written:
    """What a writer says when a slot is filled."""

    slot: int
    generation: int  # of the reservation
    checksum: int  # xxh3_64 of the slot's bytes


@dataclass(frozen=True)
class _Pending:
    writer_id: str
    generation: int
    block_hash: BlockHash


@dataclass(frozen=True)
class Evicted:
    """A block that lost its slot. Its bytes are still there until the slot's next writer hears of the slot."""

    block_hash: BlockHash
    slot: int
    checksum: int
    was_reused: bool  # asked for again after a while: such a block is worth keeping somewhere cheaper


class Arena:
    """The books of an arena. Each slot is free, being written by one writer, or ready; only ready ones are evicted.

    `eviction` says which; it knows all ready blocks and no others.

    The headers are what other processes see; the books never read anything back from them but the time of the last
    read, so a process that scribbles on a header harms blocks, not books.
    """

    def __init__(self, arena_map: ArenaMap, eviction: Eviction[BlockHash] | None = None) -> None:
        self._map = arena_map
        self._eviction: Eviction[BlockHash] = LRU() if eviction is None else eviction
        self._reuse: SecondTouch[BlockHash] = SecondTouch(arena_map.num_slots)
        self._free = list(range(arena_map.num_slots - 1, -1, -1))
        self._ready: dict[int, BlockHash] = {}  # by slot
        self._writing: dict[int, _Pending] = {}  # by slot
        self._slots: dict[BlockHash, int] = {}  # of ready blocks and of those being written
        self._stamps = [0] * arena_map.num_slots  # last access that eviction has seen
        self._evicted: list[Evicted] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def writers(self) -> set[str]:
        """Writers that hold reservations."""
        return {pending.writer_id for pending in self._writing.values()}

    def blocks(self) -> list[tuple[BlockHash, int]]:
        """All ready blocks and their slots."""
        return [(block_hash, slot) for slot, block_hash in self._ready.items()]

    def find(self, block_hash: BlockHash) -> int | None:
        """The slot of a ready block, which thereby counts as lately used."""
        slot = self._slots.get(block_hash)
        if slot is None or slot not in self._ready:
            return None
        self._eviction.touch(block_hash)
        self._reuse.saw(block_hash)
        return slot

    def reserve(self, hashes: Sequence[BlockHash], writer_id: str) -> list[Reservation | None]:
        """A slot for each block; None where it is present, is being written, or no slot is left.

        `ArenaFull` when blocks are missing and there is no slot for any of them.
        """
        # Backwards, so that of a chain the tail is evicted first.
        for block_hash in reversed(hashes):
            self.find(block_hash)
        chain = set(hashes)
        answer: list[Reservation | None] = []
        is_full = False
        for block_hash in hashes:
            slot = None
            if block_hash not in self._slots and not is_full:
                slot = self._take_slot(chain)
                is_full = slot is None
            answer.append(None if slot is None else self._begin(slot, block_hash, writer_id))
        if is_full and not any(answer):
            raise ArenaFull(f"all {self._map.num_slots} slots are being written")
        return answer

    def commit(self, writer_id: str, items: Sequence[Written]) -> list[tuple[BlockHash, int]]:
        """Makes blocks ready and returns them. What the writer does not hold (any more) is passed over."""
        done: list[tuple[BlockHash, int]] = []
        for item in reversed(items):
            pending = self._writing.get(item.slot)
            if pending is None or (pending.writer_id, pending.generation) != (writer_id, item.generation):
                continue
            del self._writing[item.slot]
            self._map.finish(item.slot, pending.block_hash, item.checksum)
            self._ready[item.slot] = pending.block_hash
            self._eviction.insert(pending.block_hash)
            self._reuse.came()
            self._reuse.saw(pending.block_hash)
            done.append((pending.block_hash, item.slot))
        done.reverse()
        return done

    def abandon(self, writer_id: str) -> int:
        """Takes back all that a writer has reserved and not committed. Only for a writer that cannot write any more."""
        slots = [slot for slot, pending in self._writing.items() if pending.writer_id == writer_id]
        for slot in slots:
            del self._slots[self._writing.pop(slot).block_hash]
            self._map.clear(slot)
            self._free.append(slot)
        return len(slots)

    def take_evicted(self) -> list[Evicted]:
        """The blocks evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _begin(self, slot: int, block_hash: BlockHash, writer_id: str) -> Reservation:
        reservation = Reservation(slot, self._map.begin(slot, block_hash))
        self._slots[block_hash] = slot
        self._writing[slot] = _Pending(writer_id, reservation.generation, block_hash)
        return reservation

    def _take_slot(self, chain: Set[BlockHash]) -> int | None:
        """A free slot, else that of a block that is evicted for it.

        Blocks of `chain` stay: the head of a chain is worth more than its tail.
        """
        if self._free:
            return self._free.pop()
        block_hash = self._eviction.victim(chain, self._was_read)
        return None if block_hash is None else self._evict(block_hash)

    def _was_read(self, block_hash: BlockHash) -> bool:
        """Whether a process read the block from its mapping since eviction last looked."""
        slot = self._slots[block_hash]
        stamp = self._map.last_access(slot)
        is_new, self._stamps[slot] = stamp != self._stamps[slot], stamp
        return is_new

    def _evict(self, block_hash: BlockHash) -> int:
        slot = self._slots.pop(block_hash)
        del self._ready[slot]
        checksum, was_reused = self._map.header(slot).checksum, self._reuse.admits(block_hash)
        self._evicted.append(Evicted(block_hash, slot, checksum, was_reused))
        return slot

    def check_integrity(self) -> None:
        """Raises AssertionError unless the books balance and the headers say the same."""
        free, ready, writing = set(self._free), set(self._ready), set(self._writing)
        assert len(free) == len(self._free), "a slot is free twice"
        assert len(free) + len(ready) + len(writing) == self._map.num_slots, "a slot is lost or in two states"
        assert free | ready | writing == set(range(self._map.num_slots)), "a slot is in no state"
        assert sorted(self._eviction) == sorted(self._ready.values()), "eviction knows other blocks than are ready"
        named = {slot: block_hash for block_hash, slot in self._slots.items()}
        for slot in range(self._map.num_slots):
            header = self._map.header(slot)
            found = (header.state, header.generation % 2, header.length, header.key, named.get(slot))
            assert found == self._expected(slot), f"slot {slot}: {found} is not {self._expected(slot)}"
            if slot in writing:
                assert header.generation == self._writing[slot].generation, f"slot {slot}: generation"

    def _expected(self, slot: int) -> tuple[int, int, int, bytes, BlockHash | None]:
        if slot in self._ready:
            return READY, 0, self._map.slot_bytes, self._ready[slot], self._ready[slot]
        if slot in self._writing:
            block_hash = self._writing[slot].block_hash
            return WRITING, 1, 0, block_hash, block_hash
        return FREE, 0, 0, _NO_KEY, None
