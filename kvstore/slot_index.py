"""Which slot of a mapped arena holds which block, read from the slots' headers: no call, no directory, no delay.

A hint like the directory's, but fresh: a block is found as soon as it is committed. Looking again costs one pass over
the generations, in C; only slots whose generation has changed since are read.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.arena_map import HEADER_BYTES, READY, ArenaMap
from kvstore.blocks import BlockHash

_WORD_BYTES = 8


class SlotIndex:
    """`headers` are those of `arena_map`. A header begins with its generation."""

    def __init__(self, arena_map: ArenaMap, headers: memoryview) -> None:
        self._map = arena_map
        self._generations = headers.cast("Q")[:: HEADER_BYTES // _WORD_BYTES]
        self._seen = bytes(self._generations.nbytes)  # generations at the last look; those of empty slots are 0
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
        now = self._generations.tobytes()
        if now == self._seen:
            return
        pairs = zip(memoryview(now).cast("Q"), memoryview(self._seen).cast("Q"), strict=True)
        changed = [slot for slot, (new, old) in enumerate(pairs) if new != old]
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
