"""Slots that a store lends ahead: a regular writer publishes without asking, and nothing else is different."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from conftest import eventually
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kvstore_support import SLOT_BYTES, Process, chain, content, start_store, store_config, take, writer_of

from kvstore.arena import Arena, Fill, Reservation, Written
from kvstore.arena_map import HEADER_BYTES, ArenaMap, arena_bytes
from kvstore.blocks import BlockHash
from kvstore.client import KVClient
from kvstore.control import ControlChannel
from kvstore.directory import Directory
from kvstore.lent import LentSlots
from kvstore.local import LocalArena
from kvstore.operate import StoreOperator
from kvstore.quotas import Owner
from kvstore.server import StoreServer
from kvstore.slot_index import SlotIndex

NUM_SLOTS = 128
MAX_LENT = NUM_SLOTS // 8
OTHERS = itertools.count(1_000_000, 1000)  # where chains begin that nobody asks for


@pytest.fixture(autouse=True)
def threads_from_a_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.client._HERE_BYTES", 1 << 20)


# --- the books ---


def mapped(num_slots: int = NUM_SLOTS) -> tuple[Arena, ArenaMap, SlotIndex]:
    memory = memoryview(bytearray(arena_bytes(num_slots, 64)))
    arena_map = ArenaMap(memory, num_slots, 64)
    return Arena(arena_map), arena_map, SlotIndex(arena_map, memory[: num_slots * HEADER_BYTES])


def filled(arena_map: ArenaMap, block_hash: BlockHash, item: Reservation) -> Fill:
    arena_map.finish(item.slot, item.generation, block_hash, 7)
    return Fill(block_hash, Written(item.slot, item.generation, 7))


def test_a_lent_slot_becomes_what_its_writer_says() -> None:
    arena, arena_map, index = mapped()
    hashes, owner = chain(0, 3), Owner(b"t" * 16)
    lent = arena.lend(3, "w")
    assert index.slots(hashes) == [None] * 3
    fills = [filled(arena_map, *pair) for pair in zip(hashes, lent, strict=True)]
    assert index.run(hashes) == [item.slot for item in lent], "seen before the store has heard of it"
    assert (
        arena.name("thief", fills) == [] and arena.commit("w", [fill.written for fill in fills if fill.written]) == []
    )
    assert arena.name("w", fills, owner) == [(name, item.slot) for name, item in zip(hashes, lent, strict=True)]
    assert arena.name("w", fills) == [], "once"
    assert arena.num_blocks_of(owner.tenant) == 3 and index.run(hashes) == [item.slot for item in lent]
    arena.check_integrity()


def test_no_more_is_lent_than_an_eighth_and_a_small_arena_lends_none() -> None:
    arena, _, _ = mapped()
    assert len(arena.lend(1000, "w")) == MAX_LENT and arena.lend(1, "v") == []
    assert arena.abandon("w") == MAX_LENT and len(arena.lend(5, "v")) == 5
    arena.check_integrity()
    assert mapped(63)[0].lend(1, "w") == []


def test_a_block_written_twice_keeps_one_slot() -> None:
    arena, arena_map, index = mapped()
    (name,) = chain(0, 1)
    (first,), (second,) = arena.lend(1, "w"), arena.lend(1, "v")
    fills = [filled(arena_map, name, first), filled(arena_map, name, second)]
    assert index.slots([name]) != [None]
    twin = arena_map.read(second.slot, name, 1)
    assert arena.name("v", [fills[1]]) == [(name, second.slot)] and arena.name("w", [fills[0]]) == []
    assert index.slots([name]) == [second.slot] and twin is not None and twin.is_valid()
    arena.check_integrity()
    (third,) = arena.lend(1, "w")
    late = filled(arena_map, name, third)
    payload = arena_map.read(third.slot, name, 1)
    assert arena.name("w", [late]) == [] and payload is not None and not payload.is_valid()
    assert arena_map.header(third.slot).generation % 2 == 0
    assert arena.num_free == NUM_SLOTS - 1 and index.slots([name]) == [second.slot]
    arena.check_integrity()


def test_what_a_writer_finished_and_never_told_goes_with_him() -> None:
    arena, arena_map, index = mapped()
    hashes = chain(0, 2)
    (item, _) = arena.lend(2, "w")
    filled(arena_map, hashes[0], item)
    payload = arena_map.read(item.slot, hashes[0], 1)
    assert payload is not None and payload.is_valid()
    assert arena.abandon("w") == 2
    assert not payload.is_valid() and index.run(hashes) == [] and arena.num_free == NUM_SLOTS
    arena.check_integrity()
    (again,) = [slot for slot in arena.lend(NUM_SLOTS, "v") if slot.slot == item.slot]
    assert not payload.is_valid() and again.generation > item.generation


def test_slots_are_given_back() -> None:
    arena, _, _ = mapped()
    lent = LentSlots(4)
    lent.need(2)
    lent.add(lent.ask(), arena.lend(4, "w"))
    assert lent.ask() == 0
    assert arena.name("w", lent.give_back()) == [] and arena.num_free == NUM_SLOTS
    arena.check_integrity()


class BooksMachine(RuleBasedStateMachine):
    """Two writers lend, fill, tell and die in any order; the books balance, and the index agrees with them."""

    @initialize()
    def begin(self) -> None:
        self.arena, self.map, self.index = mapped(64)
        self.lent: dict[str, list[Reservation]] = {"v": [], "w": []}
        self.untold: dict[str, list[Fill]] = {"v": [], "w": []}
        self.names = chain(0, 12)

    writers = st.sampled_from("vw")
    numbers = st.integers(0, 11)

    @rule(writer=writers, num_slots=st.integers(0, 9))
    def lend(self, writer: str, num_slots: int) -> None:
        self.lent[writer] += self.arena.lend(num_slots, writer)

    @rule(writer=writers, number=numbers)
    def fill(self, writer: str, number: int) -> None:
        if self.lent[writer]:
            self.untold[writer].append(filled(self.map, self.names[number], self.lent[writer].pop()))

    @rule(writer=writers)
    def tell(self, writer: str) -> None:
        self.arena.name(writer, self.untold[writer])
        self.untold[writer] = []

    @rule(writer=writers)
    def die(self, writer: str) -> None:
        self.arena.abandon(writer)
        self.lent[writer], self.untold[writer] = [], []

    @rule(number=numbers)
    def reserve_by_name(self, number: int) -> None:
        for item in self.arena.reserve([self.names[number]], "x"):
            if item is not None:
                self.arena.commit("x", [Written(item.slot, item.generation, 7)])

    @rule(number=numbers)
    def evict(self, number: int) -> None:
        self.arena.evict([self.names[number]])

    @invariant()
    def balances(self) -> None:
        self.arena.check_integrity()
        held = dict(self.arena.blocks())
        early = {fill.block_hash for fills in self.untold.values() for fill in fills}
        for name, slot in zip(self.names, self.index.slots(self.names), strict=True):
            assert (slot is not None) == (name in held or name in early)
            assert slot is None or self.map.read(slot, name, 1) is not None


TestBooksMachine = BooksMachine.TestCase
TestBooksMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_writer_knows_what_he_is_writing() -> None:
    lent, slots = LentSlots(4), [Reservation(slot, 1) for slot in range(4)]
    hashes = chain(0, 6)
    assert lent.take(hashes[:1], [None]) == [] and lent.take(hashes[:1], [9]) == [None]
    assert lent.ask() == 0, "nobody needs any"
    lent.need(9)
    lent.add(lent.ask(), slots)
    first = lent.take(hashes[:3], [None, 5, None])
    assert first[1] is None and None not in (first[0], first[2])
    assert lent.take(hashes[:1], [None]) == [None], "it is under way"
    second = lent.take([hashes[3], hashes[3], hashes[4], hashes[5]], [None] * 4)
    assert len(second) == 3 and second[1] is None and None not in second[::2], "as far as they go"
    assert lent.num_in_hand == lent.ask() == 0
    fills = lent.settle(hashes[:3], first, [Written(item.slot, 1, 0) for item in first if item is not None])
    assert [fill.written is None for fill in fills] == [False, True, False] and lent.ask() == 2
    assert not lent.add(2, slots[:1]), "that is all it has"
    assert lent.ask() == 0
    lent.hope()
    assert lent.ask() == 1


# --- a store and its writers ---


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url)
    yield directory
    await directory.close()


@pytest.fixture
async def store(redis_url: str, short_dir: Path) -> AsyncIterator[StoreServer]:
    store = StoreServer(store_config(short_dir / "a", redis_url, NUM_SLOTS))
    await store.start()
    yield store
    store.arena.check_integrity()
    await store.stop()


@pytest.fixture
async def client(directory: Directory, store: StoreServer) -> AsyncIterator[KVClient]:
    client = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    await become_regular(client, store)
    yield client
    await client.close()


async def become_regular(client: KVClient, store: StoreServer) -> None:
    for first in itertools.islice(OTHERS, 2):
        await client.publish(chain(first, MAX_LENT), writer_of(chain(first, MAX_LENT)))
    await settled(store)


async def settled(store: StoreServer) -> None:
    """The store has heard of everything, and has lent what it can."""
    await eventually(lambda: store.arena.num_writing == MAX_LENT, what="slots are lent")
    await asyncio.sleep(0.01)  # the answer is on its way


async def read(client: KVClient, hashes: Sequence[BlockHash]) -> int:
    taken = take(await client.fetch(client.match_local(hashes)))
    assert taken == [content(block_hash) for block_hash in hashes[: len(taken)]]
    return len(taken)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each question was for, for whose answer a writer waited."""
    questions: list[int] = []
    reserve = LocalArena.reserve

    async def counted(self: LocalArena, hashes: Sequence[BlockHash], owner: Owner) -> list[Reservation | None]:
        questions.append(len(hashes))
        return await reserve(self, hashes, owner)

    monkeypatch.setattr(LocalArena, "reserve", counted)
    return questions


@pytest.mark.parametrize("num_blocks", [1, 10, 14])  # on the event loop, and on threads
async def test_a_regular_writer_does_not_ask(
    client: KVClient, store: StoreServer, asked: list[int], num_blocks: int
) -> None:
    for first in range(0, 5000, 1000):
        hashes = chain(first, num_blocks)
        assert await client.publish(hashes, writer_of(hashes)) == num_blocks
        assert await read(client, hashes) == num_blocks, "at once"
        assert await client.publish(hashes, writer_of(hashes)) == 0
        await settled(store)
        assert all(store.arena.holds(block_hash) for block_hash in hashes)
    assert asked == []


async def test_more_than_was_lent_and_owners_with_a_quota_ask(
    client: KVClient, store: StoreServer, asked: list[int]
) -> None:
    hashes, bounded = chain(0, MAX_LENT + 1), chain(1000, 4)
    assert await client.publish(hashes, writer_of(hashes)) == MAX_LENT + 1
    assert asked == [1] and await read(client, hashes) == MAX_LENT + 1
    assert await client.publish(bounded, writer_of(bounded), Owner(b"t" * 16, 3)) == 3
    assert asked == [1, 4] and store.arena.num_blocks_of(b"t" * 16) == 3


async def test_a_tenant_without_a_quota_is_known(client: KVClient, store: StoreServer, asked: list[int]) -> None:
    hashes = chain(0, 4)
    await client.publish(hashes, writer_of(hashes), Owner(b"t" * 16))
    await settled(store)
    assert asked == [] and store.arena.num_blocks_of(b"t" * 16) == 4


async def test_a_full_arena_goes_on_lending(client: KVClient, store: StoreServer, asked: list[int]) -> None:
    for first in range(0, 40_000, 1000):
        hashes = chain(first, 8)
        assert await client.publish(hashes, writer_of(hashes)) == 8
        assert await read(client, hashes) == 8
        await settled(store)
    assert asked == [] and store.arena.num_free == 0


async def test_write_that_fails_here_is_raised_and_its_slots_come_back(client: KVClient, store: StoreServer) -> None:
    def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        raise ZeroDivisionError("the engine is gone")

    for num_blocks in (1, 14):
        await become_regular(client, store)
        with pytest.raises(ZeroDivisionError):
            await client.publish(chain(0, num_blocks), write)
        await eventually(lambda: not store.arena.writers(), what="what was lent comes back")
    assert await client.publish(chain(0, 14), writer_of(chain(0, 14))) == 14


async def test_two_publishes_of_the_same_blocks_write_them_once(client: KVClient, store: StoreServer) -> None:
    hashes, seen = chain(0, 14), list[int]()
    may_end = threading.Event()

    def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        seen.extend(indices)
        may_end.wait(20)
        return writer_of(hashes)(indices, views)

    first = asyncio.create_task(client.publish(hashes, write))
    await eventually(lambda: bool(seen))
    assert await client.publish(hashes, write) == 0, "as a store says of what is being written"
    may_end.set()
    assert await first == 14 and sorted(seen) == list(range(14))
    await settled(store)
    assert await read(client, hashes) == 14


async def test_two_writers_of_the_same_blocks(client: KVClient, directory: Directory, store: StoreServer) -> None:
    other = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    for first in range(0, 3000, 100):
        hashes = chain(first, 6)
        await asyncio.gather(*(one.publish(hashes, writer_of(hashes)) for one in (client, other)))
        assert await read(client, hashes) == await read(other, hashes) == 6
    await other.close()
    await settled(store)
    assert len(store.arena.blocks()) == NUM_SLOTS - MAX_LENT - store.arena.num_free


async def test_a_draining_store_lends_nothing_and_is_heard(
    client: KVClient, store: StoreServer, asked: list[int]
) -> None:
    channel = ControlChannel(Path(store.config.dir) / "control")
    operator = StoreOperator(lambda: channel)
    await operator.drain()
    assert await client.publish(chain(0, 1), writer_of(chain(0, 1))) == 0 and asked == [1]
    await eventually(lambda: not store.arena.writers(), what="what was lent comes back")
    assert not client.can_publish
    channel.close()


WRITER = """
import asyncio, json, sys
from pathlib import Path
sys.path.insert(0, "tests")
from kvstore.client import KVClient
from kvstore.directory import Directory
from kvstore.local import LocalArena
from kvstore_support import SLOT_BYTES, chain, writer_of
config = json.loads(sys.argv[1])
async def main():
    client = KVClient(Directory(config["redis_url"]), SLOT_BYTES, Path(config["dir"]))
    for first in range(0, 500, 100):
        await client.publish(chain(first, 8), writer_of(chain(first, 8)))
        await asyncio.sleep(0.05)
    LocalArena.tell = lambda *args: None  # from here on the store hears nothing
    num_untold = await client.publish(chain(1000, 4), writer_of(chain(1000, 4)))
    print(num_untold, len(client.match_local(chain(1000, 4)).hashes), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_killed_writer_leaves_no_slot_and_no_block_that_the_store_does_not_know(
    directory: Directory, store: StoreServer
) -> None:
    writer = await Process.start(WRITER, {"redis_url": store.config.redis_url, "dir": store.config.dir})
    reader = KVClient(directory, SLOT_BYTES, Path(store.config.dir))
    assert writer.line == "4 4" and await read(reader, chain(1000, 4)) == 4
    assert store.arena.num_writing == MAX_LENT
    payloads = await reader.fetch(reader.match_local(chain(1000, 4)))
    await writer.kill()
    await eventually(lambda: not store.arena.writers(), what="the kernel says that it is dead")
    store.arena.check_integrity()
    assert take(payloads) == [] and await read(reader, chain(1000, 4)) == 0
    assert all([await read(reader, chain(first, 4)) == 4 for first in range(0, 500, 100)])
    await reader.close()


async def test_a_store_that_is_killed_costs_no_error(redis_url: str, directory: Directory, short_dir: Path) -> None:
    config = store_config(short_dir / "a", redis_url, NUM_SLOTS)
    process = await start_store(config)
    client = KVClient(directory, SLOT_BYTES, Path(config.dir))

    async def publish(first: int) -> int:
        return await client.publish(chain(first, 2), writer_of(chain(first, 2)))

    for first in range(0, 500, 100):
        assert await publish(first) == 2
    await process.kill()
    for first in range(1000, 1300, 100):
        await publish(first)
    process = await start_store(config)
    await eventually(lambda: client.can_publish)
    for first in range(2000, 2500, 100):
        assert await publish(first) == 2 and await read(client, chain(first, 2)) == 2
    await client.close()
    await process.kill()
