"""Fetch or compute: the sooner, and what is unknown is tried."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.links import Stretch
from node.choice import choose

BLOCK = 1000  # bytes


def test_the_sooner_one() -> None:
    fast, slow = Stretch(4, bytes_per_s=100_000.0), Stretch(4, bytes_per_s=1000.0)
    choice = choose([fast], BLOCK, block_compute_s=0.1)
    assert (choice.num_blocks, choice.fetch_s, choice.compute_s, choice.is_informed) == (4, 0.04, 0.4, True)
    assert choose([slow], BLOCK, block_compute_s=0.1).num_blocks == 0
    assert choose([fast, slow], BLOCK, block_compute_s=0.1).num_blocks == 4, "what is near, and not what is far"
    assert choose([slow, fast], BLOCK, block_compute_s=0.1).num_blocks == 0
    assert choose([slow, fast], BLOCK, block_compute_s=0.8).num_blocks == 8, "what lies behind makes up for it"


def test_what_is_on_its_way_counts() -> None:
    assert choose([Stretch(2, 10_000.0)], BLOCK, 0.15).num_blocks == 2
    assert choose([Stretch(2, 10_000.0, in_flight_bytes=5000)], BLOCK, 0.15).num_blocks == 0
    assert choose([Stretch(8, 10_000.0, in_flight_bytes=3000)], BLOCK, 0.15).num_blocks == 8


def test_what_is_unknown_is_tried() -> None:
    for stretches, block_compute_s in ([[Stretch(3)], 1e-9], [[Stretch(3, 1.0)], 0.0], [[Stretch(3)], 0.0]):
        choice = choose(stretches, BLOCK, block_compute_s)
        assert choice.num_blocks == 3 and not choice.is_informed
    assert choose([Stretch(2, 1.0), Stretch(5)], BLOCK, 0.1).num_blocks == 0
    assert choose([], BLOCK, 0.1).num_blocks == 0


def test_ties_fetch() -> None:
    assert choose([Stretch(4, 10_000.0)], BLOCK, block_compute_s=0.1).num_blocks == 4


STRETCHES = st.lists(
    st.builds(Stretch, st.integers(1, 50), st.sampled_from([0.0, 1e3, 1e6, 1e9]), st.integers(0, 10**6)), max_size=5
)


@given(STRETCHES, st.sampled_from([0.0, 1e-6, 1e-3, 1.0]))
def test_ends_between_stretches_and_costs_no_more_than_either(stretches: list[Stretch], block_compute_s: float) -> None:
    choice = choose(stretches, BLOCK, block_compute_s)
    ends = [sum(stretch.num_blocks for stretch in stretches[:index]) for index in range(len(stretches) + 1)]
    assert choice.num_blocks in ends
    rest = stretches[ends.index(choice.num_blocks) :]
    kept = stretches[: ends.index(choice.num_blocks)]
    cost = choose(kept, BLOCK, 0.0).fetch_s + choose(rest, BLOCK, block_compute_s).compute_s
    if block_compute_s:
        assert cost <= min(choice.fetch_s, choice.compute_s) * (1 + 1e-9)
