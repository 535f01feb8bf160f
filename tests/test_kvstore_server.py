"""The store process: its sockets, its files, its writers' deaths, and its entry in the directory."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
import zmq
import zmq.asyncio
from conftest import RedisProcess, eventually
from kvstore_support import (
    SLOT_BYTES,
    WRITER,
    ControlPeer,
    Process,
    announced,
    chain,
    content,
    lingerless_context,
    start_store,
    store_config,
    take,
    writer_of,
)

from kvstore.arena import Written
from kvstore.client import KVClient
from kvstore.directory import Directory
from kvstore.errors import ArenaUnavailable
from kvstore.frames import Commit, Committed, Get, Got, Message, Reserve, Reserved, Status, decode
from kvstore.local import FileLock, StorePaths
from kvstore.server import StoreConfig, StoreServer


@pytest.fixture
async def config(redis_url: str, short_dir: Path) -> StoreConfig:
    return store_config(short_dir / "store", redis_url)


@pytest.fixture
async def store(config: StoreConfig) -> AsyncIterator[StoreServer]:
    store = StoreServer(config)
    await store.start()
    yield store
    await store.stop()
    assert not Path(config.dir).exists(), "a store that stops leaves no files"


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url)
    yield directory
    await directory.close()


class Peer:
    """A raw ZeroMQ socket that says what it likes to a store."""

    def __init__(self, address: str) -> None:
        self.context = lingerless_context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.connect(address)

    async def ask(self, message: Message) -> tuple[Message, list[bytes]]:
        await self.socket.send(message.encode())
        frames = await asyncio.wait_for(self.socket.recv_multipart(), 10)
        return decode(frames[0]), frames[1:]

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
async def writer(store: StoreServer) -> AsyncIterator[ControlPeer]:
    peer = await ControlPeer(store.config.dir).open()
    yield peer
    peer.close()


@pytest.fixture
async def reader(store: StoreServer) -> AsyncIterator[Peer]:
    peer = Peer(store.record().address)
    yield peer
    peer.close()


async def test_write_announce_read(store: StoreServer, writer: ControlPeer, reader: Peer, directory: Directory) -> None:
    arena_id, writer_id = store.record().arena_id, "ab" * 16
    lock = FileLock.create(StorePaths(Path(store.config.dir)).writer(writer_id))
    hashes = chain(0, 3)
    reserved, _ = await writer.ask(Reserve(1, arena_id, writer_id, hashes))
    assert isinstance(reserved, Reserved) and reserved.status is Status.OK
    written = []
    for block_hash, item in zip(hashes, reserved.reservations, strict=True):
        assert item is not None
        store._service._map.view(item.slot)[:] = content(block_hash)
        written.append(Written(item.slot, item.generation, xxhash.xxh3_64_intdigest(content(block_hash))))
    got, payloads = await reader.ask(Get(1, hashes))
    assert got == Got(1, []) and payloads == []
    committed, _ = await writer.ask(Commit(2, arena_id, writer_id, written))
    assert committed == Committed(2, Status.OK, 3)
    slots = [item.slot for item in written]

    async def is_announced() -> bool:
        return await directory.locate(hashes) == {arena_id: slots}

    await eventually(is_announced, what="committed is announced, by itself")
    got, payloads = await reader.ask(Get(7, [*hashes[:2], *chain(9, 1), hashes[2]]))
    assert isinstance(got, Got) and got.request_id == 7
    assert [block.length for block in got.blocks] == [SLOT_BYTES, SLOT_BYTES], "the run ends where one is missing"
    assert payloads == [content(block_hash) for block_hash in hashes[:2]]
    lock.remove()


async def test_messages_for_an_arena_that_is_no_more(store: StoreServer, writer: ControlPeer) -> None:
    answer, _ = await writer.ask(Reserve(1, "00" * 16, "ab" * 16, chain(0, 1)))
    assert answer == Reserved(1, Status.STALE, [])
    answer, _ = await writer.ask(Commit(2, "00" * 16, "ab" * 16, [Written(0, 1, 0)]))
    assert answer == Committed(2, Status.STALE)
    assert store.arena.num_free == store.record().num_slots


GARBAGE = [
    [b""],
    [b"", b""],
    [b"x" * 50],
    [os.urandom(300)],
    [Get(1, chain(0, 2)).encode()[:-1]],
    [Get(1, chain(0, 2)).encode(), b"more"],
    [Got(1, []).encode()],
    [Reserved(1, Status.OK, [None]).encode()],
    [b"x" * 300_000],  # over the limit: the connection is cut
    [b"x"] * 500,
]


async def test_garbage_is_refused_and_nothing_else_happens(store: StoreServer) -> None:
    for frames in GARBAGE:
        bad = Peer(store.record().address)
        await bad.socket.send_multipart(frames)
        await asyncio.sleep(0.01)
        bad.close()
    good = Peer(store.record().address)
    answer, _ = await good.ask(Get(5, chain(0, 1)))
    assert answer.request_id == 5
    good.close()
    store.arena.check_integrity()


async def test_reader_that_never_reads_does_not_stop_others(
    store: StoreServer, reader: Peer, directory: Directory
) -> None:
    client = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    hashes = chain(0, 10)
    assert await client.publish(hashes, writer_of(hashes)) == 10
    stuck = Peer(store.record().address)
    for _ in range(200):
        await stuck.socket.send(Get(1, hashes).encode())
    got, payloads = await reader.ask(Get(2, hashes))
    assert isinstance(got, Got) and len(payloads) == 10
    stuck.close()
    await client.close()


async def test_bad_configs_are_refused_by_name(redis_url: str, short_dir: Path) -> None:
    config = store_config(short_dir / "store", redis_url)
    bad = [
        (replace(config, dir=str(short_dir / ("x" * 90))), ValueError, "dir"),
        (replace(config, memory_bytes=SLOT_BYTES), ValueError, "memory_bytes"),
        (replace(config, memory_bytes=1 << 44), OSError, "memory_bytes"),
        (replace(config, bind_host="203.0.113.1", trusts_network=True), OSError, "203"),
        (replace(config, bind_host="0.0.0.0"), ValueError, "bind_host: 0.0.0.0 needs a wire_key"),
        (replace(config, eviction="fifo"), ValueError, "eviction: 'fifo' is none of lru, s3fifo"),
        (replace(config, disk_admission="none"), ValueError, "disk_admission: 'none' is none of all, second-touch"),
        (replace(config, wire_key="secret"), ValueError, "wire_key: must be 64 hex digits"),
    ]
    for wrong, error, text in bad:
        with pytest.raises(error, match=text):
            await StoreServer(wrong).start()
    assert list(short_dir.iterdir()) == []


async def test_one_store_a_directory(store: StoreServer) -> None:
    with pytest.raises(ArenaUnavailable, match="running"):
        await StoreServer(store.config).start()
    assert StorePaths(Path(store.config.dir)).description.exists()


async def test_store_works_without_redis_and_announces_when_it_comes(
    redis_process: RedisProcess, short_dir: Path
) -> None:
    redis_process.kill()
    store = StoreServer(store_config(short_dir / "store", redis_process.url))
    record = await store.start()
    directory = Directory(redis_process.url)
    client = KVClient(directory, SLOT_BYTES, short_dir / "store")
    hashes = chain(0, 4)
    assert await client.publish(hashes, writer_of(hashes)) == 4
    for _ in range(2):  # it may go and come back empty as often as it likes
        redis_process.start()
        await eventually(lambda: _holds(directory, record.arena_id, hashes))
        redis_process.kill()
        await asyncio.sleep(0.3)
    await client.close()
    await store.stop()
    await directory.close()


async def _holds(directory: Directory, arena_id: str, hashes: list) -> bool:
    try:
        return len((await directory.locate(hashes)).get(arena_id, [])) == len(hashes)
    except Exception:
        return False


async def test_evicted_blocks_leave_the_directory(store: StoreServer, directory: Directory) -> None:
    client = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    num_slots = store.record().num_slots
    old, new = chain(0, num_slots), chain(1000, num_slots // 2)
    assert await client.publish(old, writer_of(old)) == num_slots
    assert await client.publish(new, writer_of(new)) == num_slots // 2
    await announced(store)
    found = await directory.locate(old)
    assert len(found[store.record().arena_id]) == num_slots - num_slots // 2
    assert len((await directory.locate(new))[store.record().arena_id]) == num_slots // 2
    await client.close()


async def test_what_is_evicted_without_a_commit_leaves_the_directory_before_the_next_heartbeat(
    config: StoreConfig, directory: Directory
) -> None:
    store = StoreServer(replace(config, heartbeat_s=100.0, ttl_s=500.0))
    arena_id, num_slots = (await store.start()).arena_id, store.record().num_slots
    client, hashes = KVClient(directory, SLOT_BYTES, Path(config.dir)), chain(0, num_slots)
    assert await client.publish(hashes, writer_of(hashes)) == num_slots
    await announced(store)
    peer = await ControlPeer(config.dir).open()
    reserved, _ = await peer.ask(Reserve(1, arena_id, "ab" * 16, chain(1000, 3)))
    assert isinstance(reserved, Reserved) and reserved.status is Status.OK

    async def num_known() -> int:
        return sum([bool(await directory.locate([block_hash])) for block_hash in hashes])

    await eventually(lambda: _is(num_known, num_slots - 3), timeout_s=20.0)
    peer.close()
    await client.close()
    await store.stop()


async def _is(count: Callable[[], Awaitable[int]], expected: int) -> bool:
    return await count() == expected


async def test_many_changes_at_once_end_in_a_true_inventory(store: StoreServer, directory: Directory) -> None:
    client = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    chains = [chain(1000 * number, 5) for number in range(20)]
    await asyncio.gather(*(client.publish(hashes, writer_of(hashes)) for hashes in chains))
    await announced(store)
    held = dict(store.arena.blocks())
    assert len(held) == store.record().num_slots
    for hashes in chains:
        for block_hash in hashes:
            found = await directory.locate([block_hash])
            assert found == ({store.record().arena_id: [held[block_hash]]} if block_hash in held else {})
    await client.close()


async def test_writer_killed_in_the_middle_leaves_nothing(store: StoreServer) -> None:
    writer = await Process.start(WRITER, _writer_config(store, 8))
    try:
        assert store.arena.num_free == store.record().num_slots - 8
        await asyncio.sleep(1.2)
        assert store.arena.num_free == store.record().num_slots - 8, "a writer that lives keeps its slots"
    finally:
        await writer.kill()
    await eventually(lambda: store.arena.num_free == store.record().num_slots, what="the slots come back")
    store.arena.check_integrity()
    assert store.arena.blocks() == [] and store.arena.writers() == set()
    assert list((Path(store.config.dir) / "writers").iterdir()) == []


async def test_stalled_writer_keeps_its_slots_and_harms_nobody(store: StoreServer, directory: Directory) -> None:
    num_slots = store.record().num_slots
    writer = await Process.start(WRITER, _writer_config(store, num_slots - 4))
    client = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    try:
        writer.send(signal.SIGSTOP)
        for number in range(5):  # others work with the slots that are left
            hashes = chain(5000 + 100 * number, 4)
            assert await client.publish(hashes, writer_of(hashes)) == 4
            await asyncio.sleep(0.2)
            assert take(await client.fetch(await client.match(hashes))) == [content(h) for h in hashes]
        assert len(store.arena.writers()) == 1
        writer.send(signal.SIGCONT)
        await asyncio.sleep(0.2)
        assert take(await client.fetch(await client.match(hashes))) == [content(h) for h in hashes]
    finally:
        await writer.kill()
    await eventually(lambda: store.arena.num_free == num_slots - 4)
    store.arena.check_integrity()
    await client.close()


def _writer_config(store: StoreServer, num_blocks: int) -> dict[str, object]:
    config = store.config
    hashes = [block_hash.hex() for block_hash in chain(77, num_blocks)]
    return {"redis_url": config.redis_url, "slot_bytes": SLOT_BYTES, "dir": config.dir, "hashes": hashes}


async def test_late_reserve_of_a_writer_that_is_gone_is_taken_back(store: StoreServer, writer: ControlPeer) -> None:
    """The writer gave up waiting and let go of its lock; then the store gets to its message."""
    answer, _ = await writer.ask(Reserve(1, store.record().arena_id, "cd" * 16, chain(0, 3)))
    assert isinstance(answer, Reserved) and all(answer.reservations)
    await eventually(lambda: store.arena.num_free == store.record().num_slots)
    store.arena.check_integrity()


async def test_killed_store_is_replaced_and_its_files_go(config: StoreConfig) -> None:
    first = await start_store(config)
    folder = Path(config.dir)
    (old_memory,) = folder.glob("arena-*.mem")
    await first.kill()
    assert old_memory.exists()
    second = StoreServer(config)
    record = await second.start()
    assert record.arena_id != first.line
    assert [path.name for path in folder.glob("arena-*.mem")] == [f"arena-{record.arena_id}.mem"]
    await second.stop()
    assert not folder.exists()


async def test_stop_leaves_the_directory(config: StoreConfig, directory: Directory) -> None:
    store = StoreServer(config)
    record = await store.start()
    assert [arena.arena_id for arena in await directory.arenas()] == [record.arena_id]
    await store.stop()
    assert await directory.arenas() == []


async def test_stop_keeps_what_is_not_its_own(config: StoreConfig) -> None:
    store = StoreServer(config)
    await store.start()
    mine = Path(config.dir) / "mine.txt"
    mine.write_text("kept")
    await store.stop()
    assert [path.name for path in Path(config.dir).iterdir()] == ["mine.txt"]
