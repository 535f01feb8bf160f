"""/metrics of a store, read over HTTP as Prometheus does: the figures are those of what was done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from conftest import eventually
from kvstore_support import SLOT_BYTES, ControlPeer, announced, chain, lingerless_context, store_config, take, writer_of
from prometheus_client.core import GaugeMetricFamily
from scraping import http, scrape

from kvstore.client import KVClient
from kvstore.directory import Directory
from kvstore.scrape import ScrapeDoor
from kvstore.server import StoreConfig, StoreServer
from kvstore.ssd import record_stride

HASHES = chain(0, 6)
NUM_RECORDS = 400  # room for all that a test has evicted


@pytest.fixture
def config(redis_url: str, short_dir: Path, tmp_path: Path) -> StoreConfig:
    disk = {"disk_bytes": NUM_RECORDS * record_stride(SLOT_BYTES), "disk_dir": str(tmp_path), "disk_root": "ab" * 16}
    return store_config(short_dir / "a", redis_url, **disk)


@pytest.fixture
async def store(config: StoreConfig) -> AsyncIterator[StoreServer]:
    store = StoreServer(config)
    await store.start()
    yield store
    await store.stop()


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url)
    yield directory
    await directory.close()


@pytest.fixture
async def clients(store: StoreServer, directory: Directory) -> AsyncIterator[tuple[KVClient, KVClient]]:
    """One that maps the arena, and one that does not."""
    clients = KVClient(directory, SLOT_BYTES, Path(store.config.dir)), KVClient(directory, SLOT_BYTES, None)
    yield clients
    for client in clients:
        await client.close()


async def test_figures_are_those_of_what_was_done(store: StoreServer, clients: tuple[KVClient, KVClient]) -> None:
    record, (near, far) = store.record(), clients
    await near.publish(HASHES, writer_of(HASHES))
    await announced(store)
    assert len(take(await far.fetch(await far.match(HASHES[:4])))) == 4
    first = await scrape(record.metrics_address)
    assert first["baton_kv_capacity_blocks", "memory"] == 16
    assert first["baton_kv_capacity_bytes", "memory"] == 16 * SLOT_BYTES
    assert first["baton_kv_blocks", "memory"] == 6 and first["baton_kv_bytes", "memory"] == 6 * SLOT_BYTES
    assert first["baton_kv_capacity_blocks", "disk"] == NUM_RECORDS and first["baton_kv_blocks", "disk"] == 0
    assert first["baton_kv_hits_total", "memory"] == 4 and first["baton_kv_misses_total", "memory"] == 0
    assert first["baton_kv_committed_blocks_total",] == 6
    assert first["baton_kv_reuse_gap_seconds_count", "memory"] == 4
    assert first["baton_kv_reuse_gap_seconds_bucket", "+Inf", "memory"] == 4

    for number in range(4):  # used again after a while, then crowded out
        others = chain(1000 + 100 * number, 4)
        await near.publish(others, writer_of(others))
        await near.publish(HASHES, writer_of(HASHES))
    for number in range(8):
        others = chain(5000 + 100 * number, 16)
        await near.publish(others, writer_of(others))
    await eventually(lambda: all(block_hash in store._disk.index for block_hash in HASHES), what="they are on disk")
    await eventually(lambda: store._disk.index.num_writing == 0, what="nothing is on its way there")
    before = await scrape(record.metrics_address)
    assert len(take(await far.fetch(await far.match(HASHES[:3])))) == 3
    await eventually(lambda: store._disk.index.num_writing == 0, what="nothing is on its way there")
    now = await scrape(record.metrics_address)
    assert now["baton_kv_hits_total", "disk"] == 3 and now["baton_kv_promotions_total",] == 3
    assert now["baton_kv_misses_total", "memory"] == 3 and now["baton_kv_misses_total", "disk"] == 0
    assert now["baton_kv_demotions_total",] == store._tally.num_demoted >= 6
    assert now["baton_kv_blocks", "disk"] == len(store._disk.index)
    assert now["baton_kv_evictions_total", "memory"] == store._tally.tiers["memory"].num_evicted >= 6
    for gaps in (("baton_kv_evict_to_reuse_gap_seconds_count", "memory"), ("baton_kv_reuse_gap_seconds_count", "disk")):
        assert now[gaps] - before[gaps] == 3
    assert now.keys() >= first.keys() and len(now) == len(first), "no series came with the blocks"


async def test_what_was_refused(store: StoreServer) -> None:
    context = lingerless_context()
    socket = context.socket(zmq.DEALER)
    socket.connect(store.record().address)
    for _ in range(5):
        await socket.send(b"garbage")
    for _ in range(3):
        peer = await ControlPeer(store.config.dir).open()
        peer.send(b"garbage!")
        peer.close()
    address = store.record().metrics_address

    async def are_counted() -> bool:
        page = await scrape(address)
        return (page["baton_kv_refused_frames_total", "control"], page["baton_kv_refused_frames_total", "data"]) == (
            3,
            5,
        )

    await eventually(are_counted)
    context.destroy(linger=0)


async def test_the_directory_says_where(store: StoreServer, directory: Directory) -> None:
    (arena,) = await directory.arenas()
    assert arena.metrics_address == store.record().metrics_address
    assert arena.metrics_address.startswith("127.0.0.1:")


async def test_without(config: StoreConfig) -> None:
    store = StoreServer(replace(config, metrics=False))
    record = await store.start()
    assert record.metrics_address == ""
    await store.stop()


class Collector:
    def collect(self) -> list[GaugeMetricFamily]:
        return [GaugeMetricFamily("one", "One.", value=1.0)]


@pytest.fixture
async def door() -> AsyncIterator[tuple[ScrapeDoor, str]]:
    door = ScrapeDoor()
    yield door, await door.open(Collector(), "127.0.0.1", "127.0.0.1")
    await door.close()
    await door.close()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.0\r\n\r\n", b"HTTP/1.1 200 OK"),
        (b"GET /metrics?name=x HTTP/1.1\r\nAccept: */*\r\n\r\n", b"HTTP/1.1 200 OK"),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found"),
        (b"\x16\x03\x01\r\n\r\n", b"HTTP/1.1 404 Not Found"),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", b""),
    ],
)
async def test_requests(door: tuple[ScrapeDoor, str], request_: bytes, status: bytes) -> None:
    try:
        assert (await http(door[1], request_))[0] == status
    except ConnectionError:
        assert status == b"", "cut off"


async def test_who_says_nothing_keeps_nobody_out_and_holds_up_no_end(door: tuple[ScrapeDoor, str]) -> None:
    host, port = door[1].rsplit(":", 1)
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(10)]
    assert await scrape(door[1]) == {("one",): 1.0}
    await asyncio.wait_for(door[0].close(), 5)
    for reader, writer in silent:
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_an_address_that_is_not_ours_is_no_reason_not_to_start() -> None:
    door = ScrapeDoor()
    assert await door.open(Collector(), "203.0.113.1", "203.0.113.1") == ""
    await door.close()
