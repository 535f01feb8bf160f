"""The block pool: a model-based test with the books checked after every step, and its properties by name."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.errors import NoRoom
from kvstore.blocks import BlockHash

NUM_BLOCKS = 7


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


class Books(RuleBasedStateMachine):
    """Plays holders that allocate, share, register and let go, next to a plain dict of what must be cached."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.holders: list[list[int]] = []
        self.content: dict[int, int] = {}  # block id -> number of the hash that it was registered with

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        if count > free:
            with pytest.raises(NoRoom):
                self.pool.allocate(count)
            return
        block_ids = self.pool.allocate(count)
        held = {block_id for holder in self.holders for block_id in holder}
        assert len(set(block_ids)) == count and held.isdisjoint(block_ids)
        for block_id in block_ids:
            self.content.pop(block_id, None)
        self.holders.append(block_ids)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), number=st.integers(0, 9))
    def register(self, data: st.DataObject, number: int) -> None:
        block_id = data.draw(st.sampled_from([block_id for holder in self.holders for block_id in holder]))
        self.pool.register(block_id, name(number))
        if block_id not in self.content and number not in self.content.values():
            self.content[block_id] = number

    @rule(numbers=st.lists(st.integers(0, 9), max_size=4, unique=True))
    def hit(self, numbers: list[int]) -> None:
        ids = {number: block_id for block_id, number in self.content.items()}
        expected: list[int] = []
        for number in numbers:
            if number not in ids:
                break
            expected.append(ids[number])
        block_ids = self.pool.match([name(number) for number in numbers])
        assert block_ids == expected
        cost = self.pool.num_unreferenced(block_ids)
        free = self.pool.num_free
        self.pool.acquire(block_ids)
        assert self.pool.num_free == free - cost
        self.holders.append(block_ids)

    @invariant()
    def books_add_up(self) -> None:
        holders = Counter(block_id for holder in self.holders for block_id in holder)
        self.pool.check_integrity(holders)
        assert self.pool.num_free == NUM_BLOCKS - len(holders)
        assert self.pool.num_sole(holders) == sum(count == 1 for count in holders.values())
        for block_id, number in self.content.items():
            assert self.pool.match([name(number)]) == [block_id]

    def teardown(self) -> None:
        for holder in self.holders:
            self.pool.release(holder)
        self.pool.check_integrity({})
        assert self.pool.num_free == NUM_BLOCKS


Books.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase


def test_blocks_without_content_are_handed_out_before_cached_ones() -> None:
    pool = BlockPool(4)
    a, b = pool.allocate(2)
    pool.register(a, name(1))
    pool.release([a, b])
    assert a not in pool.allocate(3)
    assert pool.match([name(1)]) == [a]


def test_the_least_recently_used_block_is_evicted_first() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    pool.register(a, name(1))
    pool.register(b, name(2))
    pool.release([a])
    pool.release([b])
    pool.acquire([a])
    pool.release([a])  # a was used after b
    assert pool.allocate(1) == [b]
    assert pool.match([name(1)]) == [a]
    assert pool.match([name(2)]) == []


def test_a_chain_loses_its_tail_first() -> None:
    pool = BlockPool(3)
    chain = pool.allocate(3)
    for number, block_id in enumerate(chain):
        pool.register(block_id, name(number))
    pool.release(chain)
    pool.allocate(1)
    assert pool.match([name(0), name(1), name(2)]) == chain[:2]


def test_the_same_block_computed_twice_is_cached_once() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    pool.register(a, name(1))
    pool.register(b, name(1))
    assert pool.match([name(1)]) == [a]
    pool.release([b])
    assert pool.match([name(1)]) == [a]
    pool.release([a])
    pool.allocate(2)  # evicts a; b must not have kept the name alive
    assert pool.match([name(1)]) == []


def test_a_block_keeps_its_first_name() -> None:
    pool = BlockPool(1)
    (a,) = pool.allocate(1)
    pool.register(a, name(1))
    pool.register(a, name(2))
    assert pool.match([name(2)]) == []
    pool.check_integrity({a: 1})


def test_giving_back_what_nobody_holds_is_refused() -> None:
    pool = BlockPool(1)
    with pytest.raises(ValueError, match="block 0"):
        pool.release([0])
    with pytest.raises(ValueError, match="block 0"):
        pool.register(0, name(1))


def test_books_that_do_not_add_up_are_told() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="block 0"):
        pool.check_integrity({})
    with pytest.raises(AssertionError, match="block 1"):
        pool.check_integrity({0: 1, 1: 1})


def test_a_pool_has_blocks() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0)
