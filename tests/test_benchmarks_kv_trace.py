"""The replay says what an arena would: same policy, same calls. And Belady is the best there is."""

from __future__ import annotations

import random

import pytest

from benchmarks.kv_trace import Cache, Disk, Trace, belady_hits, replay
from kvstore.arena import Arena, Written
from kvstore.arena_map import ArenaMap, arena_bytes
from kvstore.blocks import BlockHash
from kvstore.eviction import POLICIES, AdmitAll, SecondTouch


def conversations(seed: int, num_requests: int = 300) -> Trace:
    """Prompts that go on where an earlier one ended, or begin anew behind one shared block."""
    generator, trace, names = random.Random(seed), [[0]], iter(range(1, 1 << 30))
    for _ in range(num_requests):
        head = generator.choice(trace[-20:]) if generator.random() < 0.6 else [0]
        trace.append([*head, *(next(names) for _ in range(generator.randrange(4)))][:12])
    return trace


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_an_arena_hits_as_often(policy: str) -> None:
    trace, num_slots = conversations(1), 40
    arena_map = ArenaMap(memoryview(bytearray(arena_bytes(num_slots, 8))), num_slots, 8)
    arena = Arena(arena_map, POLICIES[policy](num_slots))
    num_hits = 0
    for now, blocks in enumerate(trace, 1):
        hashes, slots = [BlockHash(block.to_bytes(16, "little")) for block in blocks], dict(arena.blocks())
        for block_hash in hashes:
            if block_hash not in slots:
                break
            num_hits += arena_map.read(slots[block_hash], block_hash, now) is not None
        written = [Written(item.slot, item.generation, 0) for item in arena.reserve(hashes, "w") if item]
        arena.commit("w", written)
    assert num_hits == replay(trace, policy, num_slots, has_hand_off=False).num_hits > 0


def test_belady_is_never_beaten() -> None:
    for seed in range(5):
        trace = conversations(seed)
        for capacity in (12, 30, 100, 1000):
            best = belady_hits(trace, capacity)
            assert all(replay(trace, name, capacity).num_hits <= best for name in POLICIES)
    assert replay(trace, "lru", 10_000).num_hits == belady_hits(trace, 10_000)


def test_belady_by_hand() -> None:
    assert belady_hits([[1], [2], [3], [1], [2], [3]], 1) == 1
    assert belady_hits([[1], [2], [3], [1], [2], [3]], 2) == 2


def test_a_disk_turns_evictions_into_hits() -> None:
    trace = conversations(2)
    greedy, choosy = Disk(400, AdmitAll()), Disk(400, SecondTouch(20))
    for disk in (greedy, choosy):
        cache: Cache = replay(trace, "lru", 20, disk)
        assert disk.num_hits and cache.num_hits + disk.num_hits <= belady_hits(trace, 10_000)
    assert choosy.num_writes < greedy.num_writes
