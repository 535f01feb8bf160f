"""The client over any wire: whatever it does, a fetch is a run of right blocks in bounded time, and the books balance.

The same client that ships drives a wire inside the process and those that ship, each with faults put upon it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import eventually
from faulty_wires import (
    Fault,
    FaultyWire,
    MemoryWire,
    delayed,
    endless,
    failed_at_the_end,
    failed_with_nothing,
    refused,
    shortened,
)
from kvstore_support import SLOT_BYTES, announced, chain, content, store_config, take, writer_of
from wire_faults import Wire as SlowWire
from wire_faults import block_address, through

from kvstore.blocks import BlockHash
from kvstore.client import KVClient, Match
from kvstore.directory import ArenaRecord, Directory
from kvstore.server import StoreServer
from kvstore.tcp_wire import TcpWire
from kvstore.wire import State, Wire
from kvstore.zmq_wire import ZmqWire

STEP = 3  # blocks of one transfer
HASHES = chain(0, 8)  # come in transfers of 3, 3 and 2


@dataclass
class Setup:
    """A reader, the wire under it, and an arena that holds HASHES."""

    reader: KVClient
    wire: FaultyWire
    record: ArenaRecord
    store: StoreServer | None = None

    def match(self, hashes: Sequence[BlockHash] = HASHES) -> Match:
        places = tuple((self.record.arena_id, index) for index in range(len(hashes)))
        return Match(tuple(hashes), places, {self.record.arena_id: self.record})

    async def read(self, limit_s: float = 20.0) -> int:
        """How many of HASHES come; each of them is right."""
        taken = take(await asyncio.wait_for(self.reader.fetch(self.match(), limit_s), 60))
        assert taken == [content(block_hash) for block_hash in HASHES[: len(taken)]]
        return len(taken)

    @property
    def in_flight_bytes(self) -> int:
        return self.reader.links.stretches([(self.record.arena_id, 0)])[0].in_flight_bytes


def reader_over(directory: Directory, wire: Wire, timeout_s: float = 0.5) -> tuple[KVClient, FaultyWire]:
    faulty = FaultyWire(wire)
    return KVClient(directory, SLOT_BYTES, None, timeout_s, wire=faulty), faulty


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url)
    yield directory
    await directory.close()


@pytest.fixture
async def memory(directory: Directory) -> AsyncIterator[Setup]:
    inner = MemoryWire(STEP)
    reader, wire = reader_over(directory, inner)
    record = ArenaRecord(arena_id="a" * 32, address="", host="x", slot_bytes=SLOT_BYTES, num_slots=9)
    inner.hold(record.arena_id, HASHES)
    setup = Setup(reader, wire, record)
    yield setup
    assert setup.in_flight_bytes == 0 and not inner.open, "each transfer was ended"
    await reader.close()
    assert inner.is_closed


async def filled_store(directory: Directory, redis_url: str, short_dir: Path) -> tuple[StoreServer, ArenaRecord]:
    store = StoreServer(store_config(short_dir / "a", redis_url))
    record = await store.start()
    writer = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    assert await writer.publish(HASHES, writer_of(HASHES)) == len(HASHES)
    await writer.close()
    await announced(store)
    return store, record


@pytest.fixture
async def zeromq(
    directory: Directory, redis_url: str, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Setup]:
    monkeypatch.setattr("kvstore.zmq_wire._TRANSFER_BYTES", STEP * SLOT_BYTES)
    store, record = await filled_store(directory, redis_url, short_dir)
    inner = ZmqWire(SLOT_BYTES)
    reader, wire = reader_over(directory, inner)
    setup = Setup(reader, wire, record, store)
    yield setup
    assert setup.in_flight_bytes == 0 and not inner._transfers
    for connection in inner._connections.values():
        await eventually(lambda c=connection: not c.asking and not c.queue and not c.channel.num_waiting)
    await reader.close()
    await store.stop()


@pytest.fixture
async def tcp(
    directory: Directory, redis_url: str, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Setup]:
    monkeypatch.setattr("kvstore.tcp_wire._TRANSFER_BYTES", STEP * SLOT_BYTES)
    store, record = await filled_store(directory, redis_url, short_dir)
    inner = TcpWire(SLOT_BYTES)
    reader, wire = reader_over(directory, inner)
    setup = Setup(reader, wire, record, store)
    yield setup
    assert setup.in_flight_bytes == 0 and not inner._transfers
    await eventually(lambda: not inner._running)
    await reader.close()
    await store.stop()


@pytest.fixture(params=["memory", "zeromq", "tcp"])
def setup(request: pytest.FixtureRequest) -> Setup:
    return request.getfixturevalue(request.param)


async def test_transfers_of_what_the_wire_allows(setup: Setup) -> None:
    assert await setup.read() == len(HASHES)
    assert setup.wire.num_submitted == 3
    assert setup.reader.links.remote.num_blocks == len(HASHES)


FAULTS: dict[str, tuple[Fault, int]] = {  # and how many blocks of its transfer come all the same
    "refused": (refused(), 0),
    "endless": (endless(), 0),
    "delayed_for_too_long": (delayed(30.0), 0),
    "failed_with_nothing": (failed_with_nothing(), 0),
    "failed_at_the_end": (failed_at_the_end(), STEP),
    "nothing": (shortened(0), 0),
    "one": (shortened(1), 1),
    "two": (shortened(2), 2),
}
COMPLETE = ("nothing", "one", "two")  # the arena has no more: it is not to blame


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_a_shorter_run(setup: Setup, name: str, at: int) -> None:
    fault, num_blocks = FAULTS[name]
    setup.wire.faults[at] = fault
    assert await setup.read(limit_s=0.6) == at * STEP + num_blocks
    assert setup.in_flight_bytes == 0
    assert (setup.record.arena_id in setup.reader._avoided) == (name not in COMPLETE)
    assert setup.wire.num_submitted == at + 1, "nothing is asked for behind a gap"
    assert await setup.read() == len(HASHES), "and the next one works"


async def test_a_short_delay_is_no_fault(setup: Setup) -> None:
    setup.wire.faults = {0: delayed(0.05), 2: delayed(0.1)}
    assert await setup.read() == len(HASHES)
    assert not setup.reader._avoided


@pytest.mark.parametrize("setup", ["zeromq", "tcp"], indirect=True)
async def test_who_waits_for_others_does_not_blame_the_arena(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """One transfer takes its time, and another one has no turn within its own; blocks come all the while."""
    monkeypatch.setattr("kvstore.zmq_wire._TURNS", 1)
    monkeypatch.setattr("kvstore.zmq_wire.part_blocks", lambda slot_bytes: 1)
    monkeypatch.setattr("kvstore.tcp_transfer._CONNECTIONS", 1)
    if isinstance(setup.wire.inner, ZmqWire):
        setup.record = replace(setup.record, tcp_address="")
    slow = SlowWire(block_address(setup.record))
    match = through(setup.match(), await slow.start())
    assert len(await setup.reader.fetch(match)) == len(HASHES)
    setup.reader._timeout_s = 20.0
    slow.passes.clear()
    first = asyncio.create_task(setup.reader.fetch(match))
    await eventually(lambda: setup.in_flight_bytes > 0)
    second = asyncio.create_task(setup.reader.fetch(match, 0.6))
    while not second.done():
        slow.passes.set()
        slow.passes.clear()
        await asyncio.sleep(0.2)
    slow.passes.set()
    num_blocks = len(await first)
    await slow.stop()
    assert await second == [] and num_blocks == len(HASHES)
    assert not setup.reader._avoided


async def test_what_is_left_of_the_time_has_to_be_enough_for_an_answer(setup: Setup) -> None:
    setup.wire.faults[0] = delayed(0.6)
    assert await setup.read(limit_s=0.7) == STEP
    assert setup.wire.num_submitted == 1 and not setup.reader._avoided


async def test_every_fault_one_after_the_other(setup: Setup) -> None:
    for name, (fault, _) in FAULTS.items():
        if name not in ("endless", "delayed_for_too_long"):
            setup.wire.faults[setup.wire.num_submitted] = fault
            assert await setup.read() < len(HASHES)
            assert setup.in_flight_bytes == 0
    assert await setup.read() == len(HASHES)


async def test_no_time_is_no_transfer(setup: Setup) -> None:
    assert await setup.read(limit_s=0.0) == 0
    assert await setup.read(limit_s=-1.0) == 0
    assert not setup.reader._avoided and not setup.wire.num_submitted
    assert await setup.read() == len(HASHES)


async def test_a_cancelled_fetch_leaves_nothing_behind(setup: Setup) -> None:
    for _ in range(20):
        setup.wire.faults[setup.wire.num_submitted] = delayed(10.0)
        fetching = asyncio.create_task(setup.reader.fetch(setup.match()))
        await eventually(lambda: setup.in_flight_bytes > 0)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        assert setup.in_flight_bytes == 0
    assert not setup.reader._avoided, "that is nobody's fault"
    assert await setup.read() == len(HASHES)


async def test_a_fetch_over_two_arenas_ends_with_the_first_gap(setup: Setup) -> None:
    """What comes behind a gap is of no use, and one arena's fault is not the other's."""
    nowhere = "tcp://127.0.0.1:1"
    other = replace(setup.record, arena_id="b" * 32, address=nowhere, tcp_address=nowhere)
    match = setup.match()
    places = (*match.places[:2], *((other.arena_id, 0) for _ in range(2)), *match.places[4:])
    both = Match(match.hashes, places, {**match.arenas, other.arena_id: other})
    assert len(await setup.reader.fetch(both, 5.0)) == 2
    assert set(setup.reader._avoided) == {other.arena_id}
    assert setup.reader.links.stretches([(other.arena_id, 0)])[0].in_flight_bytes == 0


async def test_an_arena_that_failed_is_not_found_for_a_while(memory: Setup, directory: Directory) -> None:
    await directory.heartbeat_arena(memory.record, 60)
    await directory.announce_all(memory.record.arena_id, [(h, i) for i, h in enumerate(HASHES)], 60)
    match = await memory.reader.match(HASHES)
    assert match.num_blocks == len(HASHES)
    memory.wire.faults[0] = failed_with_nothing()
    assert await memory.reader.fetch(match) == []
    assert (await memory.reader.match(HASHES)).num_blocks == 0


async def test_corrupted_bytes_end_the_run(setup: Setup) -> None:
    if setup.store is None:
        assert isinstance(setup.wire.inner, MemoryWire)
        setup.wire.inner.corrupt(setup.record.arena_id, HASHES[4])
    else:
        slot = setup.store.arena.find(HASHES[4])
        assert slot is not None
        setup.store._service._map.view(slot)[0] ^= 1
    assert await setup.read() == 4
    assert not setup.reader._avoided, "a slot that was used again looks the same"


async def test_in_flight_bytes_are_those_of_the_transfer(memory: Setup) -> None:
    memory.wire.faults[1] = delayed(0.2)
    fetching = asyncio.create_task(memory.read())
    await eventually(lambda: memory.wire.num_submitted == 2)
    assert memory.in_flight_bytes == STEP * SLOT_BYTES
    assert await fetching == len(HASHES)


async def test_outcomes_of_a_ticket(setup: Setup) -> None:
    wire = setup.wire.inner
    ticket = wire.submit(setup.record, HASHES[:STEP], 5.0)
    outcome = await wire.poll(ticket, 5.0)
    assert outcome.state is State.COMPLETED and len(outcome.payloads) == STEP
    assert (await wire.poll(ticket, 0.0)).state is State.COMPLETED, "it can be asked again"
    wire.cancel(ticket)
    ticket = wire.submit(setup.record, HASHES[:STEP], 0.0)
    assert (await wire.poll(ticket, 1.0)).state is State.FAILED, "no time was left"
    wire.cancel(ticket)
    assert not wire.capabilities.is_encrypted and wire.capabilities.num_blocks(1 << 50) == 1
