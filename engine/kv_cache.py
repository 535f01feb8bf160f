"""The bytes of all blocks, and the two copies that cross the seam to them. Knows shapes, but not whose a block is."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.cuda_copies import BlockCopies
from kvstore.blocks import KVLayout
from kvstore.copies import copy, copy_and_sum

logger = logging.getLogger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVCache:
    """`tensor` is `[num_blocks + 1, num_layers, 2, block_size, num_kv_heads, head_dim]`: a block is one run of bytes.

    The last block, `spare_block`, is no request's: rows that pad a step to a fixed shape write there.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        shape = (num_blocks + 1, layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        dtype = TORCH_DTYPES[layout.dtype]
        if device.type == "cpu":
            self.tensor = _host_memory((num_blocks + 1) * layout.block_bytes).view(dtype).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.spare_block = num_blocks
        self.block_bytes = layout.block_bytes
        blocks = self.tensor.view(torch.uint8).view(num_blocks + 1, layout.block_bytes)
        # On the CPU the same memory as numpy sees it: its copies are plain, and they let other threads run.
        self._host = blocks.numpy() if device.type == "cpu" else None
        self._copies = None if device.type == "cpu" else BlockCopies(blocks)

    def write(self, block_id: int, source: memoryview) -> bool:
        """Copies a payload into a block, unless it lies there already. False: not a block's length, nothing was copied.

        Nothing reads `source` after this. Steps that run from now on see the block; the thread that runs them calls.
        """
        if source.nbytes != self.block_bytes:
            return False
        if self._host is not None:
            block = self._host[block_id]
            if _address(block) != _address(np.frombuffer(source, np.uint8)):
                copy(block, source)
        elif self._copies is not None:
            self._copies.write(block_id, np.frombuffer(source, np.uint8))
        return True

    def views(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The bytes of blocks, writable; [] where they are not in the host's memory."""
        return [] if self._host is None else [self._host[block_id].data for block_id in block_ids]

    def read(self, block_ids: Sequence[int], destinations: Sequence[memoryview]) -> list[int]:
        """Copies blocks out, each to its destination of `block_bytes` bytes; returns xxh3_64 of each.

        `ValueError` when a destination has another size.
        """
        targets = [np.frombuffer(destination, np.uint8) for destination in destinations]
        if len(block_ids) != len(targets) or any(target.nbytes != self.block_bytes for target in targets):
            raise ValueError(f"{len(block_ids)} blocks need as many destinations of {self.block_bytes} bytes each")
        if self._host is not None:
            pairs = zip(targets, block_ids, strict=True)
            return [copy_and_sum(target, self._host[block_id]) for target, block_id in pairs]
        assert self._copies is not None
        return self._copies.read(block_ids, targets)


def _address(array: NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])


def _host_memory(num_bytes: int) -> torch.Tensor:
    """Bytes of zeros in huge pages where the kernel grants them, all written once: no step pays for a first touch."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)  # before the first touch: pages that are there already stay small
    except (OSError, AttributeError) as error:
        logger.info("event=no_huge_pages error=%r", error)
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()  # keeps the mapping as long as it lives itself
