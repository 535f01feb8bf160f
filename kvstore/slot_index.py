"""Which slot of a mapped arena holds which block, read from the slots' headers: no call, no directory, no delay.

A hint like the directory's, but up to date: a block is found as soon as it is committed. A look-up reads a single word
if nothing has changed. Otherwise it makes one numpy pass over the generations; only slots whose generation has changed
are read again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.arena_map import HEADER_BYTES, ArenaMap
from kvstore.blocks import BlockHash

_WORDS = HEADER_BYTES // 8


class SlotIndex:
    """`headers` are those of `arena_map`. A header begins with its generation."""

    def __init__(self, arena_map: ArenaMap, headers: memoryview) -> None:
        self._map = arena_map
        self._generations = np.frombuffer(headers, np.uint64)[::_WORDS]
        self._seen = np.zeros_like(self._generations)  # generations when last read; 0 for empty slots
        self._change = -1  # the arena's latest change, as read before the last pass; -1 before the first pass
        self._slots: dict[BlockHash, int] = {}
        self._blocks: dict[int, BlockHash] = {}  # by slot
        self._twins: dict[BlockHash, set[int]] = {}  # further slots of blocks that two writers wrote at the same time

    def run(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The slots of the leading run of `hashes` that the arena holds now."""
        self._look()
        slots: list[int] = []
        for block_hash in hashes:
            slot = self._slots.get(block_hash)
            if slot is None:
                break
            slots.append(slot)
        return slots

    def slots(self, hashes: Sequence[BlockHash]) -> list[int | None]:
        """The slot of each of `hashes` that the arena holds now; None for the others."""
        self._look()
        return [self._slots.get(block_hash) for block_hash in hashes]

    def _look(self) -> None:
        change = self._map.change  # read first: any change after this gets another number
        if change == self._change:
            return
        self._change = change
        now = self._generations.copy()
        changed: list[int] = np.flatnonzero(now != self._seen).tolist()
        self._seen = now  # a slot that changes while it is read below is read again next time
        for slot in changed:
            self._forget(slot)
        for slot in changed:
            block_hash = self._map.name(slot)
            if block_hash is not None:
                self._remember(slot, block_hash)

    def _remember(self, slot: int, block_hash: BlockHash) -> None:
        self._blocks[slot] = block_hash
        if self._slots.setdefault(block_hash, slot) != slot:
            self._twins.setdefault(block_hash, set()).add(slot)  # the store will soon take one of them back

    def _forget(self, slot: int) -> None:
        block_hash = self._blocks.pop(slot, None)
        if block_hash is None:
            return
        twins = self._twins.get(block_hash, set())
        twins.discard(slot)
        if self._slots[block_hash] == slot:
            del self._slots[block_hash]
            if twins:
                self._slots[block_hash] = twins.pop()
        if not twins:
            self._twins.pop(block_hash, None)
