"""Keeps the directory in step with one arena: heartbeats, changes in order, and everything again after a loss.

All writes go through one task, so an announcement can never overtake the retraction before it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable

from kvstore.blocks import BlockHash
from kvstore.directory import ArenaRecord, Directory
from kvstore.errors import DirectoryUnavailable

logger = logging.getLogger(__name__)

_BATCH = 2000  # changes in one round trip
# Changes are batched briefly, so that neither the store nor Redis is busy with each one, nor the store at the very
# moment when a writer that has committed reserves again. A writer for which blocks were evicted will commit soon.
_ADDED_S, _GONE_S = 0.0005, 0.005


class Announcer:
    """The writer of one arena's inventory."""

    def __init__(
        self,
        directory: Directory,
        inventory: Callable[[], list[tuple[BlockHash, int]]],
        record: Callable[[], ArenaRecord],
        heartbeat_s: float,
        ttl_s: float,
    ) -> None:
        self._directory = directory
        self._inventory = inventory
        self._record = record
        self._heartbeat_s = heartbeat_s
        self._ttl_s = ttl_s
        self._changes: dict[BlockHash, int | None] = {}  # slot, or None for a block that is gone; the latest counts
        self._is_complete = False  # the directory has all that the arena holds, but for self._changes
        self._is_away = False
        self._beat_at_s = 0.0
        self._wake = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None  # wakes
        self._flushes: list[asyncio.Future[None]] = []

    def changed(self, added: Iterable[tuple[BlockHash, int]], gone: Iterable[BlockHash] = ()) -> None:
        """Notes changes of what the arena's store holds; `gone` made room for `added`."""
        self._changes.update(dict.fromkeys(gone))
        came = dict(added)
        self._changes.update(came)
        if self._changes:
            self._wake_within(_ADDED_S if came else _GONE_S)

    def beat_soon(self) -> None:
        """Makes the next heartbeat due: the record has changed."""
        self._beat_at_s = 0.0
        self._wake.set()

    async def flushed(self) -> None:
        """Returns when all changes so far are announced, or when the directory is unavailable."""
        if self._is_away:
            return
        waiting = asyncio.get_running_loop().create_future()
        self._flushes.append(waiting)
        self._wake.set()
        await waiting

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                await self.round()
            except Exception:  # if this task ended, the arena would be forgotten
                self._lose()
                logger.exception("event=announce_failed arena=%s", self._record().arena_id)
                await asyncio.sleep(self._heartbeat_s)
            timeout_s = max(0.0, self._beat_at_s - time.monotonic())
            try:
                async with asyncio.timeout(timeout_s):  # wait_for can lose a cancellation, and `stop` would hang
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def round(self) -> None:
        """One heartbeat, if it is due, and all changes. Never raises because the directory is unavailable."""
        self._wake.clear()
        self._stop_alarm()
        flushes, self._flushes = self._flushes, []
        try:
            if self._is_due or not self._is_away:
                await self._beat()
                await self._flush()
                self._turn(is_away=False)
        except DirectoryUnavailable as error:
            self._lose()
            self._turn(is_away=True, reason=str(error))
        finally:
            for waiting in flushes:
                if not waiting.done():
                    waiting.set_result(None)

    def _lose(self) -> None:
        """To be called when it is unknown what arrived. All will be announced again, so pending changes are dropped."""
        self._is_complete = False
        self._changes.clear()

    @property
    def _is_due(self) -> bool:
        return time.monotonic() >= self._beat_at_s

    async def _beat(self) -> None:
        """Sends a heartbeat, if it is due. To be called between all round trips, as there may be many of them."""
        if self._is_due:
            self._beat_at_s = time.monotonic() + self._heartbeat_s
            self._is_complete &= await self._directory.heartbeat_arena(self._record(), self._ttl_s)

    def _wake_within(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        at_s = loop.time() + seconds
        if self._alarm is None or at_s < self._alarm.when():
            self._stop_alarm()
            self._alarm = loop.call_at(at_s, self._wake.set)

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    async def _flush(self) -> None:
        arena_id = self._record().arena_id
        while self._changes or not self._is_complete:
            await self._beat()
            if not self._is_complete:
                self._changes.clear()
                await self._directory.announce_all(arena_id, self._inventory(), self._ttl_s, self._beat)
                self._is_complete = True
                continue
            batch = dict(itertools.islice(self._changes.items(), _BATCH))
            for block_hash in batch:
                del self._changes[block_hash]
            added = [(block_hash, slot) for block_hash, slot in batch.items() if slot is not None]
            gone = [block_hash for block_hash, slot in batch.items() if slot is None]
            self._is_complete = await self._directory.announce(arena_id, added, gone)

    def _turn(self, is_away: bool, reason: str = "") -> None:
        if is_away != self._is_away:
            self._is_away = is_away
            if is_away:
                logger.warning("event=directory_away error=%r", reason)
            else:
                logger.info("event=directory_back")
