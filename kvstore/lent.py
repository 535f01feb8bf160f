"""A writer's slots that the store has lent ahead, and what is being written into them. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvstore.arena import Fill, Reservation, Written
from kvstore.arena_map import NO_KEY
from kvstore.blocks import BlockHash


class LentSlots:
    """Up to `capacity` slots, asked for ahead; their blocks are named when they are filled.

    Twice what is written at a time, so that one half comes while the other is being filled.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._limit = capacity  # what the store can lend, as far as is known
        self._num_needed = 0
        self._slots: list[Reservation] = []
        self._num_asked = 0
        self._under_way: set[BlockHash] = set()

    def take(self, hashes: Sequence[BlockHash], places: Iterable[int | None]) -> list[Reservation | None]:
        """Slots for the leading blocks, as far as they go; None where a block has a place, or is being written here."""
        answer: list[Reservation | None] = []
        for block_hash, place in zip(hashes, places, strict=True):
            is_new = place is None and block_hash not in self._under_way
            if is_new and not self._slots:
                break
            answer.append(self._slots.pop() if is_new else None)
            if is_new:
                self._under_way.add(block_hash)
        return answer

    def settle(
        self, hashes: Sequence[BlockHash], slots: Sequence[Reservation | None], written: Iterable[Written]
    ) -> list[Fill]:
        """What the store is told of blocks for which `take` gave `slots`, now that those are filled."""
        filled = {item.slot: item for item in written}
        fills = [
            Fill(block_hash, None if item is None else filled[item.slot])
            for block_hash, item in zip(hashes, slots, strict=True)
        ]
        self._under_way.difference_update(fill.block_hash for fill in fills if fill.written is not None)
        return fills

    @property
    def num_in_hand(self) -> int:
        return len(self._slots)

    def ask(self) -> int:
        """How many slots to ask for now."""
        num_wanted = max(0, min(self._limit, self._num_needed) - self._num_slots)
        self._num_asked += num_wanted
        return num_wanted

    def add(self, num_asked: int, slots: Sequence[Reservation]) -> bool:
        """What came of those that were asked for. False: the store has no more, and is asked for as many as it had."""
        self._num_asked -= num_asked
        self._slots += slots
        if len(slots) < num_asked:
            self._limit = self._num_slots
        return len(slots) >= num_asked

    def need(self, num_blocks: int) -> None:
        """So many blocks were to be written at a time."""
        self._num_needed = max(self._num_needed, min(2 * num_blocks, self._capacity))

    def hope(self) -> None:
        """The store may have more again."""
        self._limit = self._capacity

    def give_back(self) -> list[Fill]:
        """Lets go of all that is in hand; what the store is told of it."""
        slots, self._slots = self._slots, []
        return [Fill(BlockHash(NO_KEY), Written(item.slot, item.generation, 0)) for item in slots]

    @property
    def _num_slots(self) -> int:
        return len(self._slots) + len(self._under_way) + self._num_asked
