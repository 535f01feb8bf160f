"""What came from another machine is written behind everything else, bounded; whatever fails there is nobody's loss."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import xxhash

from kvstore.blocks import BlockHash
from kvstore.quotas import SHARED, Owner
from kvstore.wire import ReceivedPayload
from node import replicator as module
from node.replicator import Replica, Replicator

BLOCK_BYTES = module.MAX_BATCH_BYTES // 2  # two blocks a write
MAX_WAITING = module.MAX_WAITING_BYTES // BLOCK_BYTES


class Publisher:
    """The engine's own blocks are published when the test says so."""

    def __init__(self) -> None:
        self.is_done = asyncio.Event()

    async def flush(self) -> None:
        await self.is_done.wait()


class Store:
    """Keeps what is written; lacks all blocks but `present`."""

    def __init__(self) -> None:
        self.can_publish = True
        self.error: Exception | None = None
        self.present: set[BlockHash] = set()
        self.batches: list[list[BlockHash]] = []
        self.owners: list[Owner] = []  # of each batch
        self.blocks: dict[BlockHash, bytes] = {}

    async def publish(self, hashes: Sequence[BlockHash], write: Callable[..., Sequence[int]], owner: Owner) -> int:
        if self.error is not None:
            raise self.error
        self.batches.append(list(hashes))
        self.owners.append(owner)
        await asyncio.sleep(0)
        indices = [index for index, block_hash in enumerate(hashes) if block_hash not in self.present]
        slots = [bytearray(8) for _ in indices]
        sums = write(indices, [memoryview(slot) for slot in slots])
        assert list(sums) == [xxhash.xxh3_64_intdigest(bytes(slot)) for slot in slots]
        self.blocks.update({hashes[index]: bytes(slot) for index, slot in zip(indices, slots, strict=True)})
        return len(indices)


def block(number: int, owner: Owner = SHARED) -> Replica:
    name = number.to_bytes(8, "little")
    return Replica(BlockHash(name * 2), ReceivedPayload(memoryview(name)), owner)


def blocks(count: int) -> list[Replica]:
    return [block(number) for number in range(count)]


def names_of(replicas: Sequence[Replica]) -> list[BlockHash]:
    return [replica.block_hash for replica in replicas]


@pytest.fixture
def publisher() -> Publisher:
    return Publisher()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def replicator(store: Store, publisher: Publisher) -> Replicator:
    return Replicator(store, publisher, BLOCK_BYTES)  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


async def test_writes_behind_the_engines_own_blocks_in_the_order_of_the_chain(
    replicator: Replicator, store: Store, publisher: Publisher
) -> None:
    given = blocks(5)
    store.present = {given[1].block_hash}
    replicator.replicate(given[:3])
    replicator.replicate([*given[2:], given[0]])
    await settle()
    assert store.batches == []
    publisher.is_done.set()
    await settle()
    assert [name for batch in store.batches for name in batch] == names_of(given), "each once"
    assert max(map(len, store.batches)) == 2
    del given[1]
    assert store.blocks == {replica.block_hash: bytes(replica.payload.view) for replica in given}


async def test_what_waits_is_bounded_and_the_head_of_the_chain_is_kept(
    replicator: Replicator, store: Store, publisher: Publisher
) -> None:
    given = blocks(MAX_WAITING + 10)
    replicator.replicate(given)
    publisher.is_done.set()
    await settle()
    assert list(store.blocks) == names_of(given[:MAX_WAITING])
    replicator.replicate(given[MAX_WAITING:])
    await settle()
    assert len(store.blocks) == len(given), "there is room again"


async def test_a_write_is_of_one_owner_and_counts_for_him(
    replicator: Replicator, store: Store, publisher: Publisher
) -> None:
    one, none = Owner(b"1" * 16, 7), Owner(b"2" * 16, 0)
    for number, owner in enumerate((SHARED, one, one, one, SHARED, none)):
        replicator.replicate([block(number, owner)])
    publisher.is_done.set()
    await settle()
    names = names_of(blocks(6))
    assert store.batches == [names[:1], names[1:3], names[3:4], names[4:5]]
    assert store.owners == [SHARED, one, one, SHARED]


async def test_without_an_arena_nothing_is_kept(replicator: Replicator, store: Store, publisher: Publisher) -> None:
    store.can_publish = False
    publisher.is_done.set()
    replicator.replicate(blocks(3))
    store.can_publish = True
    replicator.replicate([])
    await settle()
    assert store.batches == []


async def test_a_write_that_fails_is_forgotten(
    replicator: Replicator, store: Store, publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    publisher.is_done.set()
    store.error = ZeroDivisionError()
    replicator.replicate(blocks(5))
    await settle()
    assert "replicate_failed" in caplog.text
    store.error = None
    replicator.replicate([block(9)])
    await settle()
    assert list(store.blocks) == names_of([block(9)])


async def test_close_waits_for_what_is_being_written_alone(
    replicator: Replicator, store: Store, publisher: Publisher
) -> None:
    publisher.is_done.set()
    replicator.replicate(blocks(9))
    while not store.batches:
        await asyncio.sleep(0)
    await replicator.close()
    assert list(store.blocks) == names_of(blocks(2))
    await replicator.close()


async def test_each_block_that_is_taken_is_let_go_of_once(
    replicator: Replicator, store: Store, publisher: Publisher
) -> None:
    """Written, refused by a failing store, or dropped: the memory may be another's from then on."""
    let_go: list[int] = []
    given = [replace(block(number), let_go=partial(let_go.append, number)) for number in range(8)]
    assert replicator.replicate([given[0], *given[:3]]) == given[:3], "one of a name"
    assert let_go == []
    publisher.is_done.set()
    await settle()
    assert let_go == [0, 1, 2]
    store.error = ZeroDivisionError()
    assert replicator.replicate(given[3:6]) == given[3:6]
    await settle()
    assert sorted(let_go) == [0, 1, 2, 3, 4, 5]
    publisher.is_done.clear()
    assert replicator.replicate(given[6:]) == given[6:]
    closing = asyncio.create_task(replicator.close())
    await settle()
    assert sorted(let_go) == list(range(8))
    publisher.is_done.set()
    await closing
    store.can_publish = False
    assert replicator.replicate(given) == [] and len(let_go) == 8
