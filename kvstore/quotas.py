"""Which tenant owns which blocks of an arena, and how many it may have. Pure: no I/O, no clock.

A tenant is an opaque id of 16 bytes that came with the request. The names of blocks keep tenants from reading each
other's; these books only bound how many blocks each of them has.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from kvstore.blocks import BlockHash
from kvstore.eviction import LRU

NO_TENANT = bytes(16)


@dataclass(frozen=True)
class Owner:
    """The owner of blocks to be written, and how many of them an arena may hold. Without a tenant there is no quota."""

    tenant: bytes = NO_TENANT  # 16 bytes
    quota_blocks: int | None = None  # None: as many as there is room for

    @classmethod
    def of_salt(cls, salt: bytes, quota_blocks: int | None = None) -> Owner:
        """The owner of blocks whose names have this salt; without a salt they are shared by everybody."""
        return cls(hashlib.sha256(salt).digest()[:16], quota_blocks) if salt else SHARED


SHARED = Owner()


class Quotas:
    """Which tenant has which blocks, ready or being written. A tenant's quota is that of its last reservation.

    Only blocks with a tenant are known here; for all others, every method does nothing.
    """

    def __init__(self) -> None:
        self._tenants: dict[BlockHash, bytes] = {}
        self._num_blocks: Counter[bytes] = Counter()  # by tenant
        self._ready: dict[bytes, LRU[BlockHash]] = {}  # by tenant; those that may go
        self._bounded: set[bytes] = set()  # tenants that have blocks and a quota

    def num_blocks(self, tenant: bytes) -> int:
        """Ready blocks and those being written."""
        return self._num_blocks[tenant]

    def is_reached(self, owner: Owner) -> bool:
        """Whether the owner's quota is used up."""
        quota_blocks = owner.quota_blocks
        if owner.tenant == NO_TENANT or quota_blocks is None:
            return False
        return self.num_blocks(owner.tenant) >= quota_blocks

    def is_bounded(self, block_hash: BlockHash) -> bool:
        """Whether the block's tenant has a quota."""
        return self._tenants.get(block_hash) in self._bounded

    def began(self, block_hash: BlockHash, owner: Owner) -> None:
        """The block has a slot, and is being written into it."""
        if owner.tenant == NO_TENANT:
            return
        self._tenants[block_hash] = owner.tenant
        self._num_blocks[owner.tenant] += 1
        if owner.quota_blocks is not None:
            self._bounded.add(owner.tenant)
        else:
            self._bounded.discard(owner.tenant)

    def finished(self, block_hash: BlockHash) -> None:
        """The block is ready: it may be evicted from now on, and is the most recently used."""
        if block_hash in self._tenants:
            self._ready.setdefault(self._tenants[block_hash], LRU()).insert(block_hash)

    def touch(self, block_hash: BlockHash) -> None:
        """The block, which is ready, was used."""
        if block_hash in self._tenants:
            self._ready[self._tenants[block_hash]].touch(block_hash)

    def gone(self, block_hash: BlockHash) -> None:
        """The block has no slot any more."""
        tenant = self._tenants.pop(block_hash, None)
        if tenant is None:
            return
        ready = self._ready.get(tenant)
        if ready is not None and block_hash in ready:
            ready.remove(block_hash)
        self._num_blocks[tenant] -= 1
        if not self._num_blocks[tenant]:
            del self._num_blocks[tenant]
            self._ready.pop(tenant, None)
            self._bounded.discard(tenant)

    def victim(
        self, tenant: bytes, kept: Collection[BlockHash], was_read: Callable[[BlockHash], bool]
    ) -> BlockHash | None:
        """The tenant's least recently used ready block that is not in `kept`. It stays in the books until `gone`."""
        ready = self._ready.get(tenant)
        block_hash = None if ready is None else ready.victim(kept, was_read)
        if ready is not None and block_hash is not None:
            ready.insert(block_hash)
        return block_hash

    def check_integrity(self, ready: Collection[BlockHash], writing: Collection[BlockHash]) -> None:
        """Raises AssertionError unless the books balance; `ready` and `writing` are all blocks of the arena."""
        assert self._tenants.keys() <= {*ready, *writing}, "a tenant has a block that is not there"
        assert Counter(self._tenants.values()) == self._num_blocks, "a tenant's blocks are counted wrongly"
        known = {block_hash for blocks in self._ready.values() for block_hash in blocks}
        assert known == self._tenants.keys() & set(ready), "other blocks of tenants may go than are ready"
        for tenant, blocks in self._ready.items():
            assert all(self._tenants[block_hash] == tenant for block_hash in blocks), "a block is in another's books"
        assert self._bounded <= self._num_blocks.keys(), "a quota outlived its tenant's blocks"
