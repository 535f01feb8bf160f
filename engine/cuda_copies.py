"""Copies blocks between a device and the host: through pinned memory, on streams of their own, parallel to computing.
Not yet run on a GPU; on a CPU, where streams do nothing, the tests run all of it.

What is read has been computed, because a step ends only when the device has finished it (`engine.runner`). What is
written is in place before anything that is launched after `write`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.copies import copy_and_sum

STAGED_BLOCKS = 8  # in flight at once, in each direction


class BlockCopies:
    """`blocks` is `[num_blocks, rows, columns, ...]` on a device, with rows and columns of pieces. One thread writes,
    any thread reads. A piece need not be contiguous.
    """

    def __init__(self, blocks: Tensor) -> None:
        self._blocks = blocks
        self._runtime: Any = torch.get_device_module(blocks.device)
        self._incoming, self._outgoing = _Staging(blocks, self._runtime), _Staging(blocks, self._runtime)
        self._next_slot = 0
        self._lock = threading.Lock()  # of what is outgoing

    def write(self, piece_id: int, payload: NDArray[np.uint8]) -> None:
        """Returns when the payload has been copied to pinned memory; the copy to the device continues in background."""
        staging, slot = self._incoming, self._next_slot
        self._next_slot = (slot + 1) % STAGED_BLOCKS
        staging.events[slot].synchronize()  # the last copy from this slot is done
        np.copyto(staging.host[slot], payload)
        with self._runtime.stream(staging.stream):
            self._piece(piece_id).copy_(staging.shaped[slot], non_blocking=True)
        staging.events[slot].record(staging.stream)
        self._runtime.current_stream(self._blocks.device).wait_event(staging.events[slot])

    def read(self, piece_ids: Sequence[int], destinations: Sequence[NDArray[np.uint8]]) -> list[int]:
        """Returns when all destinations are filled, with the xxh3_64 of each."""
        staging, sums = self._outgoing, list[int]()
        with self._lock:
            for first in range(0, len(piece_ids), STAGED_BLOCKS):
                part = slice(first, first + STAGED_BLOCKS)
                for slot, piece_id in enumerate(piece_ids[part]):
                    with self._runtime.stream(staging.stream):
                        staging.shaped[slot].copy_(self._piece(piece_id), non_blocking=True)
                    staging.events[slot].record(staging.stream)
                for slot, destination in enumerate(destinations[part]):
                    staging.events[slot].synchronize()  # lets other threads run
                    sums.append(copy_and_sum(destination, staging.host[slot]))
        return sums

    def _piece(self, piece_id: int) -> Tensor:
        _, rows, columns = self._blocks.shape[:3]
        block_id, piece = divmod(piece_id, rows * columns)
        return self._blocks[block_id, piece // columns, piece % columns]


class _Staging:
    """Slots of pinned memory for one direction; each event says when the last copy to or from its slot is done."""

    def __init__(self, blocks: Tensor, runtime: Any) -> None:
        shape = (STAGED_BLOCKS, *blocks.shape[3:])
        self.shaped = torch.empty(shape, dtype=blocks.dtype, pin_memory=blocks.is_cuda)
        self.host = self.shaped.view(STAGED_BLOCKS, -1).view(torch.uint8).numpy()
        self.stream = runtime.Stream(blocks.device)
        self.events = [runtime.Event() for _ in range(STAGED_BLOCKS)]
