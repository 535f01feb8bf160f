"""The arena's books: which slot is free, being written, or holds which block. Pure: no I/O, no clock.

They live in the store process; `kvstore.arena_map` is what other processes see of an arena.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

from kvstore.arena_map import FREE, NO_KEY, READY, WRITING, ArenaMap
from kvstore.blocks import BlockHash
from kvstore.errors import ArenaFull
from kvstore.eviction import LRU, Admission, AdmitAll, Eviction
from kvstore.quotas import SHARED, Owner, Quotas

_LENT_SHARE = 8  # at most one in this many slots is lent, over all writers
_MIN_LENDING_SLOTS = 64  # in a smaller arena each slot counts


@dataclass(frozen=True)
class Reservation:
    """The right of one writer to fill a slot, until it commits or dies."""

    slot: int
    generation: int  # odd


@dataclass(frozen=True)
class Written:
    """What a writer reports when it has filled a slot."""

    slot: int
    generation: int  # of the reservation
    checksum: int  # xxh3_64 of the slot's bytes


@dataclass(frozen=True)
class Fill:
    """A block of a chain as its writer reports it: filled into a lent slot, or None if it was already there.

    `NO_KEY` in place of a name gives the slot back.
    """

    block_hash: BlockHash
    written: Written | None


@dataclass(frozen=True)
class _Pending:
    writer_id: str
    generation: int
    block_hash: BlockHash | None  # None: the slot is lent, and named when it is filled


@dataclass(frozen=True)
class Evicted:
    """A block that lost its slot. Its bytes remain until the slot's next writer gets the slot."""

    block_hash: BlockHash
    slot: int
    checksum: int
    # Worth keeping on disk. Never a block of a tenant with a quota, which the disk would circumvent.
    is_admitted: bool


class Arena:
    """The books of an arena. Each slot is free, being written by one writer, or ready; only ready ones are evicted.

    `eviction` chooses which; it knows all ready blocks and no others. `admission` chooses which of those go to disk.

    The headers are what other processes see. The books read nothing back from them except the time of the last read,
    so a process that corrupts a header harms blocks, but not the books.
    """

    def __init__(
        self,
        arena_map: ArenaMap,
        eviction: Eviction[BlockHash] | None = None,
        admission: Admission[BlockHash] | None = None,
    ) -> None:
        self._map = arena_map
        self._eviction: Eviction[BlockHash] = LRU() if eviction is None else eviction
        self._admission: Admission[BlockHash] = AdmitAll() if admission is None else admission
        self._quotas = Quotas()
        self._free = list(range(arena_map.num_slots - 1, -1, -1))
        self._ready: dict[int, BlockHash] = {}  # by slot
        self._writing: dict[int, _Pending] = {}  # by slot
        self._slots: dict[BlockHash, int] = {}  # of ready blocks and of those being written
        self._stamps = [0] * arena_map.num_slots  # last access that eviction has seen
        self._evicted: list[Evicted] = []
        self._num_lent = 0
        self._max_lent = arena_map.num_slots // _LENT_SHARE if arena_map.num_slots >= _MIN_LENDING_SLOTS else 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_writing(self) -> int:
        """Slots being written, including lent ones."""
        return len(self._writing)

    @property
    def num_lent(self) -> int:
        """Slots lent to writers, for blocks to come or for blocks they have not reported yet."""
        return self._num_lent

    def slot(self, block_hash: BlockHash) -> int | None:
        """The slot of a block that is ready or being written. Does not count as a use, unlike `find`."""
        return self._slots.get(block_hash)

    def writers(self) -> set[str]:
        """Writers that hold reservations."""
        return {pending.writer_id for pending in self._writing.values()}

    def num_blocks_of(self, tenant: bytes) -> int:
        """Slots that a tenant's blocks take, including those being written."""
        return self._quotas.num_blocks(tenant)

    def blocks(self) -> list[tuple[BlockHash, int]]:
        """All ready blocks and their slots."""
        return [(block_hash, slot) for slot, block_hash in self._ready.items()]

    def find(self, block_hash: BlockHash) -> int | None:
        """The slot of a ready block; counts as a use."""
        slot = self._slots.get(block_hash)
        if slot is None or slot not in self._ready:
            return None
        self._eviction.touch(block_hash)
        self._admission.saw(block_hash)
        self._quotas.touch(block_hash)
        return slot

    def find_for_copy(self, block_hash: BlockHash) -> int | None:
        """The slot of a ready block that another machine copies, usually into its own arena.

        This copy may then be evicted first: a block in two arenas takes the room of two and gives one hit.
        """
        slot = self._slots.get(block_hash)
        if slot is None or slot not in self._ready:
            return None
        self._eviction.lend(block_hash)
        self._admission.saw(block_hash)
        return slot

    def holds(self, block_hash: BlockHash) -> bool:
        """Whether a block is ready. Does not count as a use, unlike `find`."""
        slot = self._slots.get(block_hash)
        return slot is not None and slot in self._ready

    def reserve(
        self, hashes: Sequence[BlockHash], writer_id: str, beside: Sequence[BlockHash] = (), owner: Owner = SHARED
    ) -> list[Reservation | None]:
        """A slot for each block; None where it is present, is being written, or no slot is left.

        Neither these blocks nor those of `beside` are evicted for it. An owner whose quota is used up pays with the
        least recently used of its own blocks, and gets no slot if there is none. Raises `ArenaFull` when blocks are
        missing and there is no slot for any of them, whatever the quota.
        """
        # Backwards, so that a chain's tail is evicted first.
        for block_hash in reversed(hashes):
            self.find(block_hash)
        chain = {*hashes, *beside}
        answer: list[Reservation | None] = []
        is_full = is_over = False
        for block_hash in hashes:
            slot = None
            if block_hash not in self._slots and not is_full and not is_over:
                is_over = not self._make_way(owner, chain)
                if not is_over:
                    slot = self._take_slot(chain)
                    is_full = slot is None
            answer.append(None if slot is None else self._begin(slot, block_hash, writer_id, owner))
        if is_full and not any(answer):
            raise ArenaFull(f"all {self._map.num_slots} slots are being written")
        return answer

    def commit(self, writer_id: str, items: Sequence[Written]) -> list[tuple[BlockHash, int]]:
        """Makes blocks ready and returns them with their slots. What the writer does not hold (any more) is skipped."""
        done: list[tuple[BlockHash, int]] = []
        for item in reversed(items):
            pending = self._held(writer_id, item)
            if pending is None or pending.block_hash is None:
                continue
            self._finish(item, pending.block_hash)
            done.append((pending.block_hash, item.slot))
        self._admission.came(block_hash for block_hash, _ in done)
        done.reverse()
        return done

    def lend(self, num_slots: int, writer_id: str, beside: Sequence[BlockHash] = ()) -> list[Reservation]:
        """Lends slots ahead, without block names; the writer gives them to `name` when it has filled them.

        At most `num_slots`, and no more than an eighth of the arena for all writers together; a small arena lends none.
        Blocks of `beside` are not evicted for it.
        """
        num_slots = min(num_slots, self._max_lent - self._num_lent)
        chain = set(beside)
        lent: list[Reservation] = []
        while len(lent) < num_slots and (slot := self._take_slot(chain)) is not None:
            item = Reservation(slot, self._map.begin(slot, NO_KEY))
            self._writing[slot] = _Pending(writer_id, item.generation, None)
            lent.append(item)
        self._num_lent += len(lent)
        return lent

    def name(self, writer_id: str, fills: Sequence[Fill], owner: Owner = SHARED) -> list[tuple[BlockHash, int]]:
        """Makes filled lent slots ready blocks of an owner without a quota, and returns them with their slots.

        Blocks that were already there count as used. A slot whose block meanwhile has another slot comes back. What the
        writer does not hold is skipped.
        """
        done: list[tuple[BlockHash, int]] = []
        for fill in reversed(fills):
            self.find(fill.block_hash)
            item = fill.written
            pending = None if item is None else self._held(writer_id, item)
            if item is None or pending is None or pending.block_hash is not None:
                continue
            if fill.block_hash == NO_KEY or fill.block_hash in self._slots:
                self._take_back(item.slot)
                continue
            self._num_lent -= 1
            self._slots[fill.block_hash] = item.slot
            self._quotas.began(fill.block_hash, owner)
            self._finish(item, fill.block_hash)
            done.append((fill.block_hash, item.slot))
        self._admission.came(block_hash for block_hash, _ in done)
        done.reverse()
        return done

    def abandon(self, writer_id: str) -> int:
        """Takes back all slots that a writer has not committed. Only for a writer that cannot write any more."""
        slots = [slot for slot, pending in self._writing.items() if pending.writer_id == writer_id]
        for slot in slots:
            self._take_back(slot)
        return len(slots)

    def evict(self, hashes: Iterable[BlockHash]) -> None:
        """Drops those of these blocks that are ready, and frees their slots.

        `take_evicted` returns them, too. A process that is reading one notices by the slot's generation.
        """
        for block_hash in hashes:
            if self.holds(block_hash):
                self._eviction.remove(block_hash)
                slot = self._evict(block_hash)
                # Readers of the mapping see at once that it is gone.
                self._map.clear(slot, self._map.begin(slot, NO_KEY))
                self._free.append(slot)

    def take_evicted(self) -> list[Evicted]:
        """The blocks evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _begin(self, slot: int, block_hash: BlockHash, writer_id: str, owner: Owner) -> Reservation:
        reservation = Reservation(slot, self._map.begin(slot, block_hash))
        self._slots[block_hash] = slot
        self._quotas.began(block_hash, owner)
        self._writing[slot] = _Pending(writer_id, reservation.generation, block_hash)
        return reservation

    def _held(self, writer_id: str, item: Written) -> _Pending | None:
        pending = self._writing.get(item.slot)
        is_his = pending is not None and (pending.writer_id, pending.generation) == (writer_id, item.generation)
        return pending if is_his else None

    def _finish(self, item: Written, block_hash: BlockHash) -> None:
        del self._writing[item.slot]
        self._map.finish(item.slot, item.generation, block_hash, item.checksum)
        self._ready[item.slot] = block_hash
        self._eviction.insert(block_hash)
        self._quotas.finished(block_hash)

    def _take_back(self, slot: int) -> None:
        pending = self._writing.pop(slot)
        if pending.block_hash is None:
            self._num_lent -= 1
        else:
            del self._slots[pending.block_hash]
            self._quotas.gone(pending.block_hash)
        self._map.clear(slot, pending.generation)
        self._free.append(slot)

    def _make_way(self, owner: Owner, chain: Set[BlockHash]) -> bool:
        """Evicts the owner's own blocks until its quota allows for one more. False: that is not possible."""
        while self._quotas.is_reached(owner):
            block_hash = self._quotas.victim(owner.tenant, chain, lambda key: self._was_read(key, self._eviction.touch))
            if block_hash is None:
                return False
            self.evict([block_hash])
        return True

    def _take_slot(self, chain: Set[BlockHash]) -> int | None:
        """A free slot, else that of a block evicted for it.

        Blocks of `chain` stay: the head of a chain is worth more than its tail.
        """
        if self._free:
            return self._free.pop()
        block_hash = self._eviction.victim(chain, lambda key: self._was_read(key, self._quotas.touch))
        return None if block_hash is None else self._evict(block_hash)

    def _was_read(self, block_hash: BlockHash, tell: Callable[[BlockHash], None]) -> bool:
        """Whether a process read the block through the mapping since this was last asked.

        Eviction and quotas both ask, and a read shows only once: `tell` informs the one that did not ask.
        """
        slot = self._slots[block_hash]
        stamp = self._map.last_access(slot)
        is_new, self._stamps[slot] = stamp != self._stamps[slot], stamp
        if is_new:
            tell(block_hash)
        return is_new

    def _evict(self, block_hash: BlockHash) -> int:
        slot = self._slots.pop(block_hash)
        del self._ready[slot]
        checksum = self._map.checksum(slot)
        is_admitted = self._admission.admits(block_hash) and not self._quotas.is_bounded(block_hash)
        self._quotas.gone(block_hash)
        self._evicted.append(Evicted(block_hash, slot, checksum, is_admitted))
        return slot

    def check_integrity(self) -> None:
        """Raises AssertionError unless the books balance and the headers agree with them."""
        free, ready, writing = set(self._free), set(self._ready), set(self._writing)
        assert len(free) == len(self._free), "a slot is free twice"
        assert len(free) + len(ready) + len(writing) == self._map.num_slots, "a slot is lost or in two states"
        assert free | ready | writing == set(range(self._map.num_slots)), "a slot is in no state"
        assert sorted(self._eviction) == sorted(self._ready.values()), "eviction knows other blocks than are ready"
        named_pending = [pending.block_hash for pending in self._writing.values() if pending.block_hash is not None]
        assert len(self._writing) - len(named_pending) == self._num_lent <= self._max_lent, "lent slots"
        self._quotas.check_integrity(self._ready.values(), named_pending)
        named = {slot: block_hash for block_hash, slot in self._slots.items()}
        for slot in range(self._map.num_slots):
            if slot in writing and self._writing[slot].block_hash is None:
                continue  # its writer finishes its header
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
            return WRITING, 1, 0, block_hash or NO_KEY, block_hash
        return FREE, 0, 0, NO_KEY, None
