"""One client of one store in benchmarks/kvstore.py, in a process of its own: what it is asked to do, over and over.

The first client of a store starts the store and fills it; more join it with what the first said of it. Runs in any
peer's environment too, for which the standard library and numpy are enough.

Blocks are named 0, 1, 2, ..., and a block's bytes follow from its name. The client's own memory, where an engine would
keep its blocks, is as many positions. Names and positions are taken in a random order that comes round only when all
others were used, so that all bytes are cold when there are more of them than any cache holds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import mmap
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from benchmarks.worker_process import say, take_stdout

FILL_BLOCKS = 16  # published at a time
CHECK_BLOCKS = 4
FETCHES = ("fetch", "receive", "copy")  # names of blocks that are there, in any order
COPIES = ("fetch", "copy")  # of these, those that end in the client's own memory
PUBLISHES = ("publish",)  # names that were never used; all else is asked about runs of names

Operation = Callable[[Sequence[int], Sequence[int]], Awaitable[float]]  # names, positions -> seconds


@dataclass(frozen=True)
class Setting:
    """What a client is started with."""

    block_bytes: int
    num_blocks: int  # that the store is filled with
    num_positions: int
    folder: str  # in shared memory, for whatever the store needs, and short: there will be sockets
    option: str = ""  # which one of those that a module knows
    client: int = 0
    shared: dict[str, Any] | None = None  # what the first client said of the store; None: start one

    @property
    def num_slots(self) -> int:
        """Of the store: half as many again as it is filled with, for what is published meanwhile."""
        return self.num_blocks + self.num_blocks // 2

    @property
    def num_published(self) -> int:
        """Blocks published meanwhile that a store without eviction keeps at a time, so that new ones land cold."""
        return self.num_blocks // 4


class Client(Protocol):
    """What a module brings."""

    version: str
    shared: dict[str, Any]  # for those who join; empty: nobody can

    @property
    def operations(self) -> Mapping[str, Operation]:
        """Each times only what a user of the store would wait for."""
        ...

    def put(self, position: int, data: bytes) -> None:
        """Sets the client's own memory."""

    def get(self, position: int) -> bytes: ...

    async def close(self) -> None: ...


class Memory:
    """The client's own memory, as Baton's engine makes it: huge pages where the kernel grants them, all touched."""

    def __init__(self, num_positions: int, block_bytes: int) -> None:
        memory = mmap.mmap(-1, num_positions * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.rows = np.frombuffer(memory, np.uint8).reshape(num_positions, block_bytes)
        self.rows.fill(0)

    def put(self, position: int, data: bytes) -> None:
        self.rows[position] = np.frombuffer(data, np.uint8)

    def get(self, position: int) -> bytes:
        data: bytes = self.rows[position].tobytes()
        return data

    def address(self, position: int = 0) -> int:
        address: int = self.rows[position].ctypes.data
        return address


class Picks:
    """Which blocks an operation is about."""

    def __init__(self, setting: Setting) -> None:
        self._rng = random.Random(setting.client)
        self._stored = self._rotation(setting.num_blocks)
        self._positions = self._rotation(setting.num_positions)
        self._new = itertools.count((1 + setting.client) << 32)
        self._num_blocks = setting.num_blocks

    def take(self, operation: str, num_blocks: int) -> tuple[list[int], list[int]]:
        """Names and positions."""
        if operation in FETCHES or operation in PUBLISHES:
            names = self._new if operation in PUBLISHES else self._stored
            return list(itertools.islice(names, num_blocks)), list(itertools.islice(self._positions, num_blocks))
        first = self._rng.randrange(self._num_blocks - num_blocks + 1)
        return list(range(first, first + num_blocks)), []

    def _rotation(self, size: int) -> Iterator[int]:
        order = list(range(size))
        self._rng.shuffle(order)
        return itertools.cycle(order)


def content(name: int, block_bytes: int) -> bytes:
    return np.random.Generator(np.random.SFC64(name)).bytes(block_bytes)


def run(start: Callable[[Setting], Awaitable[Client]]) -> None:
    """A module's whole `main`: ends with the process's input."""
    answers = take_stdout()
    setting = Setting(**json.loads(sys.argv[1]))

    async def serve() -> None:
        client = await start(setting)
        try:
            if setting.shared is None and "publish" in client.operations:
                await fill(client, setting)
            await check(client, setting)
            operations = list(client.operations)
            say(answers, {"version": client.version, "shared": client.shared, "operations": operations})
            picks = Picks(setting)
            while line := await asyncio.to_thread(sys.stdin.readline):
                say(answers, await repeat(client, picks, **json.loads(line)))
        finally:
            await client.close()

    asyncio.run(serve())


async def fill(client: Client, setting: Setting) -> None:
    """Publishes all blocks."""
    step = min(FILL_BLOCKS, setting.num_positions)
    for first in range(0, setting.num_blocks, step):
        names = range(first, min(first + step, setting.num_blocks))
        for position, name in enumerate(names):
            client.put(position, content(name, setting.block_bytes))
        await client.operations["publish"](names, range(len(names)))


async def check(client: Client, setting: Setting) -> None:
    """That what is fetched is what was published: the fastest of all are those that copy nothing."""
    positions = range(min(CHECK_BLOCKS, setting.num_blocks, setting.num_positions))
    names = [setting.num_blocks - 1 - position for position in positions]
    for operation in set(COPIES).intersection(client.operations):
        for position in positions:
            client.put(position, bytes(setting.block_bytes))
        await client.operations[operation](names, positions)
        for name, position in zip(names, positions, strict=True):
            if client.get(position) != content(name, setting.block_bytes):
                raise RuntimeError(f"{operation} brought other bytes than were published")


async def repeat(client: Client, picks: Picks, operation: str, num_blocks: int, seconds: float) -> list[float]:
    """What each of as many as fit into `seconds` took, at least one."""
    took_s: list[float] = []
    end_s = time.perf_counter() + seconds
    while not took_s or time.perf_counter() < end_s:
        took_s.append(await client.operations[operation](*picks.take(operation, num_blocks)))
    return took_s
