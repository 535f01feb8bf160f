"""Which slot of a mapped arena holds which block, read from the slots' headers: no call, no directory, no delay.

A hint like the directory's, but fresh: a block is found as soon as it is committed. Looking again costs one pass over
the generations, by numpy; only slots whose generation has changed since are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.arena_map import HEADER_BYTES, READY, ArenaMap
from kvstore.blocks import BlockHash

_WORDS = HEADER_BYTES // 8


class SlotIndex:
    """`headers` are those of `arena_map`. A header begins with its generation."""

    def __init__(self, arena_map: ArenaMap, headers: memoryview) -> None:
        self._map = arena_map
        self._generations = np.frombuffer(headers, np.uint64)[::_WORDS]
        self._seen = np.zeros_like(self._generations)  # generations at the last look; those of empty slots are 0
        self._slots: dict[BlockHash, int] = {}
        self._blocks: dict[int, BlockHash] = {}  # by slot

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

    def _look(self) -> None:
        now = self._generations.copy()
        changed: list[int] = np.flatnonzero(now != self._seen).tolist()
        self._seen = now  # what changes while it is read below is read again next time
        for slot in changed:
            self._forget(slot)
        for slot in changed:
            header = self._map.header(slot)
            if header.state == READY and header.generation % 2 == 0:
                self._slots[BlockHash(header.key)] = slot
                self._blocks[slot] = BlockHash(header.key)

    def _forget(self, slot: int) -> None:
        block_hash = self._blocks.pop(slot, None)
        if block_hash is not None and self._slots.get(block_hash) == slot:
            del self._slots[block_hash]
