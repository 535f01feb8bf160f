"""The client: what is published comes back byte for byte, here and over the wire, and every failure is a miss."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import resource
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
import zmq
import zmq.asyncio
from conftest import RedisProcess, eventually
from kvstore_support import (
    SLOT_BYTES,
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

from kvstore.arena_map import MappedPayload
from kvstore.blocks import BlockHash
from kvstore.channel import Channel
from kvstore.client import KVClient, Match
from kvstore.directory import ArenaRecord, Directory
from kvstore.errors import ArenaUnavailable
from kvstore.frames import BlockInfo, Get, Got, decode
from kvstore.server import StoreConfig, StoreServer
from kvstore.wire import ReceivedPayload


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url)
    yield directory
    await directory.close()


@pytest.fixture
async def config(redis_url: str, short_dir: Path) -> StoreConfig:
    return store_config(short_dir / "a", redis_url)


@pytest.fixture
async def store(config: StoreConfig) -> AsyncIterator[StoreServer]:
    store = StoreServer(config)
    await store.start()
    yield store
    store.arena.check_integrity()
    await store.stop()


@pytest.fixture
async def other_store(redis_url: str, short_dir: Path) -> AsyncIterator[StoreServer]:
    """The store of another machine: a mapping of its own that the first one's clients do not have."""
    store = StoreServer(store_config(short_dir / "b", redis_url))
    await store.start()
    yield store
    store.arena.check_integrity()
    await store.stop()


MakeClient = Callable[..., KVClient]


@pytest.fixture
async def make_client(directory: Directory) -> AsyncIterator[MakeClient]:
    clients = []

    def make(folder: str | Path | None, timeout_s: float = 2.0, directory: Directory = directory) -> KVClient:
        client = KVClient(directory, SLOT_BYTES, None if folder is None else Path(folder), timeout_s)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await asyncio.wait_for(client.close(), 20)


async def read(client: KVClient, hashes: Sequence[BlockHash]) -> int:
    """How many of `hashes` the client gets; each of them is right."""
    taken = take(await client.fetch(await client.match(hashes)))
    assert taken == [content(block_hash) for block_hash in hashes[: len(taken)]]
    return len(taken)


async def test_same_machine_through_the_mapping(store: StoreServer, make_client: MakeClient) -> None:
    writer, reader = make_client(store.config.dir), make_client(store.config.dir)
    await writer.open()
    assert writer.local_arena_id == store.record().arena_id
    hashes = chain(0, 6)
    assert await writer.publish(hashes[:4], writer_of(hashes)) == 4
    assert await writer.publish(hashes[:4], writer_of(hashes)) == 0, "what is there is not written again"
    assert await writer.publish(hashes, writer_of(hashes)) == 2
    match = await reader.match([*hashes, *chain(9, 2)])
    assert match.num_blocks == 6 and match.hashes == tuple(hashes)
    payloads = await reader.fetch(match)
    assert all(isinstance(payload, MappedPayload) for payload in payloads)
    assert take(payloads) == [content(block_hash) for block_hash in hashes]


async def test_another_machine_over_the_wire(
    store: StoreServer, other_store: StoreServer, make_client: MakeClient
) -> None:
    writer = make_client(store.config.dir)
    hashes = chain(0, 12)
    assert await writer.publish(hashes, writer_of(hashes)) == 12
    await announced(store)
    for reader in (make_client(None), make_client(other_store.config.dir)):
        payloads = await reader.fetch(await reader.match(hashes))
        assert all(isinstance(payload, ReceivedPayload) for payload in payloads)
        assert take(payloads) == [content(block_hash) for block_hash in hashes]
    assert make_client(None).local_arena_id == ""
    assert await make_client(None).publish(hashes, writer_of(hashes)) == 0


async def test_a_mapped_arena_is_asked_without_the_directory(
    store: StoreServer, directory: Directory, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = make_client(store.config.dir), make_client(store.config.dir)
    hashes = chain(0, 6)
    assert reader.match_local(hashes).num_blocks == 0
    await writer.publish(hashes[:4], writer_of(hashes))
    monkeypatch.setattr(directory, "cover", None)
    assert (await reader.match(hashes[:4])).num_blocks == 4
    assert take(await reader.fetch(reader.match_local(hashes))) == [content(block_hash) for block_hash in hashes[:4]]
    assert make_client(None).match_local(hashes).num_blocks == 0


async def test_arena_given_up_between_match_and_fetch_is_a_miss(store: StoreServer, make_client: MakeClient) -> None:
    client = make_client(store.config.dir)
    hashes = chain(0, 4)
    await client.publish(hashes, writer_of(hashes))
    match = await client.match(hashes)
    await store.stop()
    assert await client.fetch(match) == []
    await store.start()


async def test_many_requests_make_one_run(
    store: StoreServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.zmq_wire._TRANSFER_BYTES", 3 * SLOT_BYTES)
    hashes = chain(0, 11)
    await make_client(store.config.dir).publish(hashes, writer_of(hashes))
    assert await read(make_client(None), hashes) == 11


async def test_run_over_several_arenas(store: StoreServer, other_store: StoreServer, make_client: MakeClient) -> None:
    hashes = chain(0, 10)
    here, there = make_client(store.config.dir), make_client(other_store.config.dir)
    await here.publish(hashes[:4], writer_of(hashes[:4]))
    await there.publish(hashes[4:], writer_of(hashes[4:]))
    await announced(store, other_store)
    for reader in (here, there, make_client(None)):
        assert await read(reader, hashes) == 10
    payloads = await here.fetch(await here.match(hashes))
    assert [isinstance(payload, MappedPayload) for payload in payloads] == [True] * 4 + [False] * 6


async def test_an_empty_newcomer_draws_no_writes(
    store: StoreServer, other_store: StoreServer, make_client: MakeClient
) -> None:
    """Each writes to its own machine alone, however full that is and however empty another one."""
    writers = {"a": (store, make_client(store.config.dir)), "b": (other_store, make_client(other_store.config.dir))}
    num_slots = store.record().num_slots
    for first in range(0, 4000, 1000):
        assert await writers["a"][1].publish(chain(first, 8), writer_of(chain(first, 8))) == 8
    await announced(store)
    assert store.arena.num_free == 0 and other_store.arena.num_free == num_slots
    assert await read(writers["b"][1], chain(3000, 8)) == 8, "what it reads of others it does not keep by itself"
    assert other_store.arena.num_free == num_slots
    before = store.arena.blocks()
    assert await writers["b"][1].publish(chain(5000, 3), writer_of(chain(5000, 3))) == 3
    assert len(other_store.arena.blocks()) == 3 and store.arena.blocks() == before


async def test_empty_and_unknown(store: StoreServer, make_client: MakeClient) -> None:
    client = make_client(store.config.dir)
    assert (await client.match([])).num_blocks == 0
    assert (await client.match(chain(0, 3))).num_blocks == 0
    assert await client.fetch(Match()) == []
    assert await client.publish([], writer_of([])) == 0


@pytest.mark.parametrize("is_local", [True, False])
async def test_stale_directory_is_a_miss(
    store: StoreServer, make_client: MakeClient, directory: Directory, is_local: bool
) -> None:
    hashes = chain(0, 4)
    writer = make_client(store.config.dir)
    await writer.publish([hashes[0], hashes[2]], writer_of([hashes[0], hashes[2]]))
    await announced(store)
    arena_id = store.record().arena_id
    await directory.announce(arena_id, [(hashes[1], 3), (hashes[3], 10**9)])  # never held; and a slot that is none
    reader = make_client(store.config.dir if is_local else None)
    assert (await reader.match(hashes)).num_blocks == 4
    assert await read(reader, hashes) == 1
    assert await read(reader, hashes[3:]) == 0


@pytest.mark.parametrize("is_local", [True, False])
async def test_eviction_between_match_and_fetch_is_a_miss(
    store: StoreServer, make_client: MakeClient, is_local: bool
) -> None:
    client = make_client(store.config.dir)
    num_slots = store.record().num_slots
    old, new = chain(0, num_slots), chain(1000, num_slots)
    await client.publish(old, writer_of(old))
    await announced(store)
    reader = make_client(store.config.dir if is_local else None)
    match = await reader.match(old)
    assert match.num_blocks == num_slots
    assert await client.publish(new, writer_of(new)) == num_slots
    assert await reader.fetch(match) == []


async def test_eviction_after_fetch_is_seen_by_is_valid(store: StoreServer, make_client: MakeClient) -> None:
    client = make_client(store.config.dir)
    num_slots = store.record().num_slots
    old, new = chain(0, num_slots), chain(1000, num_slots)
    await client.publish(old, writer_of(old))
    payloads = await client.fetch(await client.match(old))
    assert len(payloads) == num_slots
    await client.publish(new, writer_of(new))
    assert take(payloads) == []


async def test_corrupted_slot_is_a_miss_over_the_wire(store: StoreServer, make_client: MakeClient) -> None:
    hashes = chain(0, 5)
    await make_client(store.config.dir).publish(hashes, writer_of(hashes))
    await announced(store)
    slot = store.arena.find(hashes[3])
    assert slot is not None
    store._service._map.view(slot)[SLOT_BYTES // 2] ^= 1
    assert await read(make_client(None), hashes) == 3


async def test_store_restarts_during_a_copy_and_somebody_else_sees_it_first(
    config: StoreConfig, make_client: MakeClient
) -> None:
    """A heartbeat maps the new arena while the old one is being written: the old one is given up twice."""
    first = StoreServer(config)
    await first.start()
    client, hashes = make_client(config.dir), chain(0, 2)
    copying, may_end = threading.Event(), threading.Event()

    def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        copying.set()
        may_end.wait(20)
        return [0] * len(views)

    publishing = asyncio.create_task(client.publish(hashes, write))
    await eventually(copying.is_set)
    await first.stop()
    second = StoreServer(config)
    await second.start()
    assert client.local_arena_id == second.record().arena_id
    may_end.set()
    assert await publishing == 0
    await second.stop()


async def test_no_descriptor_is_left(store: StoreServer, make_client: MakeClient) -> None:
    """No arena then, or none to publish into, and no error; and no lock stays behind from the attempt."""
    hashes = chain(0, 1)
    for num_left in range(3):  # of memory, lock and connection
        client = make_client(store.config.dir)
        with descriptors_left(num_left):
            assert await client.publish(hashes, writer_of(hashes)) == 0
        assert list(Path(store.config.dir, "writers").iterdir()) == []
    client = make_client(store.config.dir)
    assert await client.publish(hashes, writer_of(hashes)) == 1


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process can open so many more, and not one beyond that."""
    gc.collect()
    free, taken = os.dup(0), []
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 64, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for descriptor in taken[len(taken) - count :]:
            os.close(descriptor)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken[: len(taken) - count]:
            os.close(descriptor)


# --- stores that do not do what a store does ---------------------------------------------------------------------

Answer = Callable[[Get], list[bytes] | None]


def good(question: Get) -> list[bytes]:
    infos = [BlockInfo(h, SLOT_BYTES, xxhash.xxh3_64_intdigest(content(h))) for h in question.hashes]
    return [Got(question.request_id, infos).encode(), *(content(h) for h in question.hashes)]


def with_infos(question: Get, infos: Sequence[BlockInfo]) -> list[bytes]:
    return [Got(question.request_id, infos).encode(), *good(question)[1:]]


def info(question: Get, index: int) -> BlockInfo:
    return BlockInfo(question.hashes[index], SLOT_BYTES, xxhash.xxh3_64_intdigest(content(question.hashes[index])))


BAD_ANSWERS: dict[str, tuple[Answer, int]] = {
    "silence": (lambda q: None, 0),
    "garbage": (lambda q: [b"\xff" * 40], 0),
    "empty": (lambda q: [b""], 0),
    "cut_header": (lambda q: [good(q)[0][:-1], *good(q)[1:]], 0),
    "question_back": (lambda q: [q.encode()], 0),
    "other_request": (lambda q: [good(replace(q, request_id=q.request_id + 999))[0], *good(q)[1:]], 0),
    "other_key": (lambda q: with_infos(q, [info(q, 1), info(q, 0), info(q, 2)]), 0),
    "too_few_infos": (lambda q: with_infos(q, [info(q, 0)]), 0),
    "too_few_payloads": (lambda q: good(q)[:-1], 0),
    "too_many_payloads": (lambda q: [*good(q), b"x"], 0),
    "swapped_payloads": (lambda q: [good(q)[0], *reversed(good(q)[1:])], 0),
    "cut_payload": (lambda q: [*good(q)[:2], good(q)[2][:-1], good(q)[3]], 1),
    "flipped_bit": (lambda q: [*good(q)[:3], b"\x01" + good(q)[3][1:]], 2),
    "huge_payload": (lambda q: [*good(q)[:3], bytes(SLOT_BYTES * 4)], 0),  # cut off by the socket's limit
    "other_length": (lambda q: with_infos(q, [info(q, 0), replace(info(q, 1), length=7), info(q, 2)]), 1),
    "true_answer": (good, 3),
}


class FakeStore:
    """A store that is in the directory and answers as it likes."""

    def __init__(self, answer: Answer) -> None:
        self.context = lingerless_context()
        self.socket = self.context.socket(zmq.ROUTER)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.record = ArenaRecord(
            arena_id="f" * 32, address=f"tcp://127.0.0.1:{port}", host="x", slot_bytes=SLOT_BYTES, num_slots=9
        )
        self.answer = answer
        self.task = asyncio.create_task(self.serve())

    async def serve(self) -> None:
        while True:
            sender, frame = await self.socket.recv_multipart()
            question = decode(frame)
            assert isinstance(question, Get)
            frames = self.answer(question)
            if frames is not None:
                await self.socket.send_multipart([sender, *frames])

    async def announce(self, directory: Directory, hashes: Sequence[BlockHash]) -> None:
        await directory.heartbeat_arena(self.record, 60)
        await directory.announce_all(self.record.arena_id, [(h, i) for i, h in enumerate(hashes)], 60)

    def close(self) -> None:
        self.task.cancel()
        self.context.destroy(linger=0)


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_bad_answer_is_a_miss(directory: Directory, make_client: MakeClient, name: str) -> None:
    answer, num_good = BAD_ANSWERS[name]
    fake = FakeStore(answer)
    hashes = chain(0, 3)
    await fake.announce(directory, hashes)
    client = make_client(None, timeout_s=0.3)
    try:
        assert await read(client, hashes) == num_good
    finally:
        fake.close()


async def test_store_that_failed_is_left_alone_for_a_while(directory: Directory, make_client: MakeClient) -> None:
    fake = FakeStore(lambda question: None)
    hashes = chain(0, 3)
    await fake.announce(directory, hashes)
    client = make_client(None, timeout_s=0.2)
    assert await read(client, hashes) == 0
    assert (await client.match(hashes)).num_blocks == 0
    assert (await make_client(None).match(hashes)).num_blocks == 3
    fake.close()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "tcp://", "ftp://127.0.0.1:1"])
async def test_address_of_nobody(directory: Directory, make_client: MakeClient, address: str) -> None:
    fake = FakeStore(good)
    fake.record = replace(fake.record, address=address)
    hashes = chain(0, 3)
    await fake.announce(directory, hashes)
    assert await read(make_client(None, timeout_s=60.0), hashes) == 0, "and long before the time-out"
    fake.close()


async def test_late_and_reordered_answers_find_their_question_or_nobody() -> None:
    kept: list[Get] = []
    fake = FakeStore(lambda question: kept.append(question))
    context = lingerless_context()
    channel = Channel(context, fake.record.address, SLOT_BYTES)
    with pytest.raises(ArenaUnavailable):
        await channel.request(lambda request_id: Get(request_id, chain(0, 1)), 0.2)
    tasks = [
        asyncio.create_task(channel.request(lambda request_id, n=n: Get(request_id, chain(n, 1)), 10.0))
        for n in range(5)
    ]
    await eventually(lambda: len(kept) == 6)
    sender = asyncio.get_running_loop().create_future()
    fake.answer = lambda question: sender.set_result(question) or None
    probe = asyncio.create_task(channel.request(lambda request_id: Get(request_id, []), 10.0))
    await sender
    # The late answer first, then all others backwards, then once more.
    fake.answer = good
    fake.task.cancel()
    await asyncio.sleep(0)
    probe.cancel()
    identity = await _identity_of(fake, channel)
    for question in [*kept[::-1], *kept]:
        await fake.socket.send_multipart([identity, *good(question)])
    for n, task in enumerate(tasks):
        answer = await task
        assert bytes(answer.payloads[0]) == content(chain(n, 1)[0])
    channel.close()
    with pytest.raises(ArenaUnavailable):
        await channel.request(lambda request_id: Get(request_id, []), 10.0)
    context.destroy(linger=0)
    fake.close()


async def _identity_of(fake: FakeStore, channel: Channel) -> bytes:
    task = asyncio.create_task(channel.request(lambda request_id: Get(request_id, []), 10.0))
    sender, _ = await fake.socket.recv_multipart()
    task.cancel()
    return bytes(sender)


# --- things that die -----------------------------------------------------------------------------------------------


async def test_redis_killed_and_restarted_empty(
    redis_process: RedisProcess, short_dir: Path, make_client: MakeClient
) -> None:
    directory = Directory(redis_process.url)
    store = StoreServer(store_config(short_dir / "r", redis_process.url))
    await store.start()
    client = make_client(short_dir / "r", directory=directory)
    hashes = chain(0, 4)
    assert await client.publish(hashes, writer_of(hashes)) == 4
    redis_process.kill()
    assert (await make_client(None, directory=directory).match(hashes)).num_blocks == 0
    assert await read(client, hashes) == 4, "what is mapped is found without Redis"
    more = chain(100, 4)
    assert await client.publish(more, writer_of(more)) == 4, "the store goes on without Redis"
    redis_process.start()
    remote = make_client(None, directory=directory)
    for block_hashes in (hashes, more):
        await eventually(lambda h=block_hashes: _reads(remote, h))
    await store.stop()
    await directory.close()


async def _reads(client: KVClient, hashes: Sequence[BlockHash]) -> bool:
    return await read(client, hashes) == len(hashes)


async def test_store_killed_and_restarted(config: StoreConfig, make_client: MakeClient) -> None:
    first = await start_store(config)
    client, remote = make_client(config.dir, timeout_s=1.0), make_client(None, timeout_s=1.0)
    hashes = chain(0, 4)
    assert await client.publish(hashes, writer_of(hashes)) == 4
    await eventually(lambda: _reads(remote, hashes))
    match = await remote.match(hashes)
    assert match.num_blocks == 4 and await read(remote, hashes) == 4
    await first.kill()
    assert await read(client, hashes) == 4, "what is mapped outlives the store process"
    assert await remote.fetch(match) == []
    more = chain(100, 4)
    assert await client.publish(more, writer_of(more)) == 0
    second = await start_store(config)
    try:
        await eventually(lambda: _publishes(client, more))
        assert client.local_arena_id == second.line
        assert await read(client, more) == 4
        await eventually(lambda: _reads(remote, more))
        assert (await client.match(hashes)).num_blocks == 0, "what the old arena held is gone, and known to be"
    finally:
        await second.kill()


async def _matches(client: KVClient, hashes: Sequence[BlockHash]) -> bool:
    return (await client.match(hashes)).num_blocks == len(hashes)


async def _publishes(client: KVClient, hashes: Sequence[BlockHash]) -> bool:
    return await client.publish(hashes, writer_of(hashes)) == len(hashes)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_store_lost_in_the_middle_of_a_read(
    config: StoreConfig, make_client: MakeClient, number: signal.Signals
) -> None:
    store = await start_store(replace(config, memory_bytes=400 * (SLOT_BYTES + 128)))
    try:
        hashes = chain(0, 300)
        assert await make_client(config.dir).publish(hashes, writer_of(hashes)) == 300
        remote = make_client(None, timeout_s=1.0)
        await eventually(lambda: _matches(remote, hashes))
        match = await remote.match(hashes)
        fetching = asyncio.create_task(remote.fetch(match))
        await asyncio.sleep(0.002)
        store.send(number)
        taken = take(await asyncio.wait_for(fetching, 30))
        assert taken == [content(block_hash) for block_hash in hashes[: len(taken)]]
    finally:
        await store.kill()


async def test_store_that_hangs_costs_a_bounded_time_and_nothing_leaks(
    config: StoreConfig, make_client: MakeClient
) -> None:
    store = await start_store(config)
    try:
        client = make_client(config.dir, timeout_s=0.3)
        hashes, more = chain(0, 4), chain(100, 16)
        assert await client.publish(hashes, writer_of(hashes)) == 4
        store.send(signal.SIGSTOP)
        assert await client.publish(more, writer_of(more)) == 0
        assert await read(client, hashes) == 4, "reading asks nobody"
        store.send(signal.SIGCONT)  # it will now reserve slots for a writer that does not wait any more
        await eventually(lambda: _publishes_rest(client, more))
    finally:
        await store.kill()


async def _publishes_rest(client: KVClient, hashes: Sequence[BlockHash]) -> bool:
    await client.publish(hashes, writer_of(hashes))
    return await read(client, hashes) == len(hashes)


async def test_publishing_to_a_dead_store_fails_long_before_the_time_out(
    config: StoreConfig, make_client: MakeClient
) -> None:
    store = await start_store(config)
    used, unused = make_client(config.dir, timeout_s=60.0), make_client(config.dir, timeout_s=60.0)
    hashes = chain(0, 2)
    assert await used.publish(hashes, writer_of(hashes)) == 2
    await store.kill()
    for client in (used, used, unused):
        assert await client.publish(chain(9, 2), writer_of(chain(9, 2))) == 0


async def test_store_comes_later_and_goes(config: StoreConfig, make_client: MakeClient) -> None:
    client = make_client(config.dir)
    await client.open()
    hashes = chain(0, 2)
    assert client.local_arena_id == "" and await client.publish(hashes, writer_of(hashes)) == 0
    store = StoreServer(config)
    record = await store.start()
    assert client.local_arena_id == record.arena_id
    assert await client.publish(hashes, writer_of(hashes)) == 2
    await store.stop()
    assert client.local_arena_id == "" and await client.publish(hashes, writer_of(hashes)) == 0
    assert await read(client, hashes) == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"arena_id": "../../etc", "num_slots": 1}'])
async def test_description_that_is_none(store: StoreServer, make_client: MakeClient, text: str) -> None:
    path = Path(store.config.dir) / "arena.json"
    path.write_text(text)
    client = make_client(store.config.dir)
    assert client.local_arena_id == "" and await client.publish(chain(0, 1), writer_of(chain(0, 1))) == 0


async def test_description_of_an_arena_that_is_larger_than_its_file(
    store: StoreServer, make_client: MakeClient
) -> None:
    path = Path(store.config.dir) / "arena.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_slots": 10**6}))
    assert make_client(store.config.dir).local_arena_id == ""


async def test_slots_of_another_size_are_not_used(store: StoreServer, directory: Directory) -> None:
    client = KVClient(directory, SLOT_BYTES + 1, Path(store.config.dir))
    assert client.local_arena_id == "" and await client.publish(chain(0, 1), writer_of(chain(0, 1))) == 0
    assert not list((Path(store.config.dir) / "writers").iterdir())
    await client.close()


# --- writing -------------------------------------------------------------------------------------------------------


async def test_cancelled_publish_ends_after_its_copy_and_leaves_nothing_half_written(
    store: StoreServer, make_client: MakeClient
) -> None:
    client = make_client(store.config.dir)
    hashes = chain(0, 4)
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        begun.set()
        go_on.wait(20)
        sums = writer_of(hashes)(indices, views)
        ended.set()
        return sums

    task = asyncio.create_task(client.publish(hashes, write))
    await eventually(begun.is_set)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.05)
    assert not task.done(), "what it reads from must not be freed while it reads"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set() and not store.arena.writers()
    assert await read(client, hashes) in (0, 4)


async def test_write_that_fails_is_raised_and_its_slots_come_back(store: StoreServer, make_client: MakeClient) -> None:
    client = make_client(store.config.dir)

    def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        raise ZeroDivisionError("the engine is gone")

    with pytest.raises(ZeroDivisionError):
        await client.publish(chain(0, 4), write)
    await eventually(lambda: store.arena.num_free == store.record().num_slots)
    assert await client.publish(chain(0, 4), writer_of(chain(0, 4))) == 4


async def test_write_gets_indices_of_what_is_missing(store: StoreServer, make_client: MakeClient) -> None:
    client = make_client(store.config.dir)
    hashes = chain(0, 6)
    await client.publish(hashes[2:4], writer_of(hashes[2:4]))
    seen: list[int] = []

    def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        assert threading.current_thread() is not threading.main_thread()
        assert all(len(view) == SLOT_BYTES and not view.readonly for view in views)
        seen.extend(indices)
        return writer_of(hashes)(indices, views)

    assert await client.publish(hashes, write) == 4
    assert seen == [0, 1, 4, 5]


async def test_two_threads_write_many_blocks(
    store: StoreServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.copier._PART_BYTES", 2 * SLOT_BYTES)
    client, hashes = make_client(store.config.dir), chain(0, 9)
    both, seen = threading.Barrier(2), list[int]()

    def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        if indices[0] < 4:
            both.wait(20)
        seen.extend(indices)
        return writer_of(hashes)(indices, views)

    assert await client.publish(hashes, write) == 9
    assert sorted(seen) == list(range(9))
    assert await read(client, hashes) == 9

    def fail(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        if indices[0] < 4:
            both.wait(20)
        if indices[0] == 2:
            raise ZeroDivisionError("the engine is gone")
        return [0] * len(views)

    with pytest.raises(ZeroDivisionError):
        await client.publish(chain(100, 7), fail)
    await eventually(lambda: not store.arena.writers(), what="what was reserved comes back")
    assert await read(client, chain(100, 7)) == 0
    assert await client.publish(chain(100, 7), writer_of(chain(100, 7))) == 7


async def test_more_blocks_than_slots(store: StoreServer, make_client: MakeClient) -> None:
    client = make_client(store.config.dir)
    num_slots = store.record().num_slots
    hashes = chain(0, num_slots + 5)
    assert await client.publish(hashes, writer_of(hashes)) == num_slots
    assert await read(client, hashes) == num_slots, "the head of the chain was kept"


async def test_full_store_is_no_error(store: StoreServer, make_client: MakeClient) -> None:
    slow, quick = make_client(store.config.dir), make_client(store.config.dir)
    go_on = threading.Event()
    hashes = chain(0, store.record().num_slots)

    def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        go_on.wait(20)
        return writer_of(hashes)(indices, views)

    task = asyncio.create_task(slow.publish(hashes, write))
    await eventually(lambda: store.arena.num_free == 0)
    assert await quick.publish(chain(500, 2), writer_of(chain(500, 2))) == 0
    go_on.set()
    assert await task == len(hashes)
    assert await quick.publish(chain(500, 2), writer_of(chain(500, 2))) == 2


async def test_close_lets_go_of_the_writers_lock(store: StoreServer, directory: Directory) -> None:
    client = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    await client.publish(chain(0, 1), writer_of(chain(0, 1)))
    folder = Path(store.config.dir) / "writers"
    assert len(list(folder.iterdir())) == 1
    await client.close()
    assert not list(folder.iterdir())


async def test_readers_and_writers_all_at_once(config: StoreConfig, make_client: MakeClient) -> None:
    """A small arena under many writers and readers, here and over the wire: whatever is valid is right."""
    store: Process = await start_store(config)
    try:
        chains = [chain(1000 * number, 6) for number in range(8)]
        clients = [make_client(config.dir), make_client(config.dir), make_client(None)]
        deadline = asyncio.get_running_loop().time() + 3.0
        num_read = 0

        async def work(seed: int) -> None:
            nonlocal num_read
            rng = random.Random(seed)
            while asyncio.get_running_loop().time() < deadline:
                client, hashes = rng.choice(clients), rng.choice(chains)
                if rng.random() < 0.5:
                    await client.publish(hashes, writer_of(hashes))
                else:
                    num_read += await read(client, hashes)

        await asyncio.gather(*(work(seed) for seed in range(8)))
        assert num_read > 0
    finally:
        await store.kill()
