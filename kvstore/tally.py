"""A store's counters: requests, hits, misses and evictions of each tier, and the gaps between uses. Pure: the
clock is passed in.

One set of sums with two readers: Prometheus (`kvstore.metrics`) and operators (`kvstore.admin`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from kvstore.blocks import BlockHash

MEMORY, DISK = "memory", "disk"
TIERS = (MEMORY, DISK)  # the faster first
CONTROL, DATA = "control", "data"
GAP_BOUNDS_S = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
MAX_NAMES = 50_000  # blocks whose last use, or eviction, is remembered: at most 10 MB
_LOG_EVERY_S = 1.0

V = TypeVar("V")


@dataclass
class Gaps:
    """A histogram of seconds: counts of values up to each bound and above the one before; the last is the rest."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(GAP_BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, gap_s: float) -> None:
        self.counts[bisect_left(GAP_BOUNDS_S, gap_s)] += 1
        self.total_s += gap_s


@dataclass
class TierTally:
    """Sums of one tier. A block that is not in memory is looked up on disk, and counts as a miss of memory first."""

    num_hits: int = 0  # blocks sent to readers
    num_misses: int = 0  # blocks that readers requested and were not here
    num_evicted: int = 0  # to make room
    num_removed: int = 0  # by an operator
    reuse: Gaps = field(default_factory=Gaps)  # between two uses of a block that is here
    evict_to_reuse: Gaps = field(default_factory=Gaps)  # between a block's eviction and the next request for it


@dataclass(slots=True)
class Uses:
    """What is known of one block's uses."""

    at_s: float  # of the last one
    num_reads: int = 0  # over the wire


class StoreTally:
    """The sums of one store. `clock` gives seconds, and is the one that stamps the slots: reads of mapped slots leave
    a stamp and nothing else, and `stamped` tells of those that somebody looks at.
    """

    def __init__(self, clock: Callable[[], float], max_names: int = MAX_NAMES) -> None:
        self._clock = clock
        self._max_names = max_names
        self._began_s = clock()
        self._uses: OrderedDict[BlockHash, Uses] = OrderedDict()
        self._gone: dict[str, OrderedDict[BlockHash, float]] = {tier: OrderedDict() for tier in TIERS}  # since when
        self._logged_s = float("-inf")
        self._num_unlogged = 0
        self.tiers = {tier: TierTally() for tier in TIERS}
        self.num_demoted = 0  # blocks written to disk
        self.num_promoted = 0  # blocks brought back from there
        self.num_committed = 0
        self.num_mapped_reads = 0  # as far as seen
        self.num_full = 0  # reservations refused because every slot was being written
        self.num_draining = 0  # reservations refused because of a drain
        self.num_reaped = 0  # writers that died with slots of theirs not committed
        self.refused_frames = {CONTROL: 0, DATA: 0}

    @property
    def uptime_s(self) -> float:
        return self._clock() - self._began_s

    def uses(self, block_hash: BlockHash) -> Uses | None:
        """None for a block that is unknown, or forgotten."""
        return self._uses.get(block_hash)

    def age_s(self, uses: Uses) -> float:
        return self._clock() - uses.at_s

    def came(self, hashes: Iterable[BlockHash]) -> None:
        """Writers committed these blocks."""
        now_s = self._clock()
        for block_hash in hashes:
            self.num_committed += 1
            self._remember(self._uses, block_hash, Uses(now_s))

    def read(self, block_hash: BlockHash, tier: str) -> None:
        """A block was sent to a reader, from `tier`."""
        for other in TIERS[: TIERS.index(tier)]:
            self.tiers[other].num_misses += 1
        self.tiers[tier].num_hits += 1
        self.asked(block_hash, tier)
        self._uses[block_hash].num_reads += 1

    def missed(self, block_hash: BlockHash, has_disk: bool) -> None:
        """A reader asked for a block that is not here."""
        for tier in TIERS if has_disk else (MEMORY,):
            self.tiers[tier].num_misses += 1
        self.asked(block_hash, None)

    def asked(self, block_hash: BlockHash, tier: str | None) -> None:
        """A reader or writer asked for a block, which is in `tier`, or nowhere (None)."""
        now_s = self._clock()
        for other in TIERS:
            if other == tier:
                break
            gone_s = self._gone[other].pop(block_hash, None)
            if gone_s is not None:
                self.tiers[other].evict_to_reuse.add(now_s - gone_s)
        if tier is not None:
            self._use(block_hash, tier, now_s)

    def stamped(self, block_hash: BlockHash, stamp_ns: int) -> None:
        """A slot bears this stamp: a process read it through the mapping then; before the last use, another block."""
        uses, at_s = self._uses.get(block_hash), stamp_ns / 1e9
        if uses is not None and uses.at_s < at_s <= self._clock():
            self.num_mapped_reads += 1
            self._use(block_hash, MEMORY, at_s)

    def lost(self, blocks: Iterable[tuple[BlockHash, int]]) -> None:
        """Blocks were evicted from slots that bear these stamps."""
        for block_hash, stamp_ns in blocks:
            self.stamped(block_hash, stamp_ns)
            self.evicted(block_hash, MEMORY)

    def evicted(self, block_hash: BlockHash, tier: str) -> None:
        """A block was evicted to make room."""
        self.tiers[tier].num_evicted += 1
        self._remember(self._gone[tier], block_hash, self._clock())

    def removed(self, hashes: Iterable[BlockHash], tier: str) -> None:
        """An operator removed these blocks, so a later request for one says nothing about the eviction policy."""
        for block_hash in hashes:
            self.tiers[tier].num_removed += 1
            self._uses.pop(block_hash, None)

    def refused(self, socket: str) -> int:
        """A frame was refused. Returns how many to report in the log now, as they may come by the million."""
        self.refused_frames[socket] += 1
        self._num_unlogged += 1
        now_s = self._clock()
        if now_s - self._logged_s < _LOG_EVERY_S:
            return 0
        self._logged_s = now_s
        num_frames, self._num_unlogged = self._num_unlogged, 0
        return num_frames

    def _use(self, block_hash: BlockHash, tier: str, at_s: float) -> None:
        uses = self._uses.get(block_hash)
        if uses is None:
            self._remember(self._uses, block_hash, Uses(at_s))
            return
        self.tiers[tier].reuse.add(at_s - uses.at_s)
        uses.at_s = at_s

    def _remember(self, names: OrderedDict[BlockHash, V], block_hash: BlockHash, value: V) -> None:
        names[block_hash] = value
        names.move_to_end(block_hash)
        if len(names) > self._max_names:
            names.popitem(last=False)
