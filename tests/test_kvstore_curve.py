"""The data plane is closed to strangers: who has no wire key, or another one, neither reads, answers nor listens."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from kvstore_support import SLOT_BYTES, announced, chain, content, lingerless_context, store_config, take, writer_of
from zmq.utils import z85

from kvstore.channel import Channel
from kvstore.client import KVClient
from kvstore.copies import copy_and_sum
from kvstore.curve import Curve, is_loopback, new_wire_key, zap_answer
from kvstore.directory import Directory
from kvstore.errors import ArenaUnavailable
from kvstore.frames import MAX_FRAME_BYTES, Get
from kvstore.server import StoreConfig, StoreServer

KEY, OTHER_KEY = new_wire_key(), new_wire_key()
HASHES = chain(0, 6)


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url)
    yield directory
    await directory.close()


@pytest.fixture
async def store(redis_url: str, short_dir: Path) -> AsyncIterator[StoreServer]:
    """A store that is locked, and holds HASHES."""
    store = StoreServer(store_config(short_dir / "a", redis_url, wire_key=KEY))
    await store.start()
    writer = KVClient(store._directory, SLOT_BYTES, Path(store.config.dir))
    assert await writer.publish(HASHES, writer_of(HASHES)) == len(HASHES), "sockets inside a machine need no key"
    await writer.close()
    await announced(store)
    yield store
    store.arena.check_integrity()
    await store.stop()


async def num_read(directory: Directory, wire_key: str) -> int:
    """How many of HASHES a reader with that key gets, and soon: its time-out is longer than this test's."""
    client = KVClient(directory, SLOT_BYTES, None, timeout_s=100.0, wire_key=wire_key)
    try:
        taken = take(await asyncio.wait_for(client.fetch(await client.match(HASHES)), 30))
    finally:
        await client.close()
    assert taken == [content(block_hash) for block_hash in HASHES[: len(taken)]]
    return len(taken)


async def test_readers_of_the_cluster_read_and_strangers_do_not(store: StoreServer, directory: Directory) -> None:
    assert await num_read(directory, KEY) == len(HASHES)
    for wire_key in ("", OTHER_KEY):
        assert await num_read(directory, wire_key) == 0
    assert await num_read(directory, KEY) == len(HASHES), "whoever was refused is no harm to others"


async def test_a_store_without_the_key_is_no_store(redis_url: str, short_dir: Path, directory: Directory) -> None:
    """Neither an open one nor one of another cluster: a reader would take blocks from a stranger."""
    for index, wire_key in enumerate(("", OTHER_KEY)):
        stranger = StoreServer(store_config(short_dir / str(index), redis_url, wire_key=wire_key))
        await stranger.start()
        writer = KVClient(directory, SLOT_BYTES, Path(stranger.config.dir))
        await writer.publish(HASHES, writer_of(HASHES))
        await announced(stranger)
        assert await num_read(directory, KEY) == 0
        await writer.close()
        await stranger.stop()


async def test_the_stores_public_key_is_not_enough(store: StoreServer) -> None:
    """A peer that knows whom it speaks to, but is none of the readers, is sent away by the doorkeeper."""
    context = lingerless_context()
    socket = context.socket(zmq.DEALER)
    socket.curve_serverkey = Curve(KEY)._store[0]
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED)
    socket.connect(store.record().address)
    event = await asyncio.wait_for(monitor.recv_multipart(), 20)
    assert int.from_bytes(event[0][:2], "little") == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    socket.disable_monitor()
    context.destroy(linger=0)


async def test_nobody_at_the_door_means_nobody_in(store: StoreServer) -> None:
    """A store whose doorkeeper is gone refuses everybody, rather than nobody."""
    store._doorkeeper._socket.close(linger=0)
    context = lingerless_context()
    channel = Channel(context, store.record().address, SLOT_BYTES, Curve(KEY))
    with pytest.raises(ArenaUnavailable):
        await channel.request(lambda request_id: Get(request_id, HASHES), 3.0)
    channel.close()
    context.destroy(linger=0)


async def test_frames_of_the_greatest_size_pass_encrypted(redis_url: str, short_dir: Path) -> None:
    """Encryption makes them longer than they are allowed to be in the clear."""
    slot_bytes = 2 * MAX_FRAME_BYTES
    config = store_config(short_dir / "big", redis_url, wire_key=KEY)
    store = StoreServer(replace(config, slot_bytes=slot_bytes, memory_bytes=8 * slot_bytes))
    await store.start()
    directory = Directory(redis_url)
    writer = KVClient(directory, slot_bytes, Path(config.dir))
    reader = KVClient(directory, slot_bytes, None, wire_key=KEY)
    data = [bytes([index]) * slot_bytes for index in range(3)]

    def write(indices: list[int], views: list[memoryview]) -> list[int]:
        return [copy_and_sum(view, memoryview(data[index])) for index, view in zip(indices, views, strict=True)]

    assert await writer.publish(HASHES[:3], write) == 3
    await announced(store)
    assert take(await reader.fetch(await reader.match(HASHES[:3]))) == data
    context = lingerless_context()
    channel = Channel(context, store.record().address, slot_bytes, Curve(KEY))
    answer = await channel.request(lambda request_id: Get(request_id, chain(9, 4096)), 10.0)
    assert answer.message.blocks == []
    channel.close()
    context.destroy(linger=0)
    for client in (writer, reader):
        await client.close()
    await directory.close()
    await store.stop()


async def test_peers_that_say_nothing_are_dropped(
    store: StoreServer, directory: Directory, monkeypatch: pytest.MonkeyPatch, redis_url: str, short_dir: Path
) -> None:
    monkeypatch.setattr("kvstore.server._HANDSHAKE_MS", 200)
    hasty = StoreServer(store_config(short_dir / "hasty", redis_url, wire_key=KEY))
    record = await hasty.start()
    host, port = record.address.removeprefix("tcp://").split(":")
    peers = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
    for reader, _ in peers:
        await asyncio.wait_for(_end_of(reader), 20)
    for _, stream in peers:
        stream.close()
    await hasty.stop()


async def _end_of(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(1000):
            pass
    except ConnectionError:
        pass


async def test_sockets_inside_a_machine_lie_in_a_folder_of_its_own(store: StoreServer) -> None:
    folder = Path(store.config.dir)
    for path in (folder, folder / "writers"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in [*folder.glob("arena-*.mem"), folder / "store.lock"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_in_an_open_folder_they_are_closed_too(redis_url: str, short_dir: Path) -> None:
    folder = short_dir / "open"
    folder.mkdir(mode=0o755)
    store = StoreServer(store_config(folder, redis_url))
    await store.start()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.suffix != ".json"}
    assert modes.pop("writers") == 0o700 and len(modes) == 3
    assert set(modes.values()) == {0o600}
    await store.stop()


def test_config_does_not_show_its_key(redis_url: str, short_dir: Path) -> None:
    config: StoreConfig = store_config(short_dir / "a", redis_url, wire_key=KEY)
    assert KEY not in repr(config)


def test_zap_answers() -> None:
    curve = Curve(KEY)
    good = [b"1.0", b"7", b"baton", b"10.0.0.1", b"", b"CURVE", z85.decode(curve._reader[0])]
    assert zap_answer(good, curve)[:3] == [b"1.0", b"7", b"200"]
    wrong = [
        [b"2.0", *good[1:]],
        [*good[:2], b"", *good[3:]],
        [*good[:5], b"NULL"],
        [*good[:5], b"PLAIN", b"a", b"b"],
        [*good[:6], bytes(32)],
        [*good[:6], b""],
        good[:2],
    ]
    for question in wrong:
        assert zap_answer(question, curve)[1:3] == [b"7", b"400"]
    assert zap_answer([], curve)[2] == b"400"


@pytest.mark.parametrize("text", ["", "secret", "00" * 31, "00" * 33, "zz" * 32])
def test_what_is_no_key_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ValueError, match="wire_key: must be 64 hex digits") as error:
        Curve(text)
    assert not text or text not in str(error.value)


def test_keys_follow_from_the_wire_key_alone() -> None:
    assert Curve(KEY)._store == Curve(KEY.upper())._store != Curve(KEY)._reader
    assert Curve(KEY)._store != Curve(OTHER_KEY)._store


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("*", False),
        ("eth0", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_is_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer
