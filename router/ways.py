"""How nodes can obtain the leading blocks of a prompt, in columns: blocks they hold, fetch, or will have computed.

A thousand nodes may hold the same system prompt, so nothing here loops over hits more than once. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter

import numpy as np

from router.cluster import Cluster, Column
from router.hits import Hit
from router.plan import Rates, RequestView

_NUM_BLOCKS, _NUM_DISK_BLOCKS = attrgetter("num_blocks"), attrgetter("num_disk_blocks")


class Held:
    """The leading runs that arenas hold, one entry per arena."""

    def __init__(self, hits: Mapping[str, Hit], cluster: Cluster) -> None:
        self._cluster, count = cluster, len(hits)
        self._arenas = cluster.arena_numbers(hits)
        self._blocks = np.fromiter(map(_NUM_BLOCKS, hits.values()), np.float64, count)
        self._disk = np.fromiter(map(_NUM_DISK_BLOCKS, hits.values()), np.float64, count)

    def cut(self, num_blocks: int) -> None:
        """Keeps the part before this block. The end of each run is what is on disk."""
        beyond = np.maximum(self._blocks - num_blocks, 0.0)
        self._blocks -= beyond
        self._disk = np.maximum(self._disk - beyond, 0.0)

    def leave_disks(self) -> None:
        """Keeps the part that is in memory."""
        self._blocks -= self._disk
        self._disk = np.zeros(len(self._disk))

    @property
    def has_disk(self) -> bool:
        return bool(self._disk.any())

    def longest(self) -> tuple[float, float]:
        """The longest run, and how much of it is on disk; among equals, the one with most in memory."""
        if not len(self._blocks):
            return 0.0, 0.0
        most = self._blocks.max()
        return float(most), float(self._disk[self._blocks == most].min())

    def own(self) -> tuple[Column, Column]:
        """The run that each row's own arena holds, and how much of it is on disk."""
        return self._by_row(self._blocks), self._by_row(self._disk)

    def _by_row(self, values: Column) -> Column:
        by_arena = np.zeros(self._cluster.num_arena_numbers)
        by_arena[self._arenas] = values
        by_arena[0] = 0.0  # for arenas that no node maps, and nodes that map none
        return by_arena[self._cluster.arena_number]


def ways(request: RequestView, cluster: Cluster, rates: Rates, may_fetch: bool) -> Iterator[tuple[Column, Column]]:
    """The ways in which each node can obtain a leading run: (its length, seconds to fetch it)."""
    most = (request.num_tokens - 1) // cluster.block_size  # the last token is computed in any case
    held = Held(request.hits, cluster)
    held.cut(most)
    if held.has_disk:
        yield from _fetches(held, cluster, rates, may_fetch)
        held.leave_disks()
    yield from _fetches(held, cluster, rates, may_fetch)
    if request.warming:  # after those that it is already computing there is nothing to fetch
        warm = np.zeros(len(cluster.node_ids) + 1)  # the last entry: for nodes that have left
        warm[cluster.rows(request.warming)] = np.minimum(list(request.warming.values()), most)
        warm = warm[:-1]
        yield warm, np.zeros(len(warm))


def _fetches(held: Held, cluster: Cluster, rates: Rates, may_fetch: bool) -> Iterator[tuple[Column, Column]]:
    """From its own arena, and then from others. Blocks on disk, here or there, must be read first."""
    block_bytes = cluster.block_bytes
    disk_s = block_bytes / rates.disk_bytes_per_s
    own, own_disk = held.own()
    near_s = own * (block_bytes / rates.memory_bytes_per_s) + own_disk * disk_s
    yield own, near_s
    best, best_disk = held.longest()
    if may_fetch and best > own.min(initial=best):
        far = best - own
        far_s = far * (block_bytes / rates.wire_bytes_per_s) + np.minimum(far, best_disk) * disk_s
        yield np.full(len(own), best), near_s + far_s
