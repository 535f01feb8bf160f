"""The directory of a store on this machine, and one process's part in its arena.

    arena.json          which arena lives here now; replaced in one go, so that a changed file is a new arena
    arena-*.mem         the arena's memory, mapped by everyone
    control             socket of the store process, for writers and its operator
    store.lock          held by the store process as long as it lives
    writers/<id>.lock   held by a writer as long as it may write

A writer's lock is how the kernel tells the store whether that writer is dead: only then are its slots given to others.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import mmap
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvstore.arena import Fill, Reservation, Written
from kvstore.arena_map import HEADER_BYTES, ArenaMap, arena_bytes
from kvstore.blocks import BlockHash
from kvstore.control import MAX_POSTED, ControlChannel
from kvstore.errors import ArenaDraining, ArenaFull, ArenaUnavailable
from kvstore.frames import MAX_BLOCKS, Commit, Committed, Filled, Message, Reserve, Reserved, Status
from kvstore.lent import LentSlots
from kvstore.memory import touch_behind
from kvstore.quotas import NO_TENANT, Owner
from kvstore.slot_index import SlotIndex

_LENT_BYTES = 32 << 20  # lent ahead to a writer: twice what a node copies at a time
_HOPE_S = 1.0  # how long until a store that had too few slots is asked for more again
_MAX_UNTOLD = MAX_POSTED - 2  # unconfirmed takes; requests for slots, and returned slots, come on top

MAX_SOCKET_PATH = 107  # bytes; the kernel's limit for a unix socket


@dataclass(frozen=True)
class StorePaths:
    """Where things are in a store's directory."""

    dir: Path

    @property
    def description(self) -> Path:
        return self.dir / "arena.json"

    @property
    def control(self) -> Path:
        return self.dir / "control"

    @property
    def lock(self) -> Path:
        return self.dir / "store.lock"

    @property
    def writers(self) -> Path:
        return self.dir / "writers"

    def memory(self, arena_id: str) -> Path:
        return self.dir / f"arena-{arena_id}.mem"

    def writer(self, writer_id: str) -> Path:
        return self.writers / f"{writer_id}.lock"


@dataclass(frozen=True)
class Description:
    """The contents of arena.json."""

    arena_id: str
    num_slots: int
    slot_bytes: int

    def write(self, path: Path) -> None:
        """Puts the file in place atomically."""
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)))
        new.rename(path)

    @classmethod
    def read(cls, path: Path) -> Description:
        """Raises OSError when there is no file, ValueError when it is not a description."""
        data = json.loads(path.read_text())
        try:
            description = cls(uuid.UUID(data["arena_id"]).hex, int(data["num_slots"]), int(data["slot_bytes"]))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} does not describe an arena") from error
        if description.num_slots < 1 or description.slot_bytes < 1:
            raise ValueError(f"{path} does not describe an arena")
        return description


def map_memory(path: Path, description: Description) -> memoryview:
    """Maps an arena's memory. Raises OSError when it is gone, ValueError when it is too small.

    The mapping is never closed explicitly: it ends with its last view, and stays readable when the file is removed.
    """
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), arena_bytes(description.num_slots, description.slot_bytes))
    touch_behind(memory)
    return memoryview(memory)


class FileLock:
    """A lock that the kernel releases when the process dies."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def take(cls, path: Path) -> FileLock | None:
        """The lock on an existing file; None while another process holds it. Raises OSError without such a file."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return cls(path, fd)

    @classmethod
    def create(cls, path: Path) -> FileLock:
        """A new file that is never visible unlocked."""
        new = path.with_suffix(".new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(path)
        return cls(path, fd)

    def remove(self) -> None:
        """Removes the file, then releases the lock."""
        self.path.unlink(missing_ok=True)
        os.close(self._fd)


class LocalArena:
    """One process's mapping of its machine's arena, and its right to write to it.

    When in doubt (a time-out, an error between `reserve` and `commit`) it is retired and another one is opened:
    once no copy is running its lock is released, and the store takes back what it had reserved.
    """

    def __init__(self, paths: StorePaths, timeout_s: float) -> None:
        """Raises OSError or ValueError when there is no store. Whether it answers shows only at the first call."""
        description = Description.read(paths.description)
        self.arena_id = description.arena_id
        memory = map_memory(paths.memory(self.arena_id), description)
        self.map = ArenaMap(memory, description.num_slots, description.slot_bytes)
        self.index = SlotIndex(self.map, memory[: description.num_slots * HEADER_BYTES])
        self._lent = LentSlots(min(_LENT_BYTES // description.slot_bytes, MAX_BLOCKS))
        self._hope_at_s = math.inf
        self._num_untold = 0
        self._is_regular = False  # has written before
        self._timeout_s = timeout_s
        self._writer_id = uuid.uuid4().hex
        self._lock: FileLock | None = FileLock.create(paths.writer(self._writer_id))
        self._channel = ControlChannel(paths.control)
        self._guard = threading.Lock()
        self._copies = 0
        self._is_retired = False

    def take(self, hashes: Sequence[BlockHash], owner: Owner, all_or_none: bool = False) -> list[Reservation | None]:
        """Slots lent ahead for the leading blocks, as far as they suffice, without a call.

        None in place of a slot for a block that is already there, or being written by this process. An empty list for
        an owner with a quota, from a draining store, and, with `all_or_none`, if there may be too few slots: then the
        store has to be asked. A caller that got slots fills and finishes them and reports with `tell`, or retires this
        arena.
        """
        is_bounded = owner.quota_blocks is not None
        if is_bounded or self.map.is_draining or not self._channel.is_open or self._num_untold >= _MAX_UNTOLD:
            return []
        if all_or_none and len(hashes) > self._lent.num_in_hand:
            return []
        slots = self._lent.take(hashes, self.index.slots(hashes))
        self._num_untold += bool(slots)
        return slots

    def finish(self, items: Iterable[tuple[BlockHash, Written]]) -> None:
        """Completes the headers of lent slots that have been filled: from here on, readers see the blocks.

        To be called within `copy`, which keeps the slots this writer's.
        """
        for block_hash, item in items:
            if self.map.generation(item.slot) != item.generation:
                raise ArenaUnavailable("a slot was taken back from a writer that lives")
            self.map.finish(item.slot, item.generation, block_hash, item.checksum)

    def tell(
        self,
        hashes: Sequence[BlockHash],
        slots: Sequence[Reservation | None],
        written: Sequence[Written],
        owner: Owner,
    ) -> None:
        """Reports the blocks for which `take` gave `slots` to the store, without waiting; more slots come later."""
        self._post(self._lent.settle(hashes, slots, written), owner.tenant, num_told=1)

    def borrow(self, num_blocks: int) -> None:
        """Asks the store to lend slots to a writer of `num_blocks` at a time, without waiting for them.

        Does nothing at the first call: many writers write only once.
        """
        if self._is_regular:
            self._lent.need(num_blocks)
            if self._channel.is_open:
                self._post([], NO_TENANT)
        self._is_regular = True

    async def reserve(self, hashes: Sequence[BlockHash], owner: Owner) -> list[Reservation | None]:
        """See `Arena.reserve`. Raises `ArenaUnavailable` without an answer, `ArenaFull`, `ArenaDraining`."""
        question = partial(Reserve, arena_id=self.arena_id, writer_id=self._writer_id, hashes=hashes, owner=owner)
        answer = (await self._channel.request(question, self._timeout_s)).message
        if not isinstance(answer, Reserved) or answer.status is Status.STALE:
            raise ArenaUnavailable("the store has another arena by now")
        if answer.status is Status.DRAINING:
            self._post(self._lent.give_back(), NO_TENANT)
            raise ArenaDraining("the store is draining")
        if answer.status is Status.FULL:
            raise ArenaFull("every slot is being written")
        if len(answer.reservations) != len(hashes):
            raise ArenaUnavailable("the store's answer does not fit the question")
        if any(item is not None and item.slot >= self.map.num_slots for item in answer.reservations):
            raise ArenaUnavailable("the store's answer names a slot that is none")
        return list(answer.reservations)

    async def commit(self, written: Sequence[Written]) -> int:
        """How many of these blocks are ready now. Raises `ArenaUnavailable` when the store does not answer."""
        question = partial(Commit, arena_id=self.arena_id, writer_id=self._writer_id, written=written)
        answer = (await self._channel.request(question, self._timeout_s)).message
        if not isinstance(answer, Committed) or answer.status is not Status.OK:
            raise ArenaUnavailable("the store has another arena by now")
        return answer.num_blocks

    def copy(self, fill: Callable[[], list[Written]]) -> list[Written]:
        """Runs `fill` on the calling thread; the writer's lock is held until it ends."""
        with self._guard:
            if self._lock is None:
                raise ArenaUnavailable("retired")
            self._copies += 1
        try:
            return fill()
        finally:
            with self._guard:
                self._copies -= 1
                self._let_go()

    def _post(self, fills: Sequence[Fill], tenant: bytes, num_told: int = 0) -> None:
        if self._hope_at_s <= time.monotonic():
            self._hope_at_s = math.inf
            self._lent.hope()
        num_wanted = self._lent.ask()
        if fills or num_wanted or num_told:
            arena_id, writer_id = self.arena_id, self._writer_id
            self._channel.post(
                lambda request_id: Filled(request_id, arena_id, writer_id, fills, num_wanted, tenant),
                partial(self._hear, num_wanted, num_told),
            )

    def _hear(self, num_wanted: int, num_told: int, answer: Message) -> None:
        self._num_untold -= num_told
        slots = answer.reservations if isinstance(answer, Reserved) and answer.status is Status.OK else ()
        if not self._lent.add(num_wanted, [item for item in slots if item is not None and self.map.has(item.slot)]):
            self._hope_at_s = time.monotonic() + _HOPE_S

    @property
    def is_broken(self) -> bool:
        """Whether the store process is gone. What is mapped stays readable."""
        return self._channel.is_broken

    def retire(self) -> None:
        """Ends all pending calls, and the right to write once no copy is running. Payloads stay readable."""
        self._channel.close()
        with self._guard:
            self._is_retired = True
            self._let_go()

    def _let_go(self) -> None:
        if self._is_retired and self._copies == 0 and self._lock is not None:
            self._lock.remove()
            self._lock = None


async def to_end(futures: Sequence[asyncio.Future[Any]]) -> None:
    """Waits until all `futures` are done, even when cancelled; the cancellation is raised afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not all(future.done() for future in futures):
        try:
            await asyncio.wait(futures)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        for future in futures:
            if not future.cancelled():
                future.exception()  # nobody else will ask for it
        raise cancelled
