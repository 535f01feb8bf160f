"""The TCP wire, both ends: what either says is bounded and checked, and nobody who hangs holds anybody else up."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from conftest import eventually
from kvstore_support import SLOT_BYTES, announced, chain, content, start_store, store_config, take, writer_of
from test_kvstore_fuzz import HARMS, seeds_of

from kvstore.blocks import BlockHash
from kvstore.client import KVClient
from kvstore.curve import new_wire_key
from kvstore.directory import Directory
from kvstore.frames import MAX_BLOCKS, BlockInfo, Get, Got, part_blocks, stream_parts
from kvstore.records import ArenaRecord
from kvstore.server import StoreServer
from kvstore.stream import Unpacker, pack
from kvstore.tcp_wire import TcpWire
from kvstore.wire import Outcome, State
from kvstore.wires import WireByRecord, default_wire
from kvstore.zmq_wire import ZmqWire

STEP = part_blocks(SLOT_BYTES)
HASHES = chain(0, 5 * STEP + 3)  # in three parts
NUM_SLOTS = len(HASHES) + 2


@pytest.fixture
async def store(redis_url: str, short_dir: Path) -> AsyncIterator[StoreServer]:
    """Holds HASHES."""
    store = StoreServer(store_config(short_dir / "a", redis_url, num_slots=NUM_SLOTS))
    await store.start()
    await publish(store, HASHES)
    yield store
    store.arena.check_integrity()
    await store.stop()


@pytest.fixture
async def wire() -> AsyncIterator[TcpWire]:
    wire = TcpWire(SLOT_BYTES)
    yield wire
    await asyncio.wait_for(wire.close(), 20)
    assert not wire._running and not wire._transfers


async def publish(store: StoreServer, hashes: list[BlockHash]) -> None:
    writer = KVClient(store._directory, SLOT_BYTES, Path(store.config.dir))
    assert await writer.publish(hashes, writer_of(hashes)) == len(hashes)
    await writer.close()
    await announced(store)


async def end(
    wire: TcpWire, record: ArenaRecord, timeout_s: float = 20.0, into: list[memoryview] | None = None
) -> Outcome:
    """Brings HASHES; what came is right."""
    ticket = wire.submit(record, HASHES, timeout_s, into)
    outcome = await wire.poll(ticket, 40.0)
    wire.cancel(ticket)
    assert outcome.state is not State.PENDING
    taken = take(outcome.payloads)
    assert taken == [content(block_hash) for block_hash in HASHES[: len(taken)]]
    return outcome


def views_of(num_blocks: int) -> tuple[bytearray, list[memoryview]]:
    memory = bytearray(b"\xee" * (num_blocks * SLOT_BYTES))
    return memory, [memoryview(memory)[at : at + SLOT_BYTES] for at in range(0, len(memory), SLOT_BYTES)]


def good(question: Get) -> bytes:
    """The whole answer to a question."""
    answer = b""
    for indices in stream_parts(len(question.hashes), SLOT_BYTES):
        part = question.hashes[indices.start : indices.stop]
        infos = [BlockInfo(h, SLOT_BYTES, xxhash.xxh3_64_intdigest(content(h))) for h in part]
        answer += pack(Got(question.request_id, infos)) + b"".join(map(content, part))
    return answer


class ScriptedStore:
    """Answers each question with what `answer` makes of it, then hangs up where that says so."""

    def __init__(self, answer: Callable[[Get], bytes] = good, hangs_up: bool = False) -> None:
        self.answer = answer
        self.hangs_up = hangs_up
        self.num_connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> ArenaRecord:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return ArenaRecord(
            arena_id="f" * 32, address="", host="x", slot_bytes=SLOT_BYTES, num_slots=9, tcp_address=address
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.append(writer)
        unpacker = Unpacker()
        while data := await reader.read(1 << 16):
            unpacker.feed(data)
            while (taken := unpacker.take()) is not None:
                assert isinstance(taken[0], Get)
                writer.write(self.answer(taken[0]))
                if self.hangs_up:
                    writer.close()
                    return

    def close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[ScriptedStore, ArenaRecord]]:
    store = ScriptedStore()
    yield store, await store.start()
    store.close()


# --- the reader's side ---


async def test_a_transfer_over_several_parts_and_its_connection_is_used_again(
    wire: TcpWire, scripted: tuple[ScriptedStore, ArenaRecord]
) -> None:
    store, record = scripted
    for _ in range(3):
        outcome = await end(wire, record)
        assert outcome.state is State.COMPLETED and len(outcome.payloads) == len(HASHES)
    assert store.num_connections == 1


async def test_blocks_are_received_where_their_reader_wants_them(wire: TcpWire, store: StoreServer) -> None:
    memory, views = views_of(len(HASHES))
    outcome = await end(wire, store.record(), into=views)
    assert [payload.view for payload in outcome.payloads] == views
    assert bytes(memory) == b"".join(map(content, HASHES))


async def test_many_transfers_share_two_connections(wire: TcpWire, scripted: tuple[ScriptedStore, ArenaRecord]) -> None:
    store, record = scripted
    outcomes = await asyncio.gather(*(end(wire, record) for _ in range(12)))
    assert all(len(outcome.payloads) == len(HASHES) for outcome in outcomes)
    assert store.num_connections == 2


async def test_a_shorter_answer_ends_the_run_and_keeps_the_connection(
    wire: TcpWire, scripted: tuple[ScriptedStore, ArenaRecord]
) -> None:
    store, record = scripted
    for num_blocks in (0, 1, STEP, STEP + 2):
        store.answer = lambda question, n=num_blocks: (
            good(Get(question.request_id, question.hashes[:n]))
            + (pack(Got(question.request_id, [])) if n % STEP == 0 else b"")
        )
        outcome = await end(wire, record)
        assert outcome.state is State.COMPLETED and len(outcome.payloads) == num_blocks
    assert store.num_connections == 1


async def test_a_wrong_byte_ends_the_run_and_costs_the_connection(
    wire: TcpWire, scripted: tuple[ScriptedStore, ArenaRecord]
) -> None:
    store, record = scripted

    def answer(question: Get) -> bytes:
        damaged = bytearray(good(question))
        damaged[-1 - 2 * SLOT_BYTES] ^= 1
        return bytes(damaged)

    store.answer = answer
    outcome = await end(wire, record)
    assert outcome.state is State.COMPLETED and len(outcome.payloads) == len(HASHES) - 3
    store.answer = good
    assert len((await end(wire, record)).payloads) == len(HASHES)
    assert store.num_connections == 2


HEAD = struct.Struct("<II")
BAD_ANSWERS: dict[str, Callable[[Get], bytes]] = {
    "endless_frame": lambda question: HEAD.pack(2**32 - 1, 0),
    "tail": lambda question: HEAD.pack(48, 1) + bytes(49),
    "empty_frame": lambda question: HEAD.pack(0, 0),
    "more_blocks_than_asked": lambda question: pack(
        Got(question.request_id, [BlockInfo(h, SLOT_BYTES, 0) for h in chain(0, STEP + 1)])
    ),
    "another_question": lambda question: good(Get(question.request_id + 1, question.hashes)),
    "no_answer": pack,
    "other_blocks": lambda question: good(Get(question.request_id, chain(500, 3))),
    "another_size": lambda question: pack(Got(question.request_id, [BlockInfo(question.hashes[0], 1 << 31, 0)])),
    "garbage": lambda question: random.Random(3).randbytes(1 << 16),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_what_is_no_answer_fails_at_once(
    wire: TcpWire, scripted: tuple[ScriptedStore, ArenaRecord], name: str
) -> None:
    store, record = scripted
    store.answer = BAD_ANSWERS[name]
    outcome = await end(wire, record, timeout_s=60.0)
    assert outcome.state is State.FAILED and not outcome.payloads and "nothing came" not in outcome.reason
    store.answer = good
    assert len((await end(wire, record)).payloads) == len(HASHES)


async def test_every_damaged_answer_ends_in_blocks_that_are_right(
    wire: TcpWire, scripted: tuple[ScriptedStore, ArenaRecord]
) -> None:
    """Flipped, cut, longer, mixed up; in heads and in blocks. A view's bytes count only if they came whole."""
    store, record = scripted
    rng, seen = random.Random(17), set()
    for _ in range(60):
        harm = rng.choice(HARMS)

        def answer(question: Get, harm: Callable[[random.Random, bytearray], None] = harm) -> bytes:
            whole = bytearray(good(question))
            at = rng.choice([0, 0, STEP * SLOT_BYTES])
            piece = whole[at : at + 2000]
            harm(rng, piece)
            return bytes(whole[:at] + piece + whole[at + 2000 :])

        store.answer, store.hangs_up = answer, rng.random() < 0.3
        _, views = views_of(len(HASHES))
        seen.add((await end(wire, record, timeout_s=0.2, into=views)).state)
    assert seen == {State.COMPLETED, State.FAILED}
    store.answer, store.hangs_up = good, False
    assert len((await end(wire, record)).payloads) == len(HASHES)


async def test_what_came_before_a_store_falls_silent_is_kept(
    wire: TcpWire, scripted: tuple[ScriptedStore, ArenaRecord]
) -> None:
    store, record = scripted
    store.answer = lambda question: good(question)[: 5 * SLOT_BYTES]
    outcome = await end(wire, record, timeout_s=0.3)
    assert (outcome.state, outcome.reason) == (State.FAILED, "nothing came for 0.3 s")
    assert len(outcome.payloads) == 4


async def test_a_store_that_is_slow_is_waited_for(wire: TcpWire) -> None:
    """All in all longer than the patience; of three transfers, one has to wait for a connection besides."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unpacker = Unpacker()
        while data := await reader.read(1 << 16):
            unpacker.feed(data)
            while (taken := unpacker.take()) is not None:
                assert isinstance(taken[0], Get)
                answer = good(taken[0])
                for at in range(0, len(answer), len(answer) // 8 + 1):
                    writer.write(answer[at : at + len(answer) // 8 + 1])
                    await asyncio.sleep(0.1)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    record = ArenaRecord(
        arena_id="f" * 32, address="", host="x", slot_bytes=SLOT_BYTES, num_slots=9, tcp_address=address
    )
    outcomes = await asyncio.gather(*(end(wire, record, timeout_s=0.5) for _ in range(3)))
    assert [len(outcome.payloads) for outcome in outcomes] == [len(HASHES)] * 3
    server.close()


async def test_nothing_is_written_behind_a_cancel(wire: TcpWire) -> None:
    """The views may be another's a moment later."""
    may_go_on = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        stream, _ = listener.accept()
        with stream:
            stream.recv(1 << 16)
            answer = good(Get(1, HASHES))
            stream.sendall(answer[: 2 * SLOT_BYTES])
            may_go_on.wait(20)
            stream.sendall(answer[2 * SLOT_BYTES : 6 * SLOT_BYTES])

    serving = asyncio.create_task(asyncio.to_thread(serve))
    record = replace(await ScriptedStore().start(), tcp_address=f"tcp://127.0.0.1:{listener.getsockname()[1]}")
    memory, views = views_of(len(HASHES))
    ticket = wire.submit(record, HASHES, 20.0, views)
    while len((await wire.poll(ticket, 0.01)).payloads) < 1:
        pass
    wire.cancel(ticket)
    before = bytes(memory)
    may_go_on.set()
    await asyncio.sleep(0.1)
    assert bytes(memory) == before
    with suppress(OSError):  # the connection was given up
        await serving
    listener.close()


async def test_close_ends_what_is_under_way(scripted: tuple[ScriptedStore, ArenaRecord]) -> None:
    store, record = scripted
    store.answer = lambda question: b""
    wire = TcpWire(SLOT_BYTES)
    tickets = [wire.submit(record, HASHES, 60.0) for _ in range(4)]
    polls = [asyncio.create_task(wire.poll(ticket, 60.0)) for ticket in tickets]
    await asyncio.sleep(0.05)
    await asyncio.wait_for(wire.close(), 20)
    assert {outcome.state for outcome in await asyncio.gather(*polls)} == {State.FAILED}
    ticket = wire.submit(record, HASHES, 60.0)
    assert (await wire.poll(ticket, 20.0)).state is State.FAILED


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://127.0.0.1:99999", "tcp://:1", "tcp://" + "x" * 300 + ":1"])
async def test_an_address_that_is_none_is_a_failure(wire: TcpWire, address: str) -> None:
    record = ArenaRecord(
        arena_id="f" * 32, address="", host="x", slot_bytes=SLOT_BYTES, num_slots=9, tcp_address=address
    )
    assert (await end(wire, record)).state is State.FAILED


# --- who reads over which wire ---


async def test_with_a_key_nothing_goes_in_the_clear(redis_url: str, short_dir: Path) -> None:
    """The store opens no such port, and a reader with a key does not go to one whatever a record says."""
    keyed = StoreServer(store_config(short_dir / "a", redis_url, wire_key=new_wire_key()))
    record = await keyed.start()
    assert not record.tcp_address and keyed._tcp_door is None
    await keyed.stop()
    wire = default_wire(SLOT_BYTES, new_wire_key())
    assert isinstance(wire, ZmqWire) and wire.capabilities.is_encrypted
    await wire.close()
    plain = default_wire(SLOT_BYTES, "")
    assert isinstance(plain, WireByRecord) and not plain.capabilities.is_encrypted
    await plain.close()


@pytest.mark.parametrize("tcp", [True, False])
async def test_the_record_says_which_wire(redis_url: str, short_dir: Path, tcp: bool) -> None:
    store = StoreServer(store_config(short_dir / "a", redis_url, num_slots=NUM_SLOTS, tcp=tcp))
    record = await store.start()
    await publish(store, HASHES)
    assert bool(record.tcp_address) == tcp
    directory = Directory(redis_url)
    reader = KVClient(directory, SLOT_BYTES, None)
    assert take(await reader.fetch(await reader.match(HASHES))) == list(map(content, HASHES))
    assert (store._tcp_door is not None and store._tcp_door.num_readers == 1) == tcp
    await reader.close()
    await directory.close()
    await store.stop()


# --- the store's side ---


async def open_to(store: StoreServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = store.record().tcp_address.removeprefix("tcp://").split(":")
    return await asyncio.open_connection(host, int(port))


def num_readers(store: StoreServer) -> int:
    assert store._tcp_door is not None
    return store._tcp_door.num_readers


async def test_malformed_questions_cost_the_connection_and_nothing_else(store: StoreServer, wire: TcpWire) -> None:
    rng = random.Random(23)
    seeds = [pack(message) for message in seeds_of(store.record().arena_id)]
    for _ in range(400):
        reader, writer = await open_to(store)
        for _ in range(rng.randint(1, 3)):
            frame = bytearray(rng.choice(seeds))
            for _ in range(rng.randint(0, 2)):
                rng.choice(HARMS)(rng, frame)
            writer.write(bytes(frame))
        writer.write_eof()
        async with asyncio.timeout(20):
            try:
                while await reader.read(1 << 20):
                    pass
            except ConnectionError:
                pass
        writer.close()
    await eventually(lambda: num_readers(store) == 0)
    assert len((await end(wire, store.record())).payloads) == len(HASHES)


async def test_an_endless_question_is_cut_off(store: StoreServer) -> None:
    reader, writer = await open_to(store)
    writer.write(HEAD.pack(2**31, 0))
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()


async def test_a_reader_that_does_not_read_is_given_up(
    store: StoreServer, wire: TcpWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are served meanwhile, however many there are, and the store keeps none of their bytes itself."""
    monkeypatch.setattr("kvstore.tcp_door._STALL_S", 0.5)
    question = pack(Get(1, (HASHES * (MAX_BLOCKS // len(HASHES) + 1))[:MAX_BLOCKS]))  # 400 MB
    greedy = [await open_to(store) for _ in range(8)]
    for _, writer in greedy:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(question)
    await eventually(lambda: num_readers(store) == len(greedy))
    assert len((await end(wire, store.record())).payloads) == len(HASHES)
    await eventually(lambda: num_readers(store) == 1, what="only the good one is left")
    for _, writer in greedy:
        writer.close()


async def test_who_asks_nothing_is_given_up(store: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tcp_door._FIRST_QUESTION_S", 0.1)
    reader, writer = await open_to(store)
    assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()


async def test_who_has_asked_nothing_for_longest_makes_room(
    store: StoreServer, wire: TcpWire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvstore.tcp_door._MAX_READERS", 2)
    assert len((await end(wire, store.record())).payloads) == len(HASHES)
    second = await open_to(store)
    await eventually(lambda: num_readers(store) == 2)
    third = await open_to(store)  # in place of the connection that the wire keeps
    fresh = TcpWire(SLOT_BYTES)
    assert len((await end(fresh, store.record())).payloads) == len(HASHES)
    assert await asyncio.wait_for(second[0].read(), 20) == b""
    assert len((await end(wire, store.record())).payloads) == len(HASHES), "and makes another one in its turn"
    assert await asyncio.wait_for(third[0].read(), 20) == b""
    await eventually(lambda: num_readers(store) == 2)
    assert "event=readers_full socket=tcp readers=2 ended=1 refused=0" in caplog.text
    for _, one in (second, third):
        one.close()
    await fresh.close()


async def test_readers_beyond_the_limit_are_turned_away(
    store: StoreServer, wire: TcpWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all that are there are being answered."""
    monkeypatch.setattr("kvstore.tcp_door._MAX_READERS", 2)
    monkeypatch.setattr("kvstore.tcp_door._STALL_S", 60.0)
    question = pack(Get(1, (HASHES * (MAX_BLOCKS // len(HASHES) + 1))[:MAX_BLOCKS]))  # 400 MB
    first = [await open_to(store) for _ in range(2)]
    for _, writer in first:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(question)
    assert store._tcp_door is not None
    await eventually(lambda: num_readers(store) == 2 and not store._tcp_door._waiting)
    reader, writer = await open_to(store)
    assert await asyncio.wait_for(reader.read(), 20) == b""
    for _, one in [*first, (reader, writer)]:
        one.close()
    await eventually(lambda: num_readers(store) == 0)
    assert len((await end(wire, store.record())).payloads) == len(HASHES)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_store_lost_in_the_middle_of_a_transfer(
    redis_url: str, short_dir: Path, number: signal.Signals
) -> None:
    """FAILED at once when it is killed, in time when it hangs; what had come is right."""
    config = store_config(short_dir / "a", redis_url, num_slots=NUM_SLOTS)
    process = await start_store(config)
    directory = Directory(redis_url)
    writer = KVClient(directory, SLOT_BYTES, Path(config.dir))
    assert await writer.publish(HASHES, writer_of(HASHES)) == len(HASHES)
    (record,) = await directory.arenas()
    many = HASHES * 150  # 600 MB
    wire = TcpWire(SLOT_BYTES)
    ticket = wire.submit(record, many[:MAX_BLOCKS], 30.0 if number == signal.SIGKILL else 1.0)
    while not (await wire.poll(ticket, 0.001)).payloads:
        pass
    process.send(number)
    outcome = await asyncio.wait_for(wire.poll(ticket, 60.0), 60)
    taken = take(outcome.payloads)
    assert taken == [content(block_hash) for block_hash in many[: len(taken)]]
    assert outcome.state is State.FAILED and 0 < len(taken) < MAX_BLOCKS
    wire.cancel(ticket)
    await asyncio.wait_for(wire.close(), 20)
    await process.kill()
    await writer.close()
    await directory.close()
