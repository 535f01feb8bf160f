"""The publisher beside a store that does as the test says: order, how much at once, and that all is unpinned."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from engine.request import FullBlock
from kvstore.blocks import BlockHash
from kvstore.quotas import SHARED, Owner
from node import publisher as module
from node.publisher import MAX_WRITES, Publisher

BLOCK_BYTES = module.MAX_BATCH_BYTES // 2  # two blocks a write


class Engine:
    """Counts what is unpinned."""

    def __init__(self) -> None:
        self.layout = SimpleNamespace(block_bytes=BLOCK_BYTES)
        self.pieces = SimpleNamespace(numbers=(0,))
        self.unpinned: Counter[int] = Counter()
        self.exported: list[int] = []

    def unpin(self, block_ids: Sequence[int]) -> None:
        self.unpinned.update(block_ids)

    def export_pieces(self, piece_ids: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        self.exported += piece_ids
        return [0] * len(views)


class Loop:
    def __init__(self) -> None:
        self.engine = Engine()

    def post(self, fn: Callable[[Any], object]) -> None:
        fn(self.engine)


class Store:
    """Each write waits until the test lets it go on, or fails it."""

    def __init__(self) -> None:
        self.can_publish = True
        self.writes: list[asyncio.Future[None]] = []
        self.hashes: list[list[BlockHash]] = []
        self.owners: list[Owner] = []

    async def publish(self, hashes: Sequence[BlockHash], write: Callable[..., None], owner: Owner) -> int:
        self.owners.append(owner)
        gate = asyncio.get_running_loop().create_future()
        self.writes.append(gate)
        self.hashes.append(list(hashes))
        write(range(len(hashes)), [])
        await gate
        return len(hashes)


def blocks(*numbers: int) -> list[FullBlock]:
    return [FullBlock(BlockHash(bytes([number]) * 16), number) for number in numbers]


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def store() -> Store:
    return Store()


def publisher_of(loop: Loop, store: Store, num_blocks: int = 1000) -> Publisher:
    return Publisher(loop, store, num_blocks)  # type: ignore[arg-type]


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_few_writes_are_under_way_in_order(loop: Loop, store: Store) -> None:
    publisher = publisher_of(loop, store)
    assert publisher.publish(blocks(*range(7)))
    await turn()
    assert len(store.writes) == MAX_WRITES == 2
    store.writes[1].set_result(None)  # the younger one is done first: nothing is settled out of order
    await turn()
    assert not loop.engine.unpinned and len(store.writes) == 2
    store.writes[0].set_result(None)
    await turn()
    assert len(store.writes) == 4 and sorted(loop.engine.unpinned) == [0, 1, 2, 3]
    flushing = asyncio.create_task(publisher.flush())
    store.writes[2].set_result(None)
    await turn()
    assert not flushing.done()
    store.writes[3].set_result(None)
    await flushing
    assert loop.engine.unpinned == Counter(range(7))
    assert loop.engine.exported == list(range(7))
    assert [block_hash[0] for part in store.hashes for block_hash in part] == list(range(7))


async def test_a_write_is_of_one_owner(loop: Loop, store: Store) -> None:
    publisher, one, two = publisher_of(loop, store), Owner(b"1" * 16, 5), Owner(b"2" * 16)
    for number, owner in enumerate([one, one, one, two, SHARED, SHARED, one]):
        publisher.publish(blocks(number), owner)
    flushing = asyncio.create_task(publisher.flush())
    for at in range(5):
        await turn()
        store.writes[at].set_result(None)
    await flushing
    assert [[block_hash[0] for block_hash in part] for part in store.hashes] == [[0, 1], [2], [3], [4, 5], [6]]
    assert store.owners == [one, one, two, SHARED, one]
    assert loop.engine.unpinned == Counter(range(7))
    assert not publisher.publish(blocks(7), Owner(b"3" * 16, 0)), "who may have nothing need not wait for it"
    assert loop.engine.unpinned == Counter(range(8)) and len(store.writes) == 5


async def test_a_write_that_fails_is_unpinned_and_the_next_one_goes_on(
    loop: Loop, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = publisher_of(loop, store)
    publisher.publish(blocks(0, 1, 2))
    await turn()
    store.writes[0].set_exception(ZeroDivisionError())
    store.writes[1].set_result(None)
    await publisher.flush()
    assert loop.engine.unpinned == Counter(range(3)) and "publish_failed" in caplog.text
    publisher.publish(blocks(3))
    await turn()
    store.writes[2].set_result(None)
    await publisher.flush()
    assert loop.engine.unpinned == Counter(range(4))


async def test_the_same_block_twice_is_written_once(loop: Loop, store: Store) -> None:
    publisher = publisher_of(loop, store)
    same = blocks(7)[0].block_hash
    publisher.publish([FullBlock(same, 1), FullBlock(same, 2)])
    await turn()
    store.writes[0].set_result(None)
    await publisher.flush()
    assert len(loop.engine.exported) == 1 and loop.engine.unpinned == Counter([1, 2])


async def test_without_an_arena_nothing_is_taken(loop: Loop, store: Store) -> None:
    store.can_publish = False
    publisher = publisher_of(loop, store)
    assert not publisher.publish(blocks(0, 1))
    assert publisher.publish([])
    assert loop.engine.unpinned == Counter([0, 1]) and not store.writes
    await publisher.flush()


async def test_a_store_that_stalls_does_not_keep_the_engines_blocks(
    loop: Loop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.02)
    publisher = publisher_of(loop, store, num_blocks=8)  # two may be pinned by a late store
    assert publisher.publish(blocks(0, 1))
    await asyncio.sleep(0.05)
    assert not publisher.publish(blocks(2))
    assert loop.engine.unpinned == Counter([2])
    store.writes[0].set_result(None)
    await publisher.flush()
    assert publisher.publish(blocks(3))
    await turn()
    store.writes[1].set_result(None)
    await publisher.flush()
    assert loop.engine.unpinned == Counter([0, 1, 2, 3])
