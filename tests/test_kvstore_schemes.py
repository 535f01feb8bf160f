"""Who names blocks otherwise cannot hit ours: another layout has another root, another scheme is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import redis
from kvstore_support import SLOT_BYTES, announced, chain, content, store_config, take, writer_of

from kvstore.blocks import PROBE, KVLayout, hash_blocks
from kvstore.client import KVClient
from kvstore.directory import ArenaRecord, Directory, NodeRecord
from kvstore.errors import OtherScheme
from kvstore.server import StoreServer

OTHER_PROBE = "00" * 16
TTL_S = 30.0
HASHES = chain(0, 4)
LAYOUT = KVLayout("a", "float32", block_size=16, num_layers=2, num_kv_heads=2, head_dim=16)
NODE = NodeRecord(
    node_id="p0",
    incarnation="one",
    role="prefill",
    address="127.0.0.1:1",
    model="pocket",
    kv_root="00" * 16,
    block_size=16,
    block_bytes=4096,
    vocab_size=258,
    max_model_len=1024,
)
ARENA = ArenaRecord(arena_id="1" * 32, address="tcp://127.0.0.1:1", host="x", slot_bytes=4096, num_slots=9)


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url)
    yield directory
    await directory.close()


@pytest.fixture
async def stranger(redis_url: str) -> AsyncIterator[Directory]:
    """Of a process with another hash scheme."""
    directory = Directory(redis_url, probe=OTHER_PROBE)
    yield directory
    await directory.close()


@pytest.mark.parametrize("is_local", [True, False])
async def test_another_layout_finds_nothing(
    redis_url: str, short_dir: Path, directory: Directory, is_local: bool
) -> None:
    """Even where its blocks have as many bytes: another model, dtype, block size, shape, shard or adapter."""
    store = StoreServer(store_config(short_dir / "a", redis_url))
    await store.start()
    tokens = list(range(64))
    hashes = hash_blocks(LAYOUT.root(), tokens, 16)
    writer = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    assert await writer.publish(hashes, writer_of(hashes)) == 4
    await announced(store)
    reader = writer if is_local else KVClient(directory, SLOT_BYTES, None)
    assert take(await reader.fetch(await reader.match(hashes))) == [content(block_hash) for block_hash in hashes]
    changes = [{"model": "b"}, {"dtype": "bfloat16"}, {"block_size": 8}, {"num_layers": 4}, {"num_kv_heads": 1}]
    for change in [*changes, {"head_dim": 32}, {"num_pieces": 2}, {"adapter": "l"}]:
        other = replace(LAYOUT, **change)
        assert (await reader.match(hash_blocks(other.root(), tokens, other.block_size))).num_blocks == 0
    for client in {writer, reader}:
        await client.close()
    await store.stop()


async def test_records_of_another_scheme_are_not_read(
    directory: Directory, stranger: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    await stranger.heartbeat_node(NODE, TTL_S)
    await stranger.heartbeat_arena(ARENA, TTL_S)
    await stranger.announce_all(ARENA.arena_id, [(block_hash, 1) for block_hash in HASHES], TTL_S)
    assert await stranger.locate(HASHES) == {ARENA.arena_id: [1] * 4}, "among themselves they work"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await directory.nodes() == [] and await directory.arenas() == []
            assert await directory.locate(HASHES) == {} and (await directory.cover(HASHES)).places == ()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and all(OTHER_PROBE in line and PROBE in line for line in told), "once for each"


@pytest.mark.parametrize("kind", ["node", "arena"])
async def test_who_joins_is_told(directory: Directory, stranger: Directory, kind: str) -> None:
    await directory.check_scheme()
    await (directory.heartbeat_node(NODE, TTL_S) if kind == "node" else directory.heartbeat_arena(ARENA, TTL_S))
    await directory.check_scheme()
    with pytest.raises(OtherScheme, match=f"{kind}s that name blocks in another way"):
        await stranger.check_scheme()
    await (directory.remove_node("p0") if kind == "node" else directory.remove_arena(ARENA.arena_id))
    await stranger.check_scheme()


async def test_a_record_without_a_probe_is_of_another_scheme(directory: Directory, redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    client.set("baton:default:node:p0", json.dumps(asdict(NODE)))
    client.sadd("baton:default:nodes", "p0")
    assert await directory.nodes() == []
    with pytest.raises(OtherScheme):
        await directory.check_scheme()
    client.set("baton:default:node:p0", "{}")  # what is no record keeps nobody from joining
    await directory.check_scheme()
    client.close()


async def test_a_store_of_another_scheme_does_not_start(
    redis_url: str, short_dir: Path, directory: Directory, stranger: Directory
) -> None:
    await stranger.heartbeat_node(NODE, TTL_S)
    with pytest.raises(OtherScheme):
        await StoreServer(store_config(short_dir / "a", redis_url)).start()
    assert list(short_dir.iterdir()) == [] and await directory.arenas() == []
    await stranger.remove_node("p0")
    store = StoreServer(store_config(short_dir / "a", redis_url))
    await store.start()
    await store.stop()
