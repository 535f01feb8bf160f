"""The index of a mapped arena says what the arena's books say, whatever happened in between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.arena import Arena, Written
from kvstore.arena_map import HEADER_BYTES, ArenaMap, arena_bytes
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
