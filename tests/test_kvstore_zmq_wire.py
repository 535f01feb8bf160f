"""The ZeroMQ wire: what is under way at a time is bounded, and whoever sends what nobody asked for is cut off."""

from __future__ import annotations

import asyncio
import itertools
import random
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import xxhash
import zmq
import zmq.asyncio
from conftest import eventually
from kvstore_support import SLOT_BYTES, chain, content, lingerless_context, store_config, take, writer_of

from kvstore.client import KVClient
from kvstore.curve import Curve, new_wire_key
from kvstore.directory import ArenaRecord, Directory
from kvstore.frames import MAX_QUESTIONS, BlockInfo, Get, Got, decode, part_blocks
from kvstore.inbox import plain_socket
from kvstore.server import StoreServer
from kvstore.wire import Outcome, State
from kvstore.zmq_wire import ZmqWire

NUM_BLOCKS = 3 * part_blocks(SLOT_BYTES) + 1  # in four parts
HASHES = chain(0, NUM_BLOCKS)


def record_of(address: str, slot_bytes: int = SLOT_BYTES) -> ArenaRecord:
    return ArenaRecord(arena_id="f" * 32, address=address, host="x", slot_bytes=slot_bytes, num_slots=9)


def good(question: Get) -> list[bytes]:
    infos = [BlockInfo(h, SLOT_BYTES, xxhash.xxh3_64_intdigest(content(h))) for h in question.hashes]
    return [Got(question.request_id, infos).encode(), *(content(h) for h in question.hashes)]


class ScriptedStore:
    """Keeps the questions that it gets, and answers when it is told to."""

    def __init__(self) -> None:
        self.context = lingerless_context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.LINGER, 0)  # from the start: what is queued for a peer that went away is kept else
        self.record = record_of(f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}")
        self.questions: list[tuple[bytes, Get]] = []
        self.answer: Callable[[Get], list[bytes]] | None = None
        self.task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            sender, frame = await self.socket.recv_multipart()
            question = decode(frame)
            assert isinstance(question, Get)
            self.questions.append((sender, question))
            if self.answer is not None:
                await self.socket.send_multipart([sender, *self.answer(question)])

    async def answer_next(self, count: int) -> None:
        for sender, question in self.questions[:count]:
            await self.socket.send_multipart([sender, *good(question)])
        del self.questions[:count]

    def close(self) -> None:
        self.task.cancel()
        self.context.destroy(linger=0)


@pytest.fixture
async def store() -> AsyncIterator[ScriptedStore]:
    store = ScriptedStore()
    yield store
    store.close()


@pytest.fixture
async def wire() -> AsyncIterator[ZmqWire]:
    wire = ZmqWire(SLOT_BYTES)
    yield wire
    await asyncio.wait_for(wire.close(), 20)


def num_waiting(wire: ZmqWire) -> int:
    return sum(connection.channel.num_waiting for connection in wire._connections.values())


def is_idle(wire: ZmqWire) -> bool:
    return not any(connection.asking or connection.queue for connection in wire._connections.values())


async def end(wire: ZmqWire, record: ArenaRecord, timeout_s: float = 20.0) -> Outcome:
    """Brings HASHES; what came is right."""
    ticket = wire.submit(record, HASHES, timeout_s)
    outcome = await wire.poll(ticket, 40.0)
    wire.cancel(ticket)
    assert outcome.state is not State.PENDING
    taken = take(outcome.payloads)
    assert taken == [content(block_hash) for block_hash in HASHES[: len(taken)]]
    return outcome


async def test_a_transfer_is_asked_for_in_parts(wire: ZmqWire, store: ScriptedStore) -> None:
    ticket = wire.submit(store.record, HASHES, 20.0)
    await eventually(lambda: len(store.questions) == 4)
    asked = [list(question.hashes) for _, question in store.questions]
    assert list(itertools.chain(*asked)) == HASHES and all(len(part) <= part_blocks(SLOT_BYTES) for part in asked)
    await store.answer_next(2)
    await eventually(lambda: num_waiting(wire) == 2)
    outcome = await wire.poll(ticket, 0.01)
    assert outcome.state is State.PENDING and len(outcome.payloads) == 2 * part_blocks(SLOT_BYTES)
    await store.answer_next(2)
    assert len((await wire.poll(ticket, 20.0)).payloads) == NUM_BLOCKS
    wire.cancel(ticket)


@pytest.mark.parametrize(("slot_bytes", "num_questions"), [(4096, MAX_QUESTIONS), (1 << 20, 16), (24 << 20, 4)])
async def test_what_is_under_way_is_bounded(store: ScriptedStore, slot_bytes: int, num_questions: int) -> None:
    """Whatever is submitted, a store has so many questions of one reader at a time: fewer where blocks are large."""
    wire, hashes = ZmqWire(slot_bytes), chain(0, 16 * part_blocks(slot_bytes))
    tickets = [wire.submit(store.record, hashes, 20.0) for _ in range(4)]
    await eventually(lambda: len(store.questions) == num_questions)
    await asyncio.sleep(0.1)
    assert len(store.questions) == num_questions == num_waiting(wire)
    for ticket in tickets:
        wire.cancel(ticket)
    await wire.close()


async def test_late_answers_of_a_cancelled_transfer_are_waited_for_and_dropped(
    wire: ZmqWire, store: ScriptedStore
) -> None:
    """Until they came its turn is not given to others; then nothing is left of it, and the connection is as good."""
    for n in range(3):
        ticket = wire.submit(store.record, HASHES, 20.0)
        await eventually(lambda n=n: len(store.questions) == 4 * min(n + 1, 2))
        wire.cancel(ticket)
    await asyncio.sleep(0.05)
    assert num_waiting(wire) == 8
    await store.answer_next(8)
    await eventually(lambda: num_waiting(wire) == 0 and is_idle(wire))
    (connection,) = wire._connections.values()
    store.answer = good
    outcome = await end(wire, store.record)
    assert outcome.state is State.COMPLETED and len(outcome.payloads) == NUM_BLOCKS
    assert list(wire._connections.values()) == [connection]


async def test_late_answers_that_never_come_cost_the_connection(wire: ZmqWire, store: ScriptedStore) -> None:
    ticket = wire.submit(store.record, HASHES, 0.2)
    await eventually(lambda: len(store.questions) == 4)
    wire.cancel(ticket)
    await eventually(lambda: num_waiting(wire) == 0)
    store.answer = good
    assert len((await end(wire, store.record)).payloads) == NUM_BLOCKS


async def test_what_came_before_a_store_falls_silent_is_kept(wire: ZmqWire, store: ScriptedStore) -> None:
    ticket = wire.submit(store.record, HASHES, 0.5)
    await eventually(lambda: len(store.questions) == 4)
    await store.answer_next(1)
    outcome = await wire.poll(ticket, 20.0)
    assert outcome.state is State.FAILED and outcome.reason == "nothing came for 0.5 s"
    assert len(outcome.payloads) == part_blocks(SLOT_BYTES)
    assert num_waiting(wire) == 0
    wire.cancel(ticket)


async def test_a_store_that_is_slow_is_waited_for(wire: ZmqWire, store: ScriptedStore) -> None:
    """All in all longer than the patience; the second transfer has nothing of its own meanwhile."""
    num_parts = -(-NUM_BLOCKS // part_blocks(SLOT_BYTES))
    transfers = [asyncio.create_task(end(wire, store.record, 0.5)) for _ in range(2)]
    for _ in range(2 * num_parts):
        await eventually(lambda: store.questions)
        await asyncio.sleep(0.15)
        await store.answer_next(1)
    for transfer in transfers:
        assert len((await transfer).payloads) == NUM_BLOCKS


async def test_a_shorter_answer_ends_the_run(wire: ZmqWire, store: ScriptedStore) -> None:
    def answer(question: Get) -> list[bytes]:
        is_second = HASHES.index(question.hashes[0]) == part_blocks(SLOT_BYTES)
        return good(Get(question.request_id, question.hashes[:3])) if is_second else good(question)

    store.answer = answer
    outcome = await end(wire, store.record)
    assert outcome.state is State.COMPLETED and len(outcome.payloads) == part_blocks(SLOT_BYTES) + 3


async def test_transfers_beside_each_other(wire: ZmqWire, store: ScriptedStore) -> None:
    store.answer = good
    outcomes = await asyncio.gather(*(end(wire, store.record) for _ in range(12)))
    assert all(len(outcome.payloads) == NUM_BLOCKS for outcome in outcomes)
    assert len(wire._connections) == 1


async def test_many_that_wait_for_a_store_that_dies_fail_at_once(wire: ZmqWire, store: ScriptedStore) -> None:
    tickets = [wire.submit(store.record, HASHES, 100.0) for _ in range(2000)]
    await eventually(lambda: store.questions)
    store.close()
    for ticket in tickets:
        assert (await wire.poll(ticket, 20.0)).state is State.FAILED
        wire.cancel(ticket)
    assert is_idle(wire)


async def test_close_ends_what_is_under_way(store: ScriptedStore) -> None:
    wire = ZmqWire(SLOT_BYTES)
    tickets = [wire.submit(store.record, HASHES, 60.0) for _ in range(4)]
    await eventually(lambda: store.questions)
    polls = [asyncio.create_task(wire.poll(ticket, 60.0)) for ticket in tickets]
    await asyncio.sleep(0)
    await asyncio.wait_for(wire.close(), 20)
    assert {outcome.state for outcome in await asyncio.gather(*polls)} == {State.FAILED}
    ticket = wire.submit(store.record, HASHES, 60.0)
    assert (await wire.poll(ticket, 20.0)).state is State.FAILED
    wire.cancel(ticket)


# --- those that send too much ---


async def test_endless_messages_are_cut_off(wire: ZmqWire, store: ScriptedStore) -> None:
    """Each of them may well be a message: a good answer, but to no question."""
    ticket = wire.submit(store.record, HASHES, 60.0)
    await eventually(lambda: len(store.questions) == 4)
    sender, question = store.questions[0]
    stray = [sender, *good(Get(10**6, question.hashes[:1]))]
    for _ in range(200):
        await store.socket.send_multipart(stray)
    outcome = await wire.poll(ticket, 40.0)
    assert outcome.state is State.FAILED and "nobody asked for" in outcome.reason
    wire.cancel(ticket)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER"
PART = b"\x03" + struct.pack(">Q", 1 << 16) + bytes(1 << 16)  # a frame behind which others follow


class EndlessStore:
    """Speaks ZeroMQ as far as it has to, and begins a message that never ends, when asked or at once."""

    def __init__(self, waits_for_question: bool) -> None:
        self._waits_for_question = waits_for_question
        self.num_bytes = 0
        self.is_cut_off = asyncio.Event()

    async def start(self) -> ArenaRecord:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return record_of(f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING + READY)
        await reader.readexactly(len(GREETING) + len(READY))
        try:
            if self._waits_for_question:
                await reader.read(10)
            while True:
                writer.write(PART)
                await writer.drain()
                self.num_bytes += len(PART)
        except ConnectionError:
            self.is_cut_off.set()
        finally:
            writer.close()

    def close(self) -> None:
        self._server.close()


@pytest.mark.parametrize("waits_for_question", [True, False])
async def test_an_endless_message_is_cut_off(wire: ZmqWire, waits_for_question: bool) -> None:
    store = EndlessStore(waits_for_question)
    outcome = await end(wire, await store.start(), timeout_s=200.0)
    assert outcome.state is State.FAILED and not outcome.payloads
    await asyncio.wait_for(store.is_cut_off.wait(), 20)
    assert store.num_bytes > 8 << 20, "less than that may be a message that is merely slow"
    store.close()


async def test_a_connection_that_nobody_uses_is_watched_too(wire: ZmqWire) -> None:
    store = EndlessStore(waits_for_question=True)
    wire._connection(await store.start()).channel.ask(lambda request_id: Get(request_id, [])).cancel()
    await asyncio.wait_for(store.is_cut_off.wait(), 20)
    (connection,) = wire._connections.values()
    await eventually(lambda: connection.channel.is_broken)
    store.close()


async def test_damaged_answers_are_misses(wire: ZmqWire, store: ScriptedStore) -> None:
    rng = random.Random(11)

    def answer(question: Get) -> list[bytes]:
        frames = good(question)
        at = rng.choice([0, 0, rng.randrange(len(frames))])
        action = rng.randrange(6)
        if action == 0:
            damaged = bytearray(frames[at])
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            frames[at] = bytes(damaged)
        elif action == 1:
            frames[at] = frames[at][: rng.randrange(len(frames[at]))]
        elif action == 2:
            del frames[at]
        elif action == 3:
            frames.insert(at, rng.choice(frames))
        return frames

    store.answer = answer
    outcomes = [await end(wire, store.record, timeout_s=0.3) for _ in range(60)]
    assert {outcome.state for outcome in outcomes} == {State.COMPLETED, State.FAILED}
    store.answer = good
    assert len((await end(wire, store.record)).payloads) == NUM_BLOCKS
    assert num_waiting(wire) == 0 and is_idle(wire) and not wire._transfers


# --- the store's side ---


@pytest.mark.parametrize("is_keyed", [True, False])
async def test_a_store_cuts_off_who_sends_a_message_without_an_end(
    redis_url: str, short_dir: Path, is_keyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frame after frame, each of a good size: ZeroMQ would keep them all. Others are served behind it.

    A peer made of ZeroMQ only sends what has an end, so this one has; it is cut off long before that.
    """
    monkeypatch.setattr("kvstore.flood._LOOK_S", 0.001)
    key = new_wire_key() if is_keyed else ""
    store = StoreServer(store_config(short_dir / "a", redis_url, num_slots=10, wire_key=key, tcp=False))
    record = await store.start()
    context = lingerless_context()
    flooder, monitor = (plain_socket(context, kind) for kind in (zmq.DEALER, zmq.PAIR))
    if is_keyed:
        Curve(key).identify(flooder)
    flooder.setsockopt(zmq.SNDHWM, 0)
    flooder.setsockopt(zmq.RECONNECT_IVL, -1)
    flooder.monitor("inproc://flooder", zmq.EVENT_DISCONNECTED)
    monitor.connect("inproc://flooder")
    flooder.connect(record.address)
    for _ in range(20):  # good questions are handed out, and count as such
        flooder.send(Get(1, HASHES).encode())
    part = zmq.Frame(bytes(1 << 16))
    for _ in range(1000):
        flooder.send(part, zmq.SNDMORE, copy=False)  # 65 MB
    flooder.send(part, copy=False)
    await eventually(lambda: monitor.poll(0), what="it is cut off")
    wire = ZmqWire(SLOT_BYTES, key)
    ticket = wire.submit(record, HASHES[:10], 20.0)
    assert (await wire.poll(ticket, 20.0)).state is State.COMPLETED
    wire.cancel(ticket)
    await wire.close()
    monitor.close()
    context.destroy(linger=0)
    await store.stop()


async def test_a_store_watches_its_readers_for_as_long_as_they_are_there(redis_url: str, short_dir: Path) -> None:
    store = StoreServer(store_config(short_dir / "a", redis_url, num_slots=10, tcp=False))
    record = await store.start()
    guard = store._flood_guard
    assert guard is not None
    for _ in range(3):
        wire = ZmqWire(SLOT_BYTES)
        for _ in range(200):
            ticket = wire.submit(record, HASHES, 20.0)
            assert (await wire.poll(ticket, 20.0)).state is State.COMPLETED
            wire.cancel(ticket)
        (taken_bytes,) = guard._taken_bytes.values()
        assert taken_bytes > 200 * 16 * part_blocks(SLOT_BYTES)
        await wire.close()
        await eventually(lambda: not guard._meters and not guard._taken_bytes)
    await store.stop()


async def test_a_store_queues_little_for_a_reader_that_does_not_read(redis_url: str, short_dir: Path) -> None:
    store = StoreServer(store_config(short_dir / "a", redis_url, num_slots=10))
    record = await store.start()
    directory = Directory(redis_url)
    writer = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    assert await writer.publish(HASHES[:10], writer_of(HASHES)) == 10
    context = lingerless_context()
    greedy = context.socket(zmq.DEALER)
    greedy.setsockopt(zmq.RCVHWM, 1)
    greedy.connect(record.address)
    num_asked = 1000  # 1 GB
    for request_id in range(num_asked):
        await greedy.send(Get(request_id, HASHES[:10] * 400).encode())
    wire = ZmqWire(SLOT_BYTES)
    ticket = wire.submit(record, HASHES[:10], 20.0)
    assert len((await wire.poll(ticket, 20.0)).payloads) == 10, "others are served meanwhile"
    wire.cancel(ticket)
    num_answers = 0
    while await greedy.poll(500):
        answer, *payloads = await greedy.recv_multipart()
        num_answers += 1
        message = decode(answer)
        assert isinstance(message, Got) and len(message.blocks) == len(payloads) == part_blocks(SLOT_BYTES)
    assert 0 < num_answers < num_asked / 2
    context.destroy(linger=0)
    await wire.close()
    await writer.close()
    await store.stop()
    await directory.close()


def test_parts_are_bounded_in_frames_and_in_bytes() -> None:
    assert part_blocks(1) == 256 and part_blocks(1 << 30) == 1
    assert all(part_blocks(size) * size <= 2 << 20 for size in (64, 4096, 100_000, 1 << 20))
