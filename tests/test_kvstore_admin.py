"""A store and its operator: each verb over real sockets, who is heard where, and what a drain and an eviction do."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import xxhash
import zmq
import zmq.asyncio
from conftest import eventually
from hypothesis import given
from hypothesis import strategies as st
from kvstore_support import SLOT_BYTES, announced, chain, content, lingerless_context, store_config, take, writer_of

from kvstore import told
from kvstore.channel import Channel
from kvstore.client import KVClient
from kvstore.control import ControlChannel
from kvstore.curve import Curve, new_wire_key
from kvstore.directory import Directory
from kvstore.errors import ArenaDraining, ArenaUnavailable, AskFailed, BadFrame
from kvstore.frames import MAX_ROWS, Ask, Commit, Get, Got, Reserve, Told, Verb
from kvstore.operate import StoreOperator
from kvstore.quotas import SHARED
from kvstore.server import StoreConfig, StoreServer
from kvstore.ssd import record_stride
from kvstore.tally import TIERS
from kvstore.told import BlockRow, StoreStats

HASHES = chain(0, 6)
KEY = new_wire_key()
NUM_RECORDS = 400  # room for all that a test has evicted


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url)
    yield directory
    await directory.close()


@pytest.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    context = lingerless_context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def config(redis_url: str, short_dir: Path, tmp_path: Path) -> StoreConfig:
    disk = {"disk_bytes": NUM_RECORDS * record_stride(SLOT_BYTES), "disk_dir": str(tmp_path), "disk_root": "ab" * 16}
    return store_config(short_dir / "a", redis_url, **disk)


@pytest.fixture
async def store(config: StoreConfig) -> AsyncIterator[StoreServer]:
    """A store with a disk, which holds HASHES."""
    store = StoreServer(config)
    await store.start()
    writer = KVClient(store._directory, SLOT_BYTES, Path(config.dir))
    assert await writer.publish(HASHES, writer_of(HASHES)) == len(HASHES)
    await writer.close()
    await announced(store)
    yield store
    store.arena.check_integrity()
    await store.stop()


@pytest.fixture
def operator(store: StoreServer) -> StoreOperator:
    return StoreOperator(partial(ControlChannel, Path(store.config.dir) / "control"))


@pytest.fixture
async def near(store: StoreServer, directory: Directory) -> AsyncIterator[KVClient]:
    client = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    yield client
    await client.close()


@pytest.fixture
async def far(store: StoreServer, directory: Directory) -> AsyncIterator[KVClient]:
    client = KVClient(directory, SLOT_BYTES, None, wire_key=store.config.wire_key)
    yield client
    await client.close()


# --- what it tells ---


async def test_stats_are_what_was_done(store: StoreServer, operator: StoreOperator, far: KVClient) -> None:
    assert len(take(await far.fetch(await far.match(HASHES[:4])))) == 4
    sums, (memory, disk) = await operator.stats()
    assert (sums.arena_id, sums.draining, sums.slot_bytes) == (store.record().arena_id, False, SLOT_BYTES)
    assert (sums.num_committed, sums.num_writers, sums.num_refused_control) == (6, 0, 0)
    assert (memory.capacity_blocks, memory.num_blocks, memory.num_free) == (16, 6, 10)
    assert (memory.num_bytes, memory.num_hits, memory.num_misses) == (6 * SLOT_BYTES, 4, 0)
    assert (disk.tier, disk.capacity_blocks, disk.num_blocks, disk.num_hits) == ("disk", NUM_RECORDS, 0, 0)


async def test_list_by_page_and_by_prefix(store: StoreServer, operator: StoreOperator, far: KVClient) -> None:
    await far.fetch(await far.match(HASHES[:1]))
    rows, total = await operator.blocks("", 100)
    assert total == len(HASHES) and {row.hash for row in rows} == {block_hash.hex() for block_hash in HASHES}
    assert {row.tier for row in rows} == {"memory"} and {row.num_bytes for row in rows} == {SLOT_BYTES}
    reads = {row.hash: row.num_reads for row in rows}
    assert reads[HASHES[0].hex()] == 1 and sum(reads.values()) == 1
    assert all(0.0 <= row.age_s < 60.0 for row in rows)
    slots = dict(store.arena.blocks())
    assert all(row.place == slots[bytes.fromhex(row.hash)] for row in rows)
    assert [row.hash for row in (await operator.blocks("", 4))[0]] == [row.hash for row in rows[:4]]
    for num_digits in (0, 1, 7, 32):
        prefix = HASHES[2].hex()[:num_digits]
        expected = {block_hash.hex() for block_hash in HASHES if block_hash.hex().startswith(prefix)}
        rows, total = await operator.blocks(prefix, 100)
        assert {row.hash for row in rows} == expected and total == len(expected)
    assert (await operator.blocks("f" * 32, 100)) == ([], 0)


async def test_more_blocks_than_a_page_has(redis_url: str, short_dir: Path) -> None:
    num_blocks = 2 * MAX_ROWS + 50
    config = replace(store_config(short_dir / "a", redis_url), slot_bytes=64, memory_bytes=num_blocks * 128 + 4096)
    store = StoreServer(config)
    await store.start()
    writer = KVClient(store._directory, 64, Path(config.dir))
    hashes = chain(7, num_blocks)
    sums = [xxhash.xxh3_64_intdigest(bytes(64))] * num_blocks
    assert await writer.publish(hashes, lambda indices, views: sums[: len(views)]) == num_blocks
    operator = StoreOperator(partial(ControlChannel, Path(config.dir) / "control"))
    rows, total = await operator.blocks("", 10**6)
    assert total == num_blocks and {row.hash for row in rows} == {block_hash.hex() for block_hash in hashes}
    rows, total = await operator.blocks("", MAX_ROWS + 1)
    assert (len(rows), total) == (MAX_ROWS + 1, num_blocks)
    await writer.close()
    await store.stop()


async def test_inspect_tells_a_damaged_block(store: StoreServer, operator: StoreOperator) -> None:
    (detail,) = await operator.inspect(HASHES[0])
    slot = store.arena.slot(HASHES[0])
    assert slot is not None
    header = store._service._map.header(slot)
    assert (detail.tier, detail.place, detail.state, detail.verifies) == ("memory", slot, "ready", True)
    assert (detail.generation, detail.length) == (header.generation, SLOT_BYTES)
    assert detail.checksum == f"{header.checksum:016x}"
    store._service._map.view(slot)[5] ^= 1
    (detail,) = await operator.inspect(HASHES[0])
    assert not detail.verifies
    assert await operator.inspect(chain(99, 1)[0]) == []


async def test_looking_is_no_use(store: StoreServer, operator: StoreOperator) -> None:
    (before,) = await operator.inspect(HASHES[0])
    await operator.blocks("", 10)
    await asyncio.sleep(0.005)  # ages are told in milliseconds
    (after,) = await operator.inspect(HASHES[0])
    assert after.age_s > before.age_s
    assert (await operator.stats())[1][0].num_hits == 0


async def test_reads_of_the_mapping_show_by_their_stamps(operator: StoreOperator, near: KVClient) -> None:
    assert len(take(await near.fetch(near.match_local(HASHES)))) == len(HASHES)
    assert (await operator.stats())[0].num_mapped_reads == 0, "nobody has looked at the slots"
    await operator.blocks("", 100)
    assert (await operator.stats())[0].num_mapped_reads == len(HASHES)
    await operator.blocks("", 100)
    assert (await operator.stats())[0].num_mapped_reads == len(HASHES), "each once"


# --- eviction ---


async def test_evicted_by_name(store: StoreServer, operator: StoreOperator, directory: Directory) -> None:
    assert await operator.evict([HASHES[0], HASHES[3], *chain(99, 2)]) == (2, 0)
    assert {block_hash for block_hash, _ in store.arena.blocks()} == {*HASHES} - {HASHES[0], HASHES[3]}
    assert await directory.locate([HASHES[0]]) == {} and await directory.locate([HASHES[3]]) == {}
    assert len((await directory.locate([HASHES[1]]))[store.record().arena_id]) == 1
    store.arena.check_integrity()
    memory = (await operator.stats())[1][0]
    assert (memory.num_removed, memory.num_evicted, memory.num_blocks) == (2, 0, 4)


async def test_a_reader_of_the_mapping_notices(operator: StoreOperator, near: KVClient, store: StoreServer) -> None:
    match = near.match_local(HASHES)
    payloads = await near.fetch(match)
    assert len(payloads) == len(HASHES) and all(payload.is_valid() for payload in payloads)
    assert await operator.evict(None) == (len(HASHES), 0)
    assert not any(payload.is_valid() for payload in payloads), "what it copied may be half a block"
    assert await near.fetch(match) == []
    assert near.match_local(HASHES).num_blocks == 0
    assert store.arena.num_free == store.record().num_slots
    assert await near.publish(HASHES, writer_of(HASHES)) == len(HASHES)
    assert take(await near.fetch(near.match_local(HASHES))) == [content(block_hash) for block_hash in HASHES]


async def test_what_is_being_written_is_not_touched(
    store: StoreServer, operator: StoreOperator, near: KVClient
) -> None:
    ours, write = chain(300, 4), writer_of(chain(300, 4))
    is_writing, may_end = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slowly(indices: list, views: list) -> list[int]:
        loop.call_soon_threadsafe(is_writing.set)
        asyncio.run_coroutine_threadsafe(may_end.wait(), loop).result(30)
        return write(indices, views)

    publishing = asyncio.create_task(near.publish(ours, slowly))
    await is_writing.wait()
    (detail,) = await operator.inspect(ours[0])
    assert (detail.state, detail.verifies) == ("writing", False)
    assert await operator.evict(ours) == (0, 0)
    assert await operator.evict(None) == (len(HASHES), 0)
    store.arena.check_integrity()
    may_end.set()
    assert await publishing == 4
    assert take(await near.fetch(near.match_local(ours))) == [content(block_hash) for block_hash in ours]


async def test_the_disk_is_told_and_asked_too(
    store: StoreServer, operator: StoreOperator, near: KVClient, far: KVClient, directory: Directory
) -> None:
    await _crowd_out(store, near)
    await eventually(lambda: store._disk.index.num_writing == 0, what="what is on its way to the disk has come")
    assert all(block_hash in store._disk.index for block_hash in HASHES)
    (detail,) = await operator.inspect(HASHES[0])
    assert (detail.tier, detail.state, detail.verifies, detail.length) == ("disk", "ready", True, SLOT_BYTES)
    rows, _ = await operator.blocks(HASHES[0].hex(), 10)
    assert [(row.tier, row.place) for row in rows] == [("disk", detail.place)]
    sums, (memory, disk) = await operator.stats()
    assert sums.num_demoted >= len(HASHES) and disk.num_blocks == len(store._disk.index)
    assert memory.num_evicted >= len(HASHES)

    assert await operator.evict(HASHES[:1]) == (0, 1)
    assert await operator.inspect(HASHES[0]) == [] and await directory.locate(HASHES[:1]) == {}
    store._disk.index.check_integrity()

    assert take(await far.fetch(await far.match(HASHES[1:4]))) == [content(block_hash) for block_hash in HASHES[1:4]]
    sums, (memory, disk) = await operator.stats()
    assert (disk.num_hits, disk.num_misses, sums.num_promoted) == (3, 0, 3)
    assert (memory.num_hits, memory.num_misses) == (0, 3)
    assert {detail.tier for detail in await operator.inspect(HASHES[1])} == {"memory", "disk"}
    assert await operator.evict(HASHES[1:2]) == (1, 1)

    slot_of_disk = (await operator.inspect(HASHES[5]))[0].place
    store._disk._file._write(b"scribble", slot_of_disk * record_stride(SLOT_BYTES) + 500)
    assert not (await operator.inspect(HASHES[5]))[0].verifies
    await eventually(lambda: store._disk.index.num_writing == 0, what="what is on its way there has come")
    await operator.evict(None)
    assert len(store._disk.index) == 0 and store._disk._file.records() == [], "a restart brings nothing back"
    store._disk.index.check_integrity()


async def _crowd_out(store: StoreServer, near: KVClient) -> None:
    """HASHES are used again after a while, and then others need all slots."""
    for number in range(4):
        await near.publish(chain(1000 + 100 * number, 4), writer_of(chain(1000 + 100 * number, 4)))
        await near.publish(HASHES, writer_of(HASHES))
    for number in range(8):
        await near.publish(chain(5000 + 100 * number, 16), writer_of(chain(5000 + 100 * number, 16)))
    await announced(store)
    assert not any(store.arena.holds(block_hash) for block_hash in HASHES)


# --- drain ---


async def test_drain_and_undrain(
    store: StoreServer, operator: StoreOperator, near: KVClient, far: KVClient, directory: Directory
) -> None:
    await operator.drain()
    await eventually(lambda: _is_draining(directory), what="the record says so")
    mapped = near._mapped()
    assert mapped is not None
    with pytest.raises(ArenaDraining):
        await mapped.reserve(chain(700, 2), SHARED)
    others = chain(800, 3)
    assert await near.publish(others, writer_of(others)) == 0
    assert near._mapped() is mapped, "the mapping is as good as before"
    assert not near.can_publish, "nobody is told to wait for blocks that do not come"
    assert take(await near.fetch(near.match_local(HASHES))) == [content(block_hash) for block_hash in HASHES]
    assert take(await far.fetch(await far.match(HASHES))) == [content(block_hash) for block_hash in HASHES]
    assert (await operator.stats())[0].num_draining == 2
    await operator.drain(undo=True)
    await eventually(lambda: near.can_publish, what="it tries again")
    assert await near.publish(others, writer_of(others)) == 3
    assert not await _is_draining(directory)


async def _is_draining(directory: Directory) -> bool:
    return [arena.draining for arena in await directory.arenas()] == [True]


async def test_a_draining_store_takes_what_was_reserved_before(
    store: StoreServer, operator: StoreOperator, near: KVClient
) -> None:
    ours, write = chain(300, 2), writer_of(chain(300, 2))

    def slowly(indices: list, views: list) -> list[int]:
        asyncio.run_coroutine_threadsafe(operator.drain(), loop).result(30)
        return write(indices, views)

    loop = asyncio.get_running_loop()
    assert await near.publish(ours, slowly) == 2


# --- who is heard ---


async def test_on_an_open_data_socket_nobody_is_heard(
    store: StoreServer, context: zmq.asyncio.Context, caplog: pytest.LogCaptureFixture
) -> None:
    channel = Channel(context, store.record().address)
    with caplog.at_level(logging.WARNING):
        for verb in Verb:
            with pytest.raises(ArenaUnavailable):
                await channel.request(lambda request_id, verb=verb: Ask(request_id, verb, HASHES), 0.05)
        await eventually(lambda: store._tally.refused_frames["data"] == len(Verb))
    assert 0 < sum("event=bad_frame" in line for line in caplog.messages) < len(Verb), "one line a second"
    assert len(store.arena.blocks()) == len(HASHES) and not store.record().draining
    got = (await channel.request(lambda request_id: Get(request_id, HASHES[:1]), 5.0)).message
    assert isinstance(got, Got) and got.blocks[0].length == SLOT_BYTES
    channel.close()


async def test_with_the_wire_key_operators_of_other_machines_are_heard(
    redis_url: str, short_dir: Path, context: zmq.asyncio.Context
) -> None:
    store = StoreServer(store_config(short_dir / "a", redis_url, wire_key=KEY))
    record = await store.start()
    sums, _ = await StoreOperator(partial(Channel, context, record.address, curve=Curve(KEY))).stats()
    assert sums.arena_id == record.arena_id
    for stranger in (None, Curve(new_wire_key())):
        with pytest.raises(ArenaUnavailable):
            await StoreOperator(partial(Channel, context, record.address, curve=stranger)).stats()
    await store.stop()


async def test_messages_for_the_other_socket_are_refused(store: StoreServer, context: zmq.asyncio.Context) -> None:
    sockets: list[zmq.asyncio.Socket] = []  # what a closed one has not sent is dropped
    for message in (
        Reserve(1, "ab" * 16, "cd" * 16, HASHES),
        Commit(1, "ab" * 16, "cd" * 16, []),
        Told(1, 5),
    ):
        sockets.append(context.socket(zmq.DEALER))
        sockets[-1].connect(store.record().address)
        await sockets[-1].send(message.encode())
    await eventually(lambda: store._tally.refused_frames == {"control": 0, "data": 3})


async def test_a_store_that_cannot_says_so(operator: StoreOperator, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AskFailed, match="70 blocks to inspect; at most 64"):
        await operator._ask(lambda request_id: Ask(request_id, Verb.INSPECT, chain(0, 70)))

    def fail(_: object) -> bytes:
        raise RuntimeError("injected")

    monkeypatch.setattr(told, "encode", fail)
    with pytest.raises(AskFailed, match="its log says why"):
        await operator.stats()


# --- answers of any origin ---

ROW = {"hash": "ab" * 16, "tier": "disk", "place": 1, "num_bytes": 1, "age_s": 1.5, "num_reads": 2}


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"1", b"\xff", b"[" * 60_000, b" " * 70_000, b'"' + b"x" * 70_000])
def test_what_is_no_answer(text: bytes) -> None:
    with pytest.raises(BadFrame):
        told.decode(text)


@pytest.mark.parametrize(
    "harm",
    [
        {"hash": "ab"},
        {"hash": "\x1b[31m" + "a" * 27},
        {"tier": "[red]"},
        {"place": "1"},
        {"place": 2**70},
        {"age_s": float("nan")},
        {"num_reads": True},
        {"num_reads": None},
    ],
)
def test_rows_that_cannot_be(harm: dict[str, object]) -> None:
    assert told.one(BlockRow, ROW).num_reads == 2
    for value in (ROW | harm, [ROW], None, {}):
        with pytest.raises(BadFrame):
            told.one(BlockRow, value)
    with pytest.raises(BadFrame):
        told.many(BlockRow, [ROW, ROW | harm])


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner))


@given(
    st.binary(max_size=100) | values.map(lambda value: json.dumps(value).encode()), st.sampled_from(sorted(ROW)), values
)
def test_answers_of_any_origin_are_right_or_refused(text: bytes, name: str, value: object) -> None:
    """Anything but a `BadFrame` fails the test, and so does a row with a field of another kind."""
    with suppress(BadFrame):
        assert isinstance(told.decode(text), dict)
    with suppress(BadFrame):
        row = told.one(BlockRow, ROW | {name: value})
        assert type(getattr(row, name)) is type(ROW[name]) and row.tier in TIERS and len(bytes.fromhex(row.hash)) == 16


@pytest.mark.parametrize("value", [None, -1, 2**63, 1.0, True, "1"])
def test_counts_that_cannot_be(value: object) -> None:
    with pytest.raises(BadFrame):
        told.count(value)
    with pytest.raises(BadFrame):
        told.one(StoreStats, {"arena_id": value})


async def test_answers_over_the_limit_are_not_sent() -> None:
    with pytest.raises(ValueError, match="at most"):
        told.encode({"x": "y" * 70_000})
