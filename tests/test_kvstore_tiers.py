"""A store with a disk: what is evicted comes back, also after a restart, and a disk that fails costs a miss."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from kvstore_support import SLOT_BYTES, chain, content, store_config, take, writer_of

from kvstore import tiers
from kvstore.blocks import BlockHash
from kvstore.client import KVClient
from kvstore.directory import ON_DISK, Directory
from kvstore.eviction import ADMISSIONS
from kvstore.quotas import SHARED, Owner
from kvstore.server import StoreConfig, StoreServer
from kvstore.ssd import HEADER_BYTES, BlockFile, Record, record_stride

NUM_SLOTS, NUM_RECORDS = 16, 24
OURS = chain(0, 4)
KNOWN = [content(block_hash) for block_hash in OURS]


@pytest.fixture
def config(redis_url: str, short_dir: Path, tmp_path: Path) -> StoreConfig:
    disk = {"disk_bytes": NUM_RECORDS * record_stride(SLOT_BYTES), "disk_dir": str(tmp_path), "disk_root": "ab" * 16}
    return store_config(short_dir / "store", redis_url, NUM_SLOTS, disk_admission="second-touch", **disk)


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url)
    yield directory
    await directory.close()


class Here:
    """A store, a client that maps its arena, and one that does not."""

    def __init__(self, config: StoreConfig, directory: Directory) -> None:
        self.store = StoreServer(config)
        self.directory = directory
        self.near = KVClient(directory, SLOT_BYTES, Path(config.dir))
        self.far = KVClient(directory, SLOT_BYTES, None)
        self._next = 1000

    async def __aenter__(self) -> Here:
        await self.store.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.near.close()
        await self.far.close()
        await self.store.stop()

    async def publish(self, hashes: Sequence[BlockHash], owner: Owner = SHARED) -> None:
        await self.near.publish(hashes, writer_of(hashes), owner)

    async def crowd_out(self) -> None:
        """Others need all slots."""
        for _ in range(3):
            await self.publish(chain(self._next, NUM_SLOTS))
            self._next += 1000
        assert not any(self.store.arena.holds(block_hash) for block_hash in OURS)

    async def publish_twice(self, owner: Owner = SHARED) -> None:
        """OURS is asked for again after a while, and then loses its slots."""
        await self.publish(OURS, owner)
        await self.publish(chain(900, 2))
        await self.publish(OURS, owner)
        await self.crowd_out()

    async def tiers(self) -> list[int]:
        found = await self.directory.locate(OURS)
        return found.get(self.store.record().arena_id, [])

    async def is_on_disk(self) -> bool:
        return await self.tiers() == [ON_DISK] * len(OURS)


async def read(client: KVClient) -> list[bytes]:
    return take(await client.fetch(await client.match(OURS)))


@pytest.mark.parametrize("is_near", [True, False])
async def test_what_was_used_again_comes_back_from_disk(
    config: StoreConfig, directory: Directory, is_near: bool
) -> None:
    async with Here(config, directory) as here:
        await here.publish_twice()
        await eventually(here.is_on_disk)
        assert await read(here.near if is_near else here.far) == KNOWN
        here.store.arena.check_integrity()
        assert all(here.store.arena.holds(block_hash) for block_hash in OURS), "promoted"
        await eventually(lambda: _has_slots(here))
        assert await read(here.near) == KNOWN
        await here.crowd_out()
        await eventually(here.is_on_disk)
        assert await read(here.far) == KNOWN
        assert here.store.arena.writers() == set()


async def _has_slots(here: Here) -> bool:
    slots = await here.tiers()
    return len(slots) == len(OURS) and ON_DISK not in slots


@pytest.mark.parametrize("is_near", [True, False])
async def test_what_comes_from_disk_says_nothing_about_memory(
    config: StoreConfig, directory: Directory, is_near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_record = BlockFile.read

    def read_slowly(self: BlockFile, record: Record, view: memoryview) -> bool:
        time.sleep(0.02)
        return read_record(self, record, view)

    monkeypatch.setattr(BlockFile, "read", read_slowly)
    async with Here(config, directory) as here:
        await here.publish_twice()
        await eventually(here.is_on_disk)
        client, arena_id = here.near if is_near else here.far, here.store.record().arena_id
        assert await read(client) == KNOWN
        memory, disk = client.links.stretches([(arena_id, 0), (arena_id, ON_DISK)])
        assert 0.0 == memory.bytes_per_s < disk.bytes_per_s <= SLOT_BYTES / 0.02


async def test_a_read_overtakes_writes_that_wait(
    config: StoreConfig, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record, read_record = BlockFile.write, BlockFile.read
    calls, may_write = list[str](), threading.Event()

    def write(self: BlockFile, *arguments: Any) -> Record:
        calls.append("write")
        may_write.wait(20)
        return write_record(self, *arguments)

    def read_one(self: BlockFile, record: Record, view: memoryview) -> bool:
        calls.append("read")
        return read_record(self, record, view)

    monkeypatch.setattr(tiers, "_READ_S", 20.0)
    ample = 20 * NUM_SLOTS * record_stride(SLOT_BYTES)
    async with Here(replace(config, disk_admission="all", disk_bytes=ample), directory) as here:
        disk = here.store._disk
        await here.publish(OURS)
        await here.crowd_out()
        assert disk is not None
        await eventually(lambda: not disk._tasks)
        monkeypatch.setattr(BlockFile, "write", write)
        monkeypatch.setattr(BlockFile, "read", read_one)
        await here.crowd_out()
        reading = asyncio.create_task(read(here.far))
        await eventually(lambda: here.store.arena.writers())
        may_write.set()
        assert await reading == KNOWN
        await eventually(lambda: not disk._tasks)
        assert calls[:5] == ["write", *["read"] * 4] and len(calls) > 20
        disk._index.check_integrity()


async def test_a_run_in_memory_and_on_disk_is_one(config: StoreConfig, directory: Directory) -> None:
    async with Here(config, directory) as here:
        await here.publish_twice()
        await eventually(here.is_on_disk)
        await here.publish(OURS[:2])
        assert [slot == ON_DISK for slot in await here.tiers()] == [False, False, True, True]
        assert await read(here.far) == KNOWN
        arena_id = here.store.record().arena_id
        memory, disk = here.far.links.stretches([(arena_id, 0), (arena_id, ON_DISK)])
        assert memory.bytes_per_s and disk.bytes_per_s and not memory.in_flight_bytes and not disk.in_flight_bytes


async def test_what_was_used_once_is_not_written(config: StoreConfig, directory: Directory) -> None:
    async with Here(config, directory) as here:
        await here.publish(OURS)
        assert len(await read(here.far)) == len(OURS), "the hand-off is no second use"
        await here.crowd_out()
        assert await here.tiers() == [] and here.store._service.inventory() == here.store.arena.blocks()


async def test_all_that_is_evicted_is_written_where_that_is_asked_for(
    config: StoreConfig, directory: Directory
) -> None:
    ample = 10 * NUM_SLOTS * record_stride(SLOT_BYTES)
    async with Here(replace(config, disk_admission="all", disk_bytes=ample), directory) as here:
        await here.publish(OURS)
        await here.crowd_out()
        await eventually(here.is_on_disk)
        assert await read(here.near) == KNOWN
        here.store.arena.check_integrity()


@pytest.mark.parametrize(("quota_blocks", "is_kept"), [(None, True), (4, False)])
async def test_no_disk_holds_what_a_quota_does_not_allow(
    config: StoreConfig, directory: Directory, quota_blocks: int | None, is_kept: bool
) -> None:
    async with Here(config, directory) as here:
        await here.publish_twice(Owner(b"t" * 16, quota_blocks))
        assert await _settled(here) is is_kept


async def _settled(here: Here) -> bool:
    """Whether OURS is on disk, when all that was evicted has been written."""
    disk = here.store._disk
    assert disk is not None
    await asyncio.gather(*disk._tasks)
    return disk.is_needed(OURS)


async def test_blocks_survive_a_restart(config: StoreConfig, directory: Directory) -> None:
    async with Here(config, directory) as here:
        await here.publish_twice()
        await eventually(here.is_on_disk)
    assert await directory.locate(OURS) == {}
    async with Here(config, directory) as here:
        assert await here.is_on_disk(), "announced before anyone hears of the store"
        assert await read(here.near) == KNOWN
    async with Here(replace(config, disk_root="cd" * 16), directory) as here:
        assert await here.tiers() == [], "of another model"


async def test_a_damaged_block_ends_the_run_and_is_forgotten(
    config: StoreConfig, directory: Directory, tmp_path: Path
) -> None:
    async with Here(config, directory) as here:
        await here.publish_twice()
        await eventually(here.is_on_disk)
        disk = here.store._disk
        assert disk is not None
        record = disk._index.find(OURS[2])
        assert record is not None
        with (tmp_path / "blocks.kv").open("r+b") as file:
            file.seek(record.number * record_stride(SLOT_BYTES) + HEADER_BYTES + 77)
            file.write(b"?")
        assert await read(here.near) == KNOWN[:2]
        assert OURS[2] not in disk._index
        disk._index.check_integrity()
        await eventually(lambda: _length(here, 2))
        await here.publish(OURS)
        assert await read(here.near) == KNOWN, "computed again"


async def _length(here: Here, length: int) -> bool:
    return len(await here.tiers()) == length


async def test_a_full_disk_is_a_miss_and_is_left_alone_for_a_while(
    config: StoreConfig, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def write(self: BlockFile, number: int, *_: object) -> None:
        calls.append(number)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(BlockFile, "write", write)
    async with Here(config, directory) as here:
        await here.publish_twice()
        disk = here.store._disk
        assert disk is not None
        await eventually(lambda: not disk._tasks)
        assert len(calls) == 1 and await here.tiers() == []
        disk._index.check_integrity()
        await here.publish(OURS)
        assert await read(here.near) == KNOWN


async def test_the_disk_keeps_to_its_bound(config: StoreConfig, directory: Directory, tmp_path: Path) -> None:
    async with Here(config, directory) as here:
        for number in range(5):
            mine = chain(50_000 + 100 * number, 8)
            await here.publish(mine)
            await here.publish(chain(900 + 10 * number, 2))
            await here.publish(mine)
            await here.crowd_out()
        disk = here.store._disk
        assert disk is not None
        await eventually(lambda: not disk._tasks)
        assert len(disk._index) == NUM_RECORDS
        disk._index.check_integrity()
        inventory = dict(here.store._service.inventory())
        assert len(inventory) == NUM_SLOTS + NUM_RECORDS
    assert (tmp_path / "blocks.kv").stat().st_size <= config.disk_bytes


async def test_a_disk_that_cannot_be_used_is_a_tier_less(
    config: StoreConfig, directory: Directory, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    async with Here(replace(config, disk_dir=str(tmp_path / "file")), directory) as here:
        await here.publish_twice()
        assert here.store._disk is None and await here.tiers() == []


@pytest.mark.parametrize("admission", sorted(ADMISSIONS))
async def test_readers_and_writers_all_at_once(config: StoreConfig, directory: Directory, admission: str) -> None:
    """Blocks go to disk and come back under many readers and writers: what is valid is right, and the books balance."""
    chains = [chain(1000 * number, 6) for number in range(8)]
    async with Here(replace(config, disk_admission=admission), directory) as here:
        deadline_s, num_read, num_on_disk = time.monotonic() + 2.0, 0, 0

        async def work(seed: int) -> None:
            nonlocal num_read, num_on_disk
            generator = random.Random(seed)
            while time.monotonic() < deadline_s:
                client, hashes = generator.choice([here.near, here.far]), generator.choice(chains)
                if generator.random() < 0.4:
                    await client.publish(hashes, writer_of(hashes))
                    continue
                match = await client.match(hashes)
                num_on_disk += sum(slot == ON_DISK for _, slot in match.places)
                taken = take(await client.fetch(match))
                assert taken == [content(block_hash) for block_hash in hashes[: len(taken)]]
                num_read += len(taken)

        await asyncio.gather(*(work(seed) for seed in range(6)))
        disk = here.store._disk
        assert disk is not None and num_read > 0 and num_on_disk > 0
        await eventually(lambda: not disk._tasks)
        disk._index.check_integrity()
        here.store.arena.check_integrity()
        assert here.store.arena.writers() == set() and disk._pending_bytes == 0
        await eventually(lambda: _is_told(here, [block_hash for hashes in chains for block_hash in hashes]))


async def _is_told(here: Here, hashes: Sequence[BlockHash]) -> bool:
    """Whether the directory says of each block what the store would."""
    inventory, arena_id = dict(here.store._service.inventory()), here.store.record().arena_id
    told = [(await here.directory.locate([block_hash])).get(arena_id, [None])[0] for block_hash in hashes]
    return told == [inventory.get(block_hash) for block_hash in hashes]
