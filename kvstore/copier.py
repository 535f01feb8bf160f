"""Copies of blocks into slots, on threads beside the event loop; a few blocks are copied on the calling thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from kvstore.arena import Reservation, Written
from kvstore.blocks import BlockHash
from kvstore.local import LocalArena, to_end

Write = Callable[[Sequence[int], Sequence[memoryview]], Sequence[int]]
Todo = Sequence[tuple[int, Reservation, BlockHash | None]]  # index of a block, its slot, and its name if that was lent

_NUM_COPIERS = 2  # a single thread does not saturate memory bandwidth
_PART_BYTES = 4 << 20  # that a thread takes at a time: on busy cores one thread may start late, or not at all


class Copier:
    """Two threads that fill slots, each for itself."""

    def __init__(self, slot_bytes: int) -> None:
        self._part_blocks = max(1, _PART_BYTES // slot_bytes)
        self._threads = ThreadPoolExecutor(max_workers=_NUM_COPIERS, thread_name_prefix="kv-copy")

    async def fill(self, local: LocalArena, todo: Todo, write: Write) -> list[Written]:
        """Fills slots. Returns, or raises, only when nothing is being copied any more."""
        step = self._part_blocks
        parts = deque((at, todo[at : at + step]) for at in range(0, len(todo), step))
        filled: dict[int, list[Written]] = {}
        loop, num_copiers = asyncio.get_running_loop(), min(_NUM_COPIERS, len(parts))
        copies = [loop.run_in_executor(self._threads, _copy, local, parts, filled, write) for _ in range(num_copiers)]
        await to_end(copies)
        for error in [copy.exception() for copy in copies]:
            if error is not None:
                raise error
        return [written for at in sorted(filled) for written in filled[at]]

    def close(self) -> None:
        """Waits for the threads to end."""
        self._threads.shutdown()


def fill_here(local: LocalArena, todo: Todo, write: Write) -> list[Written]:
    """Fills slots on the calling thread."""
    return local.copy(partial(_fill, local, todo, write)) if todo else []


def _copy(local: LocalArena, parts: deque[tuple[int, Todo]], filled: dict[int, list[Written]], write: Write) -> None:
    """Fills reserved slots, part by part, beside another thread that does the same."""
    try:
        while parts:
            try:
                at, part = parts.popleft()
            except IndexError:  # the other thread has it
                return
            filled[at] = fill_here(local, part, write)
    except BaseException:
        parts.clear()
        raise


def _fill(local: LocalArena, part: Todo, write: Write) -> list[Written]:
    sums = write([index for index, _, _ in part], [local.map.view(item.slot) for _, item, _ in part])
    written = [Written(item.slot, item.generation, sum_) for (_, item, _), sum_ in zip(part, sums, strict=True)]
    local.finish((name, item) for (_, _, name), item in zip(part, written, strict=True) if name is not None)
    return written
