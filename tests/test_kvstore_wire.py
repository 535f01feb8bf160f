"""Faults of the wire and of those at its ends: each is a shorter run of right blocks, and the books balance."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from conftest import RedisProcess, eventually
from kvstore_support import SLOT_BYTES, announced, chain, content, start_store, store_config, take, writer_of
from wire_faults import Fault, Wire, block_address, flip, hang, hang_up, lose, nothing, through

from kvstore.blocks import BlockHash
from kvstore.client import KVClient, Match
from kvstore.curve import new_wire_key
from kvstore.directory import Directory
from kvstore.server import StoreServer

HASHES = chain(0, 6)
ANSWER_BYTES = len(HASHES) * SLOT_BYTES
HEAD_BYTES = 600  # greeting, handshake and the answer's head come in these


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url)
    yield directory
    await directory.close()


@pytest.fixture(params=["with_keys", "without_keys", "tcp"])
async def store(request: pytest.FixtureRequest, redis_url: str, short_dir: Path) -> AsyncIterator[StoreServer]:
    """Holds HASHES."""
    wire_key = new_wire_key() if request.param == "with_keys" else ""
    store = StoreServer(store_config(short_dir / "a", redis_url, wire_key=wire_key, tcp=request.param == "tcp"))
    await store.start()
    await publish(store, HASHES)
    yield store
    store.arena.check_integrity()
    assert not store.arena.writers()
    await store.stop()


@pytest.fixture
async def wire(store: StoreServer) -> AsyncIterator[Wire]:
    wire = Wire(block_address(store.record()))
    yield wire
    await wire.stop()


async def publish(store: StoreServer, hashes: Sequence[BlockHash]) -> None:
    writer = KVClient(store._directory, SLOT_BYTES, Path(store.config.dir))
    assert await writer.publish(hashes, writer_of(hashes)) == len(hashes)
    await writer.close()
    await announced(store)


async def fetch(store: StoreServer, directory: Directory, address: str) -> int:
    """How many of HASHES a new client gets from `address`; each of them is right."""
    client = KVClient(directory, SLOT_BYTES, None, timeout_s=0.4, wire_key=store.config.wire_key)
    try:
        match = await client.match(HASHES)
        assert match.num_blocks == len(HASHES)
        taken = take(await asyncio.wait_for(client.fetch(through(match, address)), 30))
    finally:
        await client.close()
    assert taken == [content(block_hash) for block_hash in HASHES[: len(taken)]]
    return len(taken)


async def test_flipped_bits(store: StoreServer, directory: Directory, wire: Wire) -> None:
    """Anywhere in the stream: in the handshake, in lengths, in heads and in blocks; of answers and of questions."""
    rng = random.Random(5)
    address = await wire.start()
    assert await fetch(store, directory, address) == len(HASHES)
    places = [rng.randrange(HEAD_BYTES) for _ in range(25)] + [rng.randrange(ANSWER_BYTES) for _ in range(25)]
    counts = []
    for at in places:
        wire.answers = flip(at, rng.randrange(8))
        counts.append(await fetch(store, directory, address))
    assert max(counts[25:]) < len(HASHES), "no flip in a block is ever let pass"
    wire.answers = nothing
    for _ in range(15):
        wire.questions = flip(rng.randrange(HEAD_BYTES // 2), rng.randrange(8))
        await fetch(store, directory, address)
    wire.questions = nothing
    assert await fetch(store, directory, address) == len(HASHES)


FAULTS: dict[str, Fault] = {
    "lost_in_the_handshake": lose(20, 7),
    "lost_in_a_block": lose(150_000, 1),
    "a_block_lost_whole": lose(200_000, SLOT_BYTES + 9),
    "hung_up_at_once": hang_up(0),
    "hung_up_in_the_handshake": hang_up(70),
    "hung_up_in_a_block": hang_up(250_000),
    "hung_before_the_handshake": hang(0),
    "hung_in_the_handshake": hang(70),
    "hung_in_a_block": hang(250_000),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_bytes_that_do_not_come(store: StoreServer, directory: Directory, wire: Wire, name: str) -> None:
    address = await wire.start()
    wire.answers = FAULTS[name]
    assert await fetch(store, directory, address) < len(HASHES)
    wire.answers, wire.questions = nothing, FAULTS[name]
    await fetch(store, directory, address)  # a question is short: the later ones of these faults do not reach it
    wire.questions = nothing
    assert await fetch(store, directory, address) == len(HASHES)


@pytest.mark.parametrize("at", [0, 70, 250_000])
async def test_a_wire_that_hangs_costs_no_more_than_the_caller_allows(
    store: StoreServer, directory: Directory, wire: Wire, at: int
) -> None:
    """The time-out of the client is longer than this test's; the limit is what computing would take."""
    client = KVClient(directory, SLOT_BYTES, None, timeout_s=200.0, wire_key=store.config.wire_key)
    match = through(await client.match(HASHES), await wire.start())
    wire.answers = hang(at)
    taken = take(await asyncio.wait_for(client.fetch(match, limit_s=0.3), 30))
    assert taken == [content(block_hash) for block_hash in HASHES[: len(taken)]], "what had come whole, counts"
    assert len(taken) <= at // SLOT_BYTES
    assert await asyncio.wait_for(client.fetch(match, limit_s=0.0), 30) == []
    assert taken or (await client.match(HASHES)).num_blocks == 0, "and is not paid again by the next request"
    await client.close()


async def test_a_slow_wire_is_not_a_broken_one(store: StoreServer, directory: Directory, wire: Wire) -> None:
    address = await wire.start()
    wire.passes.clear()
    asyncio.get_running_loop().call_later(0.2, wire.passes.set)
    assert await fetch(store, directory, address) == len(HASHES)


@pytest.mark.parametrize("tcp", [False, True])
async def test_slots_used_again_while_they_are_on_the_wire(redis_url: str, short_dir: Path, tcp: bool) -> None:
    """The store sends from the slots; what is overwritten meanwhile arrives torn, and the checksum tells."""
    num_blocks = 300  # more than the sockets between them hold
    store = StoreServer(store_config(short_dir / "a", redis_url, num_slots=num_blocks, tcp=tcp))
    await store.start()
    old, new = chain(0, num_blocks), chain(10_000, num_blocks)
    await publish(store, old)
    wire, directory = Wire(block_address(store.record())), Directory(redis_url)
    reader = KVClient(directory, SLOT_BYTES, None, timeout_s=30.0)
    match = through(await reader.match(old), await wire.start())

    def stop_behind_the_head(offset: int, data: bytes) -> bytes:
        if offset:
            wire.passes.clear()
        return data

    wire.answers = stop_behind_the_head
    fetching = asyncio.create_task(reader.fetch(match))
    await eventually(lambda: not wire.passes.is_set())
    await asyncio.sleep(0.2)
    await publish(store, new)
    wire.answers = nothing
    wire.passes.set()
    taken = take(await asyncio.wait_for(fetching, 60))
    assert len(taken) < num_blocks
    assert taken == [content(block_hash) for block_hash in old[: len(taken)]]
    await reader.close()
    await wire.stop()
    store.arena.check_integrity()
    await directory.close()
    await store.stop()


async def test_redis_gone_between_match_and_fetch(redis_process: RedisProcess, short_dir: Path) -> None:
    store = StoreServer(store_config(short_dir / "a", redis_process.url))
    await store.start()
    await publish(store, HASHES)
    directory = Directory(redis_process.url)
    reader = KVClient(directory, SLOT_BYTES, None)
    match: Match = await reader.match(HASHES)
    redis_process.kill()
    assert take(await reader.fetch(match)) == [content(block_hash) for block_hash in HASHES], "it is not asked again"
    assert (await reader.match(HASHES)).num_blocks == 0
    await reader.close()
    store.arena.check_integrity()
    await store.stop()
    await directory.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_store_lost_in_the_middle_of_a_write(redis_url: str, short_dir: Path, number: signal.Signals) -> None:
    """Nothing is committed, nothing is raised, what was read before stays right, and the next store is used."""
    config = store_config(short_dir / "a", redis_url)
    first = await start_store(config)
    directory = Directory(redis_url)
    client = KVClient(directory, SLOT_BYTES, Path(config.dir), timeout_s=0.5)
    assert await client.publish(HASHES, writer_of(HASHES)) == len(HASHES)
    payloads = await client.fetch(await client.match(HASHES))
    begun, may_end = threading.Event(), threading.Event()
    more = chain(100, 4)

    def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        begun.set()
        may_end.wait(20)
        return writer_of(more)(indices, views)

    publishing = asyncio.create_task(client.publish(more, write))
    await eventually(begun.is_set)
    first.send(number)
    may_end.set()
    assert await asyncio.wait_for(publishing, 30) == 0
    assert take(payloads) == [content(block_hash) for block_hash in HASHES]
    await first.kill()
    second = StoreServer(config)
    await second.start()

    async def is_published() -> bool:
        return await client.publish(more, writer_of(more)) == len(more)

    await eventually(is_published)
    second.arena.check_integrity()
    assert not second.arena.writers()
    await client.close()
    await directory.close()
    await second.stop()
