"""The bytes of all blocks, and the copies into and out of them. Knows shapes, but not which request has which block."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from engine.config import EngineConfig, ModelConfig, kv_layout
from engine.cuda_copies import BlockCopies
from engine.parallel import RankGroup
from engine.pieces import pieces_of
from engine.shard import Shard
from kvstore.blocks import KVLayout, Payload
from kvstore.copies import copy, copy_and_sum

logger = logging.getLogger(__name__)

WORDS = {2: torch.int16, 4: torch.int32}
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVCache:
    """`tensor` is `[num_blocks + 1, num_layers, 2, block_size, num_kv_heads, head_dim]`: a block is contiguous.

    Layers and heads are those of a rank, which has `pieces` = (rows of layers, columns of heads) pieces of `layout`.
    `piece_id` is block_id * (rows * columns) + the piece's index within the rank; with one piece, it is the block id.

    The last block, `spare_block`, belongs to no request: rows that pad a step to a fixed shape write there.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, device: torch.device, pieces: tuple[int, int] = (1, 1)
    ) -> None:
        rows, columns = pieces
        size = layout.block_size
        shape = (num_blocks + 1, rows * layout.num_layers, 2, size, columns * layout.num_kv_heads, layout.head_dim)
        dtype = TORCH_DTYPES[layout.dtype]
        self.num_pieces = rows * columns
        self.piece_bytes = layout.block_bytes
        if device.type == "cpu":
            self.tensor = _host_memory((num_blocks + 1) * self.num_pieces * self.piece_bytes).view(dtype).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.spare_block = num_blocks
        # As untyped words, which numpy supports too: [block, row, column, layer, k/v, token, values of the heads].
        # A view: rows and columns are not merged, because with several of both that would copy.
        words = self.tensor.view(WORDS[self.tensor.element_size()])
        split = words.view(num_blocks + 1, rows, layout.num_layers, 2, size, columns, -1)
        self._columns = columns
        self._pieces = split.permute(0, 1, 5, 2, 3, 4, 6) if self.num_pieces > 1 else words[:, None, None]
        # On the CPU, the same memory as a numpy array: its copies are plain, and release Python's lock.
        self._host = self._pieces.numpy() if device.type == "cpu" else None
        self._copies = None if device.type == "cpu" else BlockCopies(self._pieces)

    def write(self, piece_id: int, source: memoryview) -> bool:
        """Copies a payload into a piece, unless it is there already. False: wrong length, nothing was copied.

        Nothing reads `source` after this. To be called on the thread that runs the steps; later steps see the block.
        """
        if source.nbytes != self.piece_bytes:
            return False
        if self._host is not None:
            piece = self._host[self._place(piece_id)]
            bytes_ = np.frombuffer(source, np.uint8)
            if not piece.flags.c_contiguous:
                np.copyto(piece, bytes_.view(piece.dtype).reshape(piece.shape))
            elif _address(piece) != _address(bytes_):
                copy(piece.view(np.uint8).reshape(-1), source)
        elif self._copies is not None:
            self._copies.write(piece_id, np.frombuffer(source, np.uint8))
        return True

    def views(self, block_ids: Sequence[int]) -> list[memoryview]:
        """Writable views of blocks; [] if they are not in host memory, or travel in pieces."""
        if self._host is None or self.num_pieces > 1:
            return []
        return [self._host[block_id, 0, 0].view(np.uint8).reshape(-1).data for block_id in block_ids]

    def write_block(self, block_id: int, payloads: Sequence[Payload]) -> bool:
        """Writes one payload for each piece of a block. False: one of them is invalid; others may have been copied."""
        for piece, payload in enumerate(payloads):
            # Copy first, then check: the payload's slot may be reused at any time.
            if not self.write(block_id * self.num_pieces + piece, payload.view) or not payload.is_valid():
                return False
        return True

    def read(self, piece_ids: Sequence[int], destinations: Sequence[memoryview]) -> list[int]:
        """Copies pieces out, each to its destination of `piece_bytes` bytes; returns the xxh3_64 of each.

        Raises `ValueError` when a destination has another size.
        """
        targets = [np.frombuffer(destination, np.uint8) for destination in destinations]
        if len(piece_ids) != len(targets) or any(target.nbytes != self.piece_bytes for target in targets):
            raise ValueError(f"{len(piece_ids)} blocks need as many destinations of {self.piece_bytes} bytes each")
        if self._copies is not None:
            return self._copies.read(piece_ids, targets)
        assert self._host is not None
        pieces = [self._host[self._place(piece_id)] for piece_id in piece_ids]
        return [_copied_out(target, piece) for target, piece in zip(targets, pieces, strict=True)]

    def _place(self, piece_id: int) -> tuple[int, int, int]:
        block_id, piece = divmod(piece_id, self.num_pieces)
        return block_id, *divmod(piece, self._columns)


def make_cache(model: ModelConfig, engine: EngineConfig, group: RankGroup | None = None) -> KVCache:
    """A rank's cache; all ranks of a group have the same number of blocks. `model` is the whole model."""
    layout, pieces = kv_layout(model, engine), pieces_of(model, engine, group.shard if group else Shard())
    num_blocks = engine.num_blocks or engine.kv_cache_bytes // (layout.block_bytes * len(pieces))
    num_blocks = group.least(num_blocks) if group else num_blocks
    return KVCache(layout, num_blocks, torch.device(engine.device), (len(pieces.rows), len(pieces.columns)))


def _copied_out(target: NDArray[np.uint8], piece: NDArray[Any]) -> int:
    """Copies a piece and returns its checksum. A piece of several is short rows, gathered before they are summed."""
    if piece.flags.c_contiguous:
        return copy_and_sum(target, piece.view(np.uint8).reshape(-1))
    np.copyto(target.view(piece.dtype).reshape(piece.shape), piece)
    return xxhash.xxh3_64_intdigest(target.data)


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _host_memory(num_bytes: int) -> torch.Tensor:
    """Zeroed bytes, in huge pages where the kernel grants them, touched so that no step pays for a first touch."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)  # before the first touch: pages that are there already stay small
    except (OSError, AttributeError) as error:
        logger.info("event=no_huge_pages error=%r", error)
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()  # keeps the mapping alive
