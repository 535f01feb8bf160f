"""The KV cache's blocks: ids, reference counts, and the prefix cache's map from hash to id. Pure; holds no bytes.

A block with references is in use. A block without any is free, and stays in the prefix cache until it is allocated
again: the free list is also the LRU list of the cache. The pool knows neither requests nor tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from engine.errors import NoRoom
from kvstore.blocks import BlockHash


class BlockPool:
    """`num_blocks` blocks, with ids 0 to `num_blocks - 1`, all free at first."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._block_ids: dict[BlockHash, int] = {}
        # Free ids, next victim first: those without a hash, then the cached ones, least recently used first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without a reference, including cached ones, which are evicted when needed."""
        return len(self._free)

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The ids of the leading run of cached blocks. Takes no references."""
        block_ids: list[int] = []
        for block_hash in hashes:
            block_id = self._block_ids.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def num_unreferenced(self, block_ids: Iterable[int]) -> int:
        """How many of these are free now, which is how many free blocks it costs to acquire them all."""
        return sum(block_id in self._free for block_id in block_ids)

    def num_sole(self, block_ids: Iterable[int]) -> int:
        """How many of these have exactly one reference, and would become free if their holder released them."""
        return sum(self._ref_counts[block_id] == 1 for block_id in block_ids)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Takes one more reference to each; a free cached block is then in use again."""
        for block_id in block_ids:
            self._ref_counts[block_id] += 1
            self._free.pop(block_id, None)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, with one reference each, and evicts their old content from the prefix cache.

        Raises `NoRoom` if there are too few; then none is taken.
        """
        if count > len(self._free):
            raise NoRoom(f"{count} blocks needed, {len(self._free)} of {self.num_blocks} free")
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._forget(block_id)
            self._ref_counts[block_id] = 1
        return block_ids

    def release(self, block_ids: Sequence[int]) -> None:
        """Returns one reference of each. A chain's tail is evicted first: a head without its tail is still a hit."""
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] < 1:
                raise ValueError(f"block {block_id} has no reference to give back")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def register(self, block_id: int, block_hash: BlockHash) -> None:
        """Puts a computed full block into the prefix cache; its bytes must not change from now on.

        If two requests computed the same block, the first one registered stays in the cache, and the other one is an
        ordinary block: no block table changes during a running step.
        """
        if self._ref_counts[block_id] < 1:
            raise ValueError(f"block {block_id} is free, its content is nobody's to register")
        if self._hashes[block_id] is None and block_hash not in self._block_ids:
            self._hashes[block_id] = block_hash
            self._block_ids[block_hash] = block_id

    def check_integrity(self, holders: Mapping[int, int]) -> None:
        """Checks the books; `holders` has the number of holders of each block. Raises `AssertionError`, naming it."""
        for block_id, ref_count in enumerate(self._ref_counts):
            held = holders.get(block_id, 0)
            assert ref_count == held, f"block {block_id} counts {ref_count} references but has {held} holders"
            assert (ref_count == 0) == (block_id in self._free), f"block {block_id}: {ref_count} references, free list"
            block_hash = self._hashes[block_id]
            assert block_hash is None or self._block_ids.get(block_hash) == block_id, f"block {block_id}: hash map"
        num_cached = sum(block_hash is not None for block_hash in self._hashes)
        assert num_cached == len(self._block_ids), f"{num_cached} blocks have a hash, {len(self._block_ids)} are mapped"
        cached = [self._hashes[block_id] is not None for block_id in self._free]
        assert cached == sorted(cached), "a cached block would be evicted before one without content"

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._block_ids[block_hash]
            self._hashes[block_id] = None
