"""Fetch blocks or compute them: predicts the seconds of both, and chooses the faster. Pure: no clock, I/O or state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.links import Stretch


@dataclass(frozen=True)
class Choice:
    """Fetch the leading `num_blocks`, compute the rest. The seconds are those of fetching, or computing, all blocks."""

    num_blocks: int
    fetch_s: float
    compute_s: float
    is_informed: bool  # all speeds were known


def choose(stretches: Sequence[Stretch], block_bytes: int, block_compute_s: float) -> Choice:
    """How many of the blocks of `stretches`, in this order, are better fetched. `block_compute_s` 0.0: unknown.

    A link first delivers what is already in flight, so within a stretch it is all or nothing. The unknown is tried: an
    unmeasured link costs nothing, and with an unmeasured engine everything is fetched.
    """
    fetch_s = [_fetch_s(stretch, block_bytes) for stretch in stretches]
    ends = [0]
    for stretch in stretches:
        ends.append(ends[-1] + stretch.num_blocks)
    total = ends[-1]
    # Seconds if the first `index` stretches are fetched; among equals, the longest fetch.
    costs = [(sum(fetch_s[:index]) + (total - end) * block_compute_s, -end) for index, end in enumerate(ends)]
    num_blocks = -min(costs)[1] if block_compute_s else total
    is_informed = block_compute_s > 0.0 and all(stretch.bytes_per_s for stretch in stretches)
    return Choice(num_blocks, sum(fetch_s), total * block_compute_s, is_informed)


def _fetch_s(stretch: Stretch, block_bytes: int) -> float:
    if not stretch.bytes_per_s:
        return 0.0
    return (stretch.in_flight_bytes + stretch.num_blocks * block_bytes) / stretch.bytes_per_s
