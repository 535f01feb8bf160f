"""The announcer over a real Redis: whatever happens to either, what the arena holds is found in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
from conftest import RedisProcess, eventually
from kvstore_support import chain

from kvstore.announcer import Announcer
from kvstore.blocks import BlockHash
from kvstore.directory import ArenaRecord, Directory, Run

RECORD = ArenaRecord(arena_id="a" * 32, address="tcp://127.0.0.1:1", host="here", slot_bytes=4096, num_slots=20_000)
TTL_S = 30.0

Blocks = list[tuple[BlockHash, int]]


def announcer_of(blocks: Blocks, directory: Directory, heartbeat_s: float = 0.0, ttl_s: float = TTL_S) -> Announcer:
    """With no time between heartbeats, one is due whenever it is looked."""
    return Announcer(directory, lambda: blocks, lambda: RECORD, heartbeat_s, ttl_s)


async def test_changes_are_not_kept_while_redis_is_away(redis_process: RedisProcess) -> None:
    held: Blocks = []
    directory = Directory(redis_process.url, "test")
    announcer = announcer_of(held, directory)
    await announcer.round()
    redis_process.kill()
    hashes = chain(0, 20_000)
    for first in (0, 10_000):
        new = [(block_hash, first + slot) for slot, block_hash in enumerate(hashes[first : first + 10_000])]
        held += new
        announcer.changed(new)
        await announcer.round()
        assert len(announcer._changes) == 0
    redis_process.start()
    await announcer.round()
    assert await directory.locate(hashes) == {RECORD.arena_id: list(range(20_000))}
    await directory.close()


class SpoiltDirectory(Directory):
    """Fails once, in a way that nobody thought of."""

    has_failed = False

    async def announce(
        self, arena_id: str, blocks: Sequence[tuple[BlockHash, int]], gone: Sequence[BlockHash] = ()
    ) -> bool:
        if not self.has_failed:
            self.has_failed = True
            raise ValueError("spoilt")
        return await super().announce(arena_id, blocks, gone)


async def test_what_an_unexpected_failure_lost_is_announced_again(redis_url: str) -> None:
    held: Blocks = []
    directory = SpoiltDirectory(redis_url, "test")
    announcer = announcer_of(held, directory, heartbeat_s=0.05)
    await announcer.round()
    running = asyncio.create_task(announcer.run())
    hashes = chain(0, 5)
    held += [(block_hash, slot) for slot, block_hash in enumerate(hashes)]
    announcer.changed(held)

    async def is_found() -> bool:
        return await directory.locate(hashes) == {RECORD.arena_id: list(range(5))}

    await eventually(is_found)
    assert directory.has_failed
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    await directory.close()


class SlowDirectory(Directory):
    """Each round trip takes its time."""

    num_announced_all = 0

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        await asyncio.sleep(0.05)
        async with super()._bounded():
            yield

    async def announce_all(
        self,
        arena_id: str,
        blocks: Sequence[tuple[BlockHash, int]],
        ttl_s: float,
        between: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self.num_announced_all += 1
        await super().announce_all(arena_id, blocks, ttl_s, between)


async def test_an_arena_lives_while_all_it_holds_is_announced(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes longer than its time to live; and the heart of another one, who sweeps, beats meanwhile."""
    monkeypatch.setattr("kvstore.directory._BATCH_BLOCKS", 10)
    hashes = chain(0, 400)
    slow, directory = SlowDirectory(redis_url, "test"), Directory(redis_url, "test")
    blocks = [(block_hash, slot) for slot, block_hash in enumerate(hashes)]
    announcer = announcer_of(blocks, slow, heartbeat_s=0.1, ttl_s=1.0)
    announcing = asyncio.create_task(announcer.round())
    while not announcing.done():
        await directory.heartbeat_arena(replace(RECORD, arena_id="b" * 32), TTL_S)
        await asyncio.sleep(0.02)
    for _ in range(2):
        announcer.beat_soon()
        await announcer.round()
    assert slow.num_announced_all == 1
    assert await directory.runs(hashes) == {RECORD.arena_id: Run(len(hashes), 0)}
    await slow.close()
    await directory.close()


class BusyDirectory(Directory):
    """While something is announced, something else changes, until the heart has beaten three times."""

    num_beats = 0
    change: Callable[[], None]

    async def heartbeat_arena(self, record: ArenaRecord, ttl_s: float) -> bool:
        self.num_beats += 1
        return await super().heartbeat_arena(record, ttl_s)

    async def announce(
        self, arena_id: str, blocks: Sequence[tuple[BlockHash, int]], gone: Sequence[BlockHash] = ()
    ) -> bool:
        if self.num_beats < 3:
            self.change()
        return await super().announce(arena_id, blocks, gone)


async def test_an_arena_lives_while_there_is_no_end_of_changes(redis_url: str) -> None:
    held = [(block_hash, slot) for slot, block_hash in enumerate(chain(0, 5))]
    directory = BusyDirectory(redis_url, "test")
    announcer = announcer_of(held, directory)
    directory.change = lambda: announcer.changed(held)
    await announcer.round()
    directory.num_beats = 0
    directory.change()
    await asyncio.wait_for(announcer.round(), 20)
    assert directory.num_beats >= 3 and not announcer._changes
    await directory.close()
