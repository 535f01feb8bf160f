"""The index of a mapped arena says what the arena's books say, whatever happened in between."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.arena import Arena, Written
from kvstore.arena_map import HEADER_BYTES, NO_KEY, ArenaMap, arena_bytes
from kvstore.blocks import BlockHash
from kvstore.errors import ArenaFull
from kvstore.slot_index import SlotIndex

SLOT_BYTES = 64


def names(numbers: list[int]) -> list[BlockHash]:
    return [BlockHash(bytes([number + 1]) * 16) for number in numbers]


def mapped(num_slots: int) -> tuple[ArenaMap, SlotIndex]:
    memory = memoryview(bytearray(arena_bytes(num_slots, SLOT_BYTES)))
    arena_map = ArenaMap(memory, num_slots, SLOT_BYTES)
    return arena_map, SlotIndex(arena_map, memory[: num_slots * HEADER_BYTES])


def test_a_block_is_found_once_it_is_committed() -> None:
    arena_map, index = mapped(4)
    arena, hashes = Arena(arena_map), names([0, 1, 2])
    reservations = [item for item in arena.reserve(hashes, "w") if item is not None]
    assert index.run(hashes) == []
    arena.commit("w", [Written(item.slot, item.generation, 0) for item in reservations[:2]])
    assert index.run(hashes) == [reservations[0].slot, reservations[1].slot]
    assert index.run(hashes[1:]) == [reservations[1].slot]
    assert index.run([]) == index.run(hashes[2:]) == []


OPERATIONS = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True)))


@given(OPERATIONS, st.integers(1, 5))
def test_the_index_follows_the_books(operations: list[tuple[bool, list[int]]], num_slots: int) -> None:
    arena_map, index = mapped(num_slots)
    arena = Arena(arena_map)
    for is_committed, numbers in operations:
        try:
            reservations = [item for item in arena.reserve(names(numbers), "w") if item is not None]
        except ArenaFull:
            continue
        if is_committed:
            arena.commit("w", [Written(item.slot, item.generation, 0) for item in reservations])
        elif len(numbers) % 2:
            arena.abandon("w")
        held = dict(arena.blocks())
        for block_hash in names(list(range(12))):
            assert index.run([block_hash]) == ([held[block_hash]] if block_hash in held else [])


def test_where_nothing_has_changed_nothing_is_looked_at() -> None:
    arena_map, index = mapped(4)
    arena, hashes = Arena(arena_map), names([0, 1])
    looks = Looks(index._generations)
    index._generations = looks  # type: ignore[assignment]
    for num_blocks in (1, 2):
        (item,) = (item for item in arena.reserve(hashes[:num_blocks], "w") if item is not None)
        arena.commit("w", [Written(item.slot, item.generation, 0)])
        for _ in range(3):
            assert len(index.run(hashes)) == num_blocks
        arena_map.finish(item.slot, item.generation, hashes[num_blocks - 1], 0)  # once more, as a store says it
        assert len(index.run(hashes)) == num_blocks
        assert arena_map.read(item.slot, hashes[num_blocks - 1], 7) is not None
        assert len(index.run(hashes)) == num_blocks == looks.count
    arena.evict(hashes[:1])
    assert index.run(hashes) == [] and looks.count == 3


class Looks:
    """Counts passes over the generations."""

    def __init__(self, generations: np.ndarray) -> None:
        self._generations = generations
        self.count = 0

    def copy(self) -> np.ndarray:
        self.count += 1
        return self._generations.copy()


STEPS = st.lists(st.tuples(st.sampled_from(["change", "tell", "again", "look"]), st.integers(0, 3)), max_size=40)
# A block that was seen is said once more behind another one that was not.
ONCE_MORE = [
    ("change", 0),
    ("change", 0),
    ("tell", 0),
    ("look", 0),
    ("change", 1),
    ("change", 1),
    ("tell", 1),
    ("again", 0),
]


@given(STEPS)
@example(ONCE_MORE)
def test_no_change_is_missed_whoever_tells_of_his_first(steps: list[tuple[str, int]]) -> None:
    """Writers beside each other: between a change and word of it, others change, tell and look."""
    arena_map, index = mapped(4)
    tell, untold, known = arena_map._changed, dict[int, int](), set[BlockHash]()
    arena_map._changed = untold.__setitem__  # type: ignore[method-assign]

    def change(slot: int) -> None:
        generation = arena_map.generation(slot)
        if generation % 2:
            block_hash = BlockHash(bytes([slot, generation]) * 8)
            known.add(block_hash)
            arena_map.finish(slot, generation, block_hash, 0)
        else:
            arena_map.begin(slot, NO_KEY)

    for step, slot in steps:
        if step == "look":
            index.run([])
        elif slot in untold:  # whoever changes a slot again has told of the last time
            tell(slot, untold.pop(slot))
        if step == "change":
            change(slot)
        block_hash = arena_map.name(slot)
        if step == "again" and block_hash is not None:  # as a store says it when it hears of a block
            arena_map.finish(slot, arena_map.generation(slot) - 1, block_hash, 0)
    for slot, generation in untold.items():
        tell(slot, generation)
    for block_hash in known:
        slots = [slot for slot in range(4) if arena_map.name(slot) == block_hash]
        assert index.slots([block_hash]) == (slots or [None])
