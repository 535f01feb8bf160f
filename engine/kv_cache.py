"""The bytes of all blocks, and the two copies that cross the seam to them. Knows shapes, but not whose a block is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvstore.blocks import KVLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVCache:
    """`tensor` is `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`, so a block is one run of bytes."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        shape = (num_blocks, layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        self.tensor = torch.zeros(shape, dtype=TORCH_DTYPES[layout.dtype], device=device)
        self.block_bytes = layout.block_bytes
        self._bytes = self.tensor.view(torch.uint8).view(num_blocks, layout.block_bytes)
        # On the CPU the same memory as numpy sees it: its copies are plain, and they let other threads run.
        self._host = self._bytes.numpy() if device.type == "cpu" else None

    def write(self, block_id: int, source: memoryview) -> bool:
        """Copies a payload into a block. False: not a block's length, nothing was copied."""
        if source.nbytes != self.block_bytes:
            return False
        payload = np.frombuffer(source, np.uint8)
        if self._host is not None:
            np.copyto(self._host[block_id], payload)
        else:
            self._bytes[block_id].copy_(torch.from_numpy(payload.copy()))
        return True

    def read(self, block_ids: Sequence[int], destinations: Sequence[memoryview]) -> None:
        """Copies blocks out, each to its destination of `block_bytes` bytes; `ValueError` when one has another size."""
        if self._host is not None:
            blocks = [self._host[block_id] for block_id in block_ids]
        else:
            blocks = list(self._bytes[torch.tensor(block_ids, device=self._bytes.device)].cpu().numpy())
        for block, destination in zip(blocks, destinations, strict=True):
            np.copyto(np.frombuffer(destination, np.uint8), block)
