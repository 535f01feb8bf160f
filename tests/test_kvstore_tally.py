"""What a store counts: by tier, with gaps between uses, and a memory of names that is bounded."""

from __future__ import annotations

from kvstore_support import chain

from kvstore.tally import CONTROL, DATA, DISK, GAP_BOUNDS_S, MEMORY, Gaps, StoreTally


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


A, B, C = chain(0, 3)


def tally_of(max_names: int = 100) -> tuple[StoreTally, Clock]:
    clock = Clock()
    return StoreTally(clock, max_names), clock


def test_gaps_lie_at_or_below_their_bound() -> None:
    gaps = Gaps()
    for gap_s in (0.0, 0.1, 0.2, 60.0, 1e9):
        gaps.add(gap_s)
    assert len(gaps.counts) == len(GAP_BOUNDS_S) + 1
    assert gaps.counts[0] == 2 and gaps.counts[1] == 1 and gaps.counts[4] == 1 and gaps.counts[-1] == 1
    assert gaps.total_s == 1e9 + 60.3


def test_reads_count_by_the_tier_that_had_the_block() -> None:
    tally, clock = tally_of()
    tally.came([A, B])
    clock.now_s += 2.0
    tally.read(A, MEMORY)
    tally.read(B, DISK)
    tally.missed(C, has_disk=True)
    memory, disk = tally.tiers[MEMORY], tally.tiers[DISK]
    assert (memory.num_hits, memory.num_misses) == (1, 2), "what the disk had is a miss of memory"
    assert (disk.num_hits, disk.num_misses) == (1, 1)
    assert memory.reuse.total_s == disk.reuse.total_s == 2.0
    uses = tally.uses(A)
    assert uses is not None and uses.num_reads == 1 and tally.age_s(uses) == 0.0
    tally.missed(C, has_disk=False)
    assert disk.num_misses == 1, "there is none"


def test_from_eviction_to_the_next_question_for_it() -> None:
    tally, clock = tally_of()
    tally.came([A, B, C])
    tally.lost([(A, 0), (B, 0)])
    clock.now_s += 7.0
    tally.asked(A, None)
    tally.asked(B, DISK)
    tally.asked(A, None)
    memory = tally.tiers[MEMORY]
    assert memory.num_evicted == 2
    assert sum(memory.evict_to_reuse.counts) == 2, "once for each eviction"
    assert memory.evict_to_reuse.total_s == 14.0
    tally.evicted(B, DISK)
    clock.now_s += 1.0
    tally.missed(B, has_disk=True)
    assert tally.tiers[DISK].evict_to_reuse.total_s == 1.0


def test_stamps_are_uses_when_they_are_news() -> None:
    tally, clock = tally_of()
    tally.came([A])
    clock.now_s += 10.0
    tally.stamped(A, int(990.0 * 1e9))  # of the block that had the slot before
    tally.stamped(A, 2**64 - 1)  # anybody may write to a mapped header
    tally.stamped(B, int(1004.0 * 1e9))  # not known
    assert tally.num_mapped_reads == 0
    tally.stamped(A, int(1004.0 * 1e9))
    tally.stamped(A, int(1004.0 * 1e9))
    assert tally.num_mapped_reads == 1
    assert tally.tiers[MEMORY].reuse.total_s == 4.0


def test_what_an_operator_removes_is_no_eviction() -> None:
    tally, clock = tally_of()
    tally.came([A])
    tally.removed([A], MEMORY)
    clock.now_s += 5.0
    tally.asked(A, None)
    memory = tally.tiers[MEMORY]
    assert (memory.num_removed, memory.num_evicted, sum(memory.evict_to_reuse.counts)) == (1, 0, 0)
    assert tally.uses(A) is None


def test_names_are_bounded() -> None:
    tally, _ = tally_of(max_names=10)
    names = chain(500, 200)
    tally.came(names)
    tally.lost((name, 0) for name in names)
    assert len(tally._uses) == 10 and len(tally._gone[MEMORY]) == 10
    for name in names:
        tally.asked(name, None)
    assert sum(tally.tiers[MEMORY].evict_to_reuse.counts) == 10


def test_refused_frames_are_all_counted_and_told_once_a_second() -> None:
    tally, clock = tally_of()
    assert [tally.refused(DATA) for _ in range(5)] == [1, 0, 0, 0, 0]
    clock.now_s += 1.5
    assert [tally.refused(CONTROL), tally.refused(DATA)] == [5, 0]
    assert tally.refused_frames == {CONTROL: 1, DATA: 6}
