"""The arena's books and headers: never two owners of a slot, never a block that is not what its key says."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.arena import Arena, Reservation, Written
from kvstore.arena_map import FREE, READY, WRITING, ArenaMap, MappedPayload, arena_bytes, slots_offset, slots_within
from kvstore.blocks import BlockHash
from kvstore.errors import ArenaFull
from kvstore.eviction import POLICIES, Admission, SecondTouch
from kvstore.quotas import NO_TENANT, SHARED, Owner

SLOT_BYTES = 96


def name(number: int) -> BlockHash:
    return BlockHash(hashlib.sha256(number.to_bytes(8, "little")).digest()[:16])


def content(block_hash: bytes) -> bytes:
    return (block_hash * 6)[:SLOT_BYTES]


def new_arena(
    num_slots: int, policy: str = "lru", admission: Admission[BlockHash] | None = None
) -> tuple[Arena, ArenaMap]:
    arena_map = ArenaMap(memoryview(bytearray(arena_bytes(num_slots, SLOT_BYTES))), num_slots, SLOT_BYTES)
    return Arena(arena_map, POLICIES[policy](num_slots), admission), arena_map


def evicted(arena: Arena) -> list[BlockHash]:
    return [block.block_hash for block in arena.take_evicted()]


def store(arena: Arena, arena_map: ArenaMap, *numbers: int, writer: str = "w", owner: Owner = SHARED) -> int:
    hashes = [name(number) for number in numbers]
    written = []
    for block_hash, item in zip(hashes, arena.reserve(hashes, writer, owner=owner), strict=True):
        if item is not None:
            arena_map.view(item.slot)[:] = content(block_hash)
            written.append(Written(item.slot, item.generation, 7))
    num_committed = len(arena.commit(writer, written))
    arena.check_integrity()
    return num_committed


def test_geometry() -> None:
    for num_slots in (1, 63, 64, 65, 1000):
        size = arena_bytes(num_slots, SLOT_BYTES)
        assert slots_offset(num_slots) % 4096 == 0
        assert slots_within(size, SLOT_BYTES) >= num_slots
        assert arena_bytes(slots_within(size, SLOT_BYTES), SLOT_BYTES) <= size
    assert slots_within(4095, SLOT_BYTES) == 0
    with pytest.raises(ValueError, match="do not fit"):
        ArenaMap(memoryview(bytearray(arena_bytes(3, SLOT_BYTES) - 1)), 3, SLOT_BYTES)


def test_slots_do_not_overlap() -> None:
    _, arena_map = new_arena(5)
    for slot in range(5):
        arena_map.view(slot)[:] = bytes([slot + 1]) * SLOT_BYTES
    assert all(arena_map.view(slot) == bytes([slot + 1]) * SLOT_BYTES for slot in range(5))
    assert all(arena_map.header(slot).generation == 0 for slot in range(5))


def test_write_then_read() -> None:
    arena, arena_map = new_arena(3)
    (item,) = arena.reserve([name(1)], "w")
    assert item is not None and item.generation % 2 == 1
    assert arena_map.header(item.slot).state == WRITING
    assert arena_map.read(item.slot, name(1), 1) is None, "nobody sees a block before it is committed"
    arena_map.view(item.slot)[:] = content(name(1))
    assert arena.commit("w", [Written(item.slot, item.generation, 5)]) == [(name(1), item.slot)]
    header = arena_map.header(item.slot)
    assert (header.state, header.key, header.length, header.checksum) == (READY, name(1), SLOT_BYTES, 5)
    payload = arena_map.read(item.slot, name(1), 1)
    assert payload is not None and payload.view == content(name(1)) and payload.is_valid()
    assert arena_map.read(item.slot, name(2), 1) is None
    assert arena_map.read(3, name(1), 1) is None and arena_map.read(-1, name(1), 1) is None


def test_what_another_machine_copied_goes_first() -> None:
    arena, arena_map = new_arena(3)
    store(arena, arena_map, 1)
    store(arena, arena_map, 2)
    store(arena, arena_map, 3)
    assert arena.find_for_copy(name(2)) == arena.slot(name(2)) and arena.find_for_copy(name(9)) is None
    store(arena, arena_map, 4)
    assert evicted(arena) == [name(2)]


def test_payload_is_invalid_once_its_slot_is_reserved_again() -> None:
    arena, arena_map = new_arena(1)
    store(arena, arena_map, 1)
    payload = arena_map.read(0, name(1), 1)
    assert payload is not None
    store(arena, arena_map, 2)
    assert not payload.is_valid()
    assert evicted(arena) == [name(1)] and evicted(arena) == []
    store(arena, arena_map, 1)
    assert not payload.is_valid(), "the same block in the same slot, but not the same bytes all the time"


def test_present_or_being_written_is_not_reserved() -> None:
    arena, arena_map = new_arena(4)
    store(arena, arena_map, 1)
    assert arena.reserve([name(1), name(2), name(2)], "w")[::2] == [None, None]
    assert arena.reserve([name(2)], "other") == [None]


def test_only_the_owner_commits_and_only_once() -> None:
    arena, _ = new_arena(2)
    (item,) = arena.reserve([name(1)], "w")
    assert item is not None
    written = Written(item.slot, item.generation, 0)
    assert arena.commit("thief", [written]) == []
    assert arena.commit("w", [Written(item.slot, item.generation + 2, 0), Written(99, 1, 0)]) == []
    assert arena.commit("w", [written, written]) == [(name(1), item.slot)]
    assert arena.commit("w", [written]) == []
    arena.check_integrity()


def test_dead_writer_leaves_nothing() -> None:
    arena, arena_map = new_arena(3)
    store(arena, arena_map, 1)
    items = arena.reserve([name(2), name(3)], "dead")
    assert arena.writers() == {"dead"} and arena.num_free == 0
    assert arena.abandon("dead") == 2 and arena.abandon("dead") == 0
    arena.check_integrity()
    assert arena.writers() == set() and arena.num_free == 2
    assert arena.commit("dead", [Written(item.slot, item.generation, 0) for item in items if item]) == []
    assert store(arena, arena_map, 2, 3) == 2


def test_full() -> None:
    arena, arena_map = new_arena(2)
    first = arena.reserve([name(1), name(2), name(3)], "a")
    assert [item is not None for item in first] == [True, True, False], "the head of a chain is worth most"
    with pytest.raises(ArenaFull):
        arena.reserve([name(4)], "b")
    assert arena.reserve([name(1)], "b") == [None], "nothing is missing, so nothing is full"
    assert arena.reserve([], "b") == []
    arena.abandon("a")
    assert store(arena, arena_map, 4) == 1


def test_least_lately_used_goes_first() -> None:
    arena, arena_map = new_arena(3)
    store(arena, arena_map, 1)
    store(arena, arena_map, 2)
    store(arena, arena_map, 3)
    assert arena.find(name(1)) is not None
    store(arena, arena_map, 4)
    assert evicted(arena) == [name(2)]


def test_tail_of_a_chain_goes_first() -> None:
    arena, arena_map = new_arena(3)
    store(arena, arena_map, 1, 2, 3)
    store(arena, arena_map, 4)
    assert evicted(arena) == [name(3)]
    assert store(arena, arena_map, 1, 2, 3, 5) == 1, "blocks of the chain itself are not evicted for its tail"
    assert evicted(arena) == [name(4)]
    with pytest.raises(ArenaFull):
        arena.reserve([name(1), name(2), name(3), name(5)], "w")


def test_block_read_in_another_process_gets_a_second_chance_not_a_third() -> None:
    arena, arena_map = new_arena(2)
    store(arena, arena_map, 1)
    store(arena, arena_map, 2)
    slot = arena.find(name(1))
    assert arena.find(name(2)) is not None and slot is not None
    assert arena_map.read(slot, name(1), now=77) is not None
    store(arena, arena_map, 3)
    assert evicted(arena) == [name(2)]
    store(arena, arena_map, 4)
    store(arena, arena_map, 5)
    assert name(1) in evicted(arena)


def test_eviction_ends_when_everything_was_just_read() -> None:
    arena, arena_map = new_arena(4)
    store(arena, arena_map, 1, 2, 3, 4)
    for block_hash, slot in arena.blocks():
        assert arena_map.read(slot, block_hash, now=5) is not None
    assert store(arena, arena_map, 5, 6, 7, 8) == 4


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_any_policy_keeps_what_is_being_written_and_the_chain(policy: str) -> None:
    arena, arena_map = new_arena(6, policy)
    assert all(arena.reserve([name(1), name(2)], "slow"))
    store(arena, arena_map, 3, 4, 5, 6)
    assert store(arena, arena_map, 3, 4, 7, 8, 9) == 2, "for the last one no slot is left"
    assert set(evicted(arena)) == {name(5), name(6)}
    assert {block_hash for block_hash, _ in arena.blocks()} == {name(number) for number in (3, 4, 7, 8)}


def test_evicted_says_what_the_slot_still_holds_and_whether_it_was_asked_for_again() -> None:
    arena, arena_map = new_arena(2, admission=SecondTouch(2))
    store(arena, arena_map, 1)
    assert arena.find(name(1)) is not None, "at once: the hand-off"
    store(arena, arena_map, 2)
    assert arena.find(name(1)) is not None
    store(arena, arena_map, 3, 4)
    first, second = arena.take_evicted()
    assert (first.block_hash, first.is_admitted, first.checksum) == (name(2), False, 7)
    assert (second.block_hash, second.is_admitted, second.checksum) == (name(1), True, 7)
    arena, arena_map = new_arena(1)
    store(arena, arena_map, 1)
    store(arena, arena_map, 2)
    assert [block.is_admitted for block in arena.take_evicted()] == [True], "unless it is told otherwise"


# --- tenants ---

ONE, TWO = b"1" * 16, b"2" * 16


def held(arena: Arena) -> set[BlockHash]:
    return {block_hash for block_hash, _ in arena.blocks()}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_tenant_at_his_quota_pays_with_his_own(policy: str) -> None:
    arena, arena_map = new_arena(8, policy)
    assert store(arena, arena_map, 20, 21, owner=Owner(TWO, 2)) == 2
    assert store(arena, arena_map, 10) == 1
    assert store(arena, arena_map, 1, 2, 3, owner=Owner(ONE, 3)) == 3
    assert arena.find(name(2)) is not None
    assert store(arena, arena_map, 4, 5, owner=Owner(ONE, 3)) == 2
    assert evicted(arena) == [name(3), name(1)], "the tail first, and not what was used since"
    assert held(arena) == {name(number) for number in (20, 21, 10, 2, 4, 5)}
    assert arena.num_free == 2, "there was room, but not for him"
    assert (arena.num_blocks_of(ONE), arena.num_blocks_of(TWO)) == (3, 2)


def test_a_chain_longer_than_the_quota_keeps_its_head() -> None:
    arena, arena_map = new_arena(8)
    owner = Owner(ONE, 3)
    items = arena.reserve([name(number) for number in range(5)], "w", owner=owner)
    assert [item is not None for item in items] == [True, True, True, False, False]
    assert arena.reserve([name(9)], "v", owner=owner) == [None], "what is being written counts, and none of it may go"
    assert arena.reserve([name(8)], "v", owner=Owner(TWO, 0)) == [None], "and it is no failure"
    arena.abandon("w")
    arena.check_integrity()
    assert arena.num_blocks_of(ONE) == 0
    assert store(arena, arena_map, 9, owner=owner) == 1
    assert store(arena, arena_map, 9, 1, 2, 3, 4, owner=owner) == 2 and name(9) in held(arena)


def test_readers_of_the_mapping_see_at_once_what_a_quota_took() -> None:
    arena, arena_map = new_arena(8)
    store(arena, arena_map, 1, 2, 3, owner=Owner(ONE, 3))
    (slot,) = (slot for block_hash, slot in arena.blocks() if block_hash == name(3))
    payload = arena_map.read(slot, name(3), 1)
    assert payload is not None
    assert store(arena, arena_map, 4, owner=Owner(ONE, 1)) == 1, "a smaller quota holds from the next write on"
    assert held(arena) == {name(4)} and arena.num_free == 7
    assert not payload.is_valid()
    assert len(evicted(arena)) == 3


def test_a_read_in_another_process_that_a_quota_sees_counts_for_eviction_too() -> None:
    arena, arena_map = new_arena(4)
    owner = Owner(ONE, 2)
    for number, whose in ((1, owner), (2, owner), (10, SHARED)):
        store(arena, arena_map, number, owner=whose)
    assert arena_map.read(dict(arena.blocks())[name(1)], name(1), now=7) is not None
    store(arena, arena_map, 3, owner=owner)
    assert evicted(arena) == [name(2)], "of his own, the one that nobody read"
    store(arena, arena_map, 11, 12)
    assert evicted(arena) == [name(10)]


def test_a_read_in_another_process_that_eviction_sees_counts_for_a_quota_too() -> None:
    arena, arena_map = new_arena(4)
    owner = Owner(ONE, 2)
    for number, whose in ((1, owner), (10, SHARED), (2, owner), (11, SHARED)):
        store(arena, arena_map, number, owner=whose)
    assert arena_map.read(dict(arena.blocks())[name(1)], name(1), now=7) is not None
    store(arena, arena_map, 12)
    assert evicted(arena) == [name(10)]
    store(arena, arena_map, 3, owner=owner)
    assert evicted(arena) == [name(2)]


def test_without_a_tenant_or_a_quota_there_is_no_bound() -> None:
    arena, arena_map = new_arena(6)
    assert store(arena, arena_map, 1, 2, 3, owner=Owner(NO_TENANT, 1)) == 3
    assert store(arena, arena_map, 4, 5, 6, owner=Owner(ONE)) == 3
    assert (arena.num_blocks_of(ONE), arena.num_blocks_of(NO_TENANT)) == (3, 0)


def test_what_a_bounded_tenant_loses_is_not_kept_elsewhere() -> None:
    for owner, is_kept in ((Owner(ONE, 2), False), (Owner(ONE), True), (SHARED, True)):
        arena, arena_map = new_arena(4)
        store(arena, arena_map, 1, owner=owner)
        store(arena, arena_map, 10, 11)
        assert arena.find(name(1)) is not None
        store(arena, arena_map, 12, 13, 14, 15)
        gone = {block.block_hash: block.is_admitted for block in arena.take_evicted()}
        assert gone[name(1)] is is_kept, owner


def test_books_do_not_believe_headers() -> None:
    arena, arena_map = new_arena(2)
    store(arena, arena_map, 1)
    (block,) = arena.blocks()
    arena_map._words[block[1] * 8 + 1] = FREE  # somebody scribbles
    assert arena.find(name(1)) == block[1]
    with pytest.raises(AssertionError, match="slot"):
        arena.check_integrity()


class ArenaMachine(RuleBasedStateMachine):
    """Writers, readers and deaths in any order. After each step the books balance, and what is readable is right."""

    writers = st.sampled_from(["a", "b", "c"])
    # A block's name says whose it is, as salted names do: 0 to 7 are nobody's, then come four of each tenant.
    numbers = st.one_of(*(st.lists(st.integers(*span), max_size=6) for span in ((0, 7), (8, 11), (12, 15))))

    @initialize(
        num_slots=st.integers(1, 6),
        policy=st.sampled_from(sorted(POLICIES)),
        quotas=st.lists(st.none() | st.integers(0, 4), min_size=2, max_size=2),
    )
    def start(self, num_slots: int, policy: str, quotas: list[int | None]) -> None:
        self.num_slots = num_slots
        self.quotas = dict(zip((ONE, TWO), quotas, strict=True))
        self.arena, self.map = new_arena(num_slots, policy)
        self.held: dict[str, list[tuple[BlockHash, Reservation]]] = {"a": [], "b": [], "c": []}
        self.copies: list[tuple[BlockHash, MappedPayload]] = []
        self.now = 0

    @rule(writer=writers, numbers=numbers)
    def reserve(self, writer: str, numbers: list[int]) -> None:
        hashes = [name(number) for number in numbers]
        before = held(self.arena)
        pending = {block_hash for held in self.held.values() for block_hash, _ in held}
        owner = self.owner_of(numbers[0]) if numbers else SHARED
        try:
            items = self.arena.reserve(hashes, writer, owner=owner)
        except ArenaFull:
            assert len(pending) == self.num_slots or before & set(hashes)
            assert held(self.arena) == before
            return
        for block_hash, item in zip(hashes, items, strict=True):
            if item is not None:
                assert block_hash not in before | pending
                pending.add(block_hash)
                self.held[writer].append((block_hash, item))
                self.map.view(item.slot)[: SLOT_BYTES // 2] = content(block_hash)[: SLOT_BYTES // 2]
        gone = evicted(self.arena)
        assert before - held(self.arena) == set(gone) and not before & set(gone) & set(hashes)
        if owner.tenant in self.quotas and len(before | pending) < self.num_slots:
            assert set(gone) <= self.names_of(owner.tenant), "where there is room, a quota takes from its own tenant"

    @rule(tenant=st.sampled_from([ONE, TWO]), quota=st.none() | st.integers(0, 4))
    def change_quota(self, tenant: bytes, quota: int | None) -> None:
        """Holds from the tenant's next write on, so he has none of the old one's blocks any more."""
        if not self.arena.num_blocks_of(tenant):
            self.quotas[tenant] = quota

    def owner_of(self, number: int) -> Owner:
        tenant = (NO_TENANT, NO_TENANT, ONE, TWO)[number // 4]
        return Owner(tenant, self.quotas.get(tenant))

    def names_of(self, tenant: bytes) -> set[BlockHash]:
        return {name(number) for number in range(16) if self.owner_of(number).tenant == tenant}

    @rule(writer=writers, data=st.data())
    def commit(self, writer: str, data: st.DataObject) -> None:
        done = data.draw(st.lists(st.sampled_from(self.held[writer]), unique=True)) if self.held[writer] else []
        for block_hash, item in done:
            self.map.view(item.slot)[:] = content(block_hash)
            self.held[writer].remove((block_hash, item))
        blocks = self.arena.commit(writer, [Written(item.slot, item.generation, 0) for _, item in done])
        assert blocks == [(block_hash, item.slot) for block_hash, item in done]

    @rule(writer=writers, slot=st.integers(0, 7), generation=st.integers(0, 9))
    def commit_nonsense(self, writer: str, slot: int, generation: int) -> None:
        if (slot, generation) not in {(item.slot, item.generation) for _, item in self.held[writer]}:
            assert self.arena.commit(writer, [Written(slot, generation, 0)]) == []

    @rule(writer=writers)
    def die(self, writer: str) -> None:
        assert self.arena.abandon(writer) == len(self.held[writer])
        self.held[writer] = []

    @rule(number=st.integers(0, 15), slot=st.integers(-1, 7))
    def read(self, number: int, slot: int) -> None:
        self.now += 1
        payload = self.map.read(slot, name(number), self.now)
        assert (payload is not None) == ((name(number), slot) in self.arena.blocks())
        if payload is not None:
            self.copies.append((name(number), payload))

    @rule(number=st.integers(0, 15))
    def find(self, number: int) -> None:
        assert self.arena.find(name(number)) == dict(self.arena.blocks()).get(name(number))

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check_integrity()
            assert self.arena.writers() == {writer for writer, held in self.held.items() if held}

    @invariant()
    def quotas_hold(self) -> None:
        if hasattr(self, "arena"):
            taken = held(self.arena) | {block_hash for held in self.held.values() for block_hash, _ in held}
            for tenant, quota in self.quotas.items():
                assert self.arena.num_blocks_of(tenant) == len(taken & self.names_of(tenant))
                assert quota is None or self.arena.num_blocks_of(tenant) <= quota

    @invariant()
    def what_is_valid_is_right(self) -> None:
        for block_hash, payload in getattr(self, "copies", []):
            copied = bytes(payload.view)
            assert not payload.is_valid() or copied == content(block_hash)


ArenaMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestArenaMachine = ArenaMachine.TestCase
