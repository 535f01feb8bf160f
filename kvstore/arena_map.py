"""An arena's buffer: headers, then fixed-size slots for blocks, as any process that maps it sees them. Pure.

The buffer is `num_slots` headers of 64 bytes, then, from a page boundary on, the slots. `ArenaMap` reads and writes
that buffer; who may write what is decided by the books (`kvstore.arena`).

A header's generation is a seqlock: odd while the slot is being written, even and different after each change. It is
made odd before a writer gets the slot, and even last of all. So a reader copies the bytes, checks the generation again,
and knows whether it has the block it asked for. A writer that fills a lent slot finishes the header itself; the store
writes the same once more when it is told.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.blocks import HASH_BYTES, BlockHash

HEADER_BYTES = 64
PAGE_BYTES = 4096
ALIGN_BYTES = 64  # of each slot

FREE, WRITING, READY = 0, 1, 2

# A header is eight aligned 64-bit words, each read and written atomically:
# generation, state, length, key (two words), checksum (xxh3_64 of the payload), last access, and, of the first slot's
# header only, whether the store is draining; of the last slot's, if there are at least two, the latest change of any.
_WORDS = HEADER_BYTES // 8
_GENERATION, _STATE, _LENGTH, _KEY, _CHECKSUM, _LAST_ACCESS, _DRAINS = 0, 1, 2, 3, 5, 6, 7
_CHANGE = _DRAINS
NO_KEY = bytes(HASH_BYTES)


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
        self._change_at = (num_slots - 1) * _WORDS + _CHANGE if num_slots > 1 else None

    @property
    def is_draining(self) -> bool:
        """Whether the store takes no new blocks, so that the slots it lent must be given back."""
        return self._words[_DRAINS] != 0

    @is_draining.setter
    def is_draining(self, value: bool) -> None:
        self._words[_DRAINS] = value

    @property
    def change(self) -> int:
        """Identifies the latest change of a header: a new number after each change; no number is ever used again.

        Whoever changes a header writes it after the change. So a reader that read it before the headers, and finds it
        the same later, has missed nothing. Of two changes made at the same time, either may count as the latest.
        """
        return self.generation(0) if self._change_at is None else self._words[self._change_at]

    def has(self, slot: int) -> bool:
        """Whether there is such a slot."""
        return 0 <= slot < self.num_slots

    def view(self, slot: int) -> memoryview:
        """The slot's bytes, writable."""
        start = slot * self._stride
        return self._slots[start : start + self.slot_bytes]

    def generation(self, slot: int) -> int:
        return self._words[slot * _WORDS]

    def last_access(self, slot: int) -> int:
        return self._words[slot * _WORDS + _LAST_ACCESS]

    def checksum(self, slot: int) -> int:
        return self._words[slot * _WORDS + _CHECKSUM]

    def header(self, slot: int) -> Header:
        at = slot * _WORDS
        key = bytes(self._headers[(at + _KEY) * 8 : (at + _KEY) * 8 + HASH_BYTES])
        words = self._words[at : at + _WORDS].tolist()
        return Header(words[_GENERATION], words[_STATE], words[_LENGTH], key, words[_CHECKSUM], words[_LAST_ACCESS])

    def name(self, slot: int) -> BlockHash | None:
        """The block that the slot holds according to its header at this moment."""
        at = slot * _WORDS
        if self._words[at + _GENERATION] % 2 or self._words[at + _STATE] != READY:
            return None
        return BlockHash(bytes(self._headers[(at + _KEY) * 8 : (at + _KEY) * 8 + HASH_BYTES]))

    def read(self, slot: int, block_hash: BlockHash, now: int) -> MappedPayload | None:
        """The block, if the slot holds it now. Stamps the slot's last use with `now`, any number that grows."""
        if not self.has(slot):
            return None
        generation = self.generation(slot)  # first: what is read below belongs to this generation, or is_valid is False
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
        self._changed(slot, generation)
        return generation

    def finish(self, slot: int, generation: int, key: bytes, checksum: int) -> None:
        """Marks a slot that was begun with `generation` as holding a block. Idempotent."""
        at = slot * _WORDS
        is_change = self._words[at + _GENERATION] != generation + 1  # no change may be reported twice
        self._fill(at, READY, self.slot_bytes, key, checksum)
        self._words[at + _GENERATION] = generation + 1
        if is_change:
            self._changed(slot, generation + 1)

    def clear(self, slot: int, generation: int) -> None:
        """Marks a slot that was begun with `generation` as holding nothing, even if it was finished meanwhile."""
        at = slot * _WORDS
        self._words[at + _GENERATION] = generation + 2  # odd, and not what a reader of a finished block has seen
        self._fill(at, FREE, 0, NO_KEY, 0)
        self._words[at + _GENERATION] = generation + 3
        self._changed(slot, generation + 3)

    def _changed(self, slot: int, generation: int) -> None:
        if self._change_at is not None:
            self._words[self._change_at] = generation * self.num_slots + slot

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
        """Whether the slot has held the block without interruption until now."""
        return self._map.generation(self._slot) == self._generation
