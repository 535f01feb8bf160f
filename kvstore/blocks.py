"""Names and shapes of KV blocks: the hash chain, its root, and a block's payload. Pure; knows no I/O and no torch.

A block is `block_size` consecutive tokens of one prefix. Its name is a 128-bit SHA-256 chain,
`key_i = SHA256(key_{i-1} || token ids as little-endian u32)[:16]`, so a name stands for the whole prefix that ends
in that block, in every process alike. The chain starts at a root that covers everything that makes KV differ.
"""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

BlockHash = NewType("BlockHash", bytes)

HASH_BYTES = 16
LAYOUT_VERSION = 1  # [layer, k/v, token, kv head, dim]; raised whenever a block's bytes change their meaning


@dataclass(frozen=True)
class KVLayout:
    """What a block's bytes mean: `[num_layers, 2, block_size, num_kv_heads, head_dim]` of `dtype`, row-major.

    `model` identifies weights and revision (the engine uses a digest of the model's files). Two processes may exchange
    blocks if and only if their roots are equal. Where blocks travel in pieces (`piece_hash`), layers and heads
    are those of one piece.
    """

    model: str
    dtype: str  # "float32", "bfloat16" or "float16"
    block_size: int  # tokens
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_pieces: int = 1
    adapter: str = ""

    @property
    def block_bytes(self) -> int:
        itemsize = 4 if self.dtype == "float32" else 2
        return self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim * itemsize

    def root(self) -> BlockHash:
        """The first link of every chain of this layout; `salted` keeps a tenant's chains apart from it."""
        shape = (self.block_size, self.num_layers, self.num_kv_heads, self.head_dim, self.num_pieces, 0)
        fields = (LAYOUT_VERSION, self.model, self.dtype, *shape, self.adapter)
        text = "baton-kv\0" + "\0".join(str(field) for field in fields)
        return BlockHash(hashlib.sha256(text.encode()).digest()[:HASH_BYTES])


def salted(root: BlockHash, salt: bytes) -> BlockHash:
    """The root of one tenant's chains. An empty salt is the shared cache."""
    if not salt:
        return root
    return BlockHash(hashlib.sha256(b"baton-salt\0" + root + salt).digest()[:HASH_BYTES])


def piece_hash(block_hash: BlockHash, piece: int) -> BlockHash:
    """The name of a block's piece; the first one's is the block's own."""
    if piece == 0:
        return block_hash
    return BlockHash(hashlib.sha256(b"baton-piece\0" + block_hash + piece.to_bytes(4, "little")).digest()[:HASH_BYTES])


def piece_hashes(hashes: Sequence[BlockHash], pieces: Sequence[int]) -> list[BlockHash]:
    """The names of these pieces of each block, block by block."""
    if len(pieces) == 1 and pieces[0] == 0:
        return list(hashes)
    return [piece_hash(block_hash, piece) for block_hash in hashes for piece in pieces]


def hash_blocks(parent: BlockHash, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """The names of the full blocks of `token_ids`, in order; a tail that fills no block has none.

    `parent` is the root, or the hash of the block right before `token_ids`.
    """
    tokens = array.array("I", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    data = memoryview(tokens).cast("B")
    step = 4 * block_size
    hashes: list[BlockHash] = []
    for end in range(step, len(data) + 1, step):
        parent = BlockHash(hashlib.sha256(parent + data[end - step : end]).digest()[:HASH_BYTES])
        hashes.append(parent)
    return hashes


def _probe() -> str:
    root = KVLayout("probe", "float32", block_size=2, num_layers=1, num_kv_heads=1, head_dim=1).root()
    return hash_blocks(salted(root, b"probe"), [1, 258, 2**31, 0, 65536, 3], 2)[-1].hex()


PROBE = _probe()  # hash of a fixed chain; if it differs between processes, equal names mean different bytes


class Payload(Protocol):
    """The bytes of one block on its way into an engine."""

    @property
    def view(self) -> memoryview:
        """`block_bytes` bytes. They may be in a slot that is reused at any time: copy, then ask `is_valid`."""
        ...

    def is_valid(self) -> bool:
        """Whether what was copied from `view` before this call is the block that was asked for."""
        ...
