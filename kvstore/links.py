"""How fast blocks come from each arena, measured on those that came, and what is in flight. Pure: times are passed in.

The mapped arena is a link too: there, the copy into the reader's memory takes the time. So is the disk behind an
arena, even the mapped one: its blocks come over the wire like another machine's, and later than those in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore.directory import ON_DISK

HALF_LIFE_BYTES = 64 * 2**20
# After this long without use a link counts as unknown; otherwise a link once slow would never be measured again.
MEMORY_S = 30.0


def link_of(place: tuple[str, int]) -> str:
    """The name of the link that brings a block from a place: (arena id, slot)."""
    arena_id, slot = place
    return f"{arena_id}/disk" if slot == ON_DISK else arena_id


@dataclass(frozen=True)
class Stretch:
    """Consecutive blocks that come over one link."""

    num_blocks: int
    bytes_per_s: float = 0.0  # of the link; 0.0: unknown
    in_flight_bytes: int = 0  # that it has to deliver first


@dataclass
class Traffic:
    """Sums over all that came; subtract two readings for a rate."""

    num_blocks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0  # while something was in flight


class Link:
    """One source of blocks. It transfers one thing after the other, so time spent queueing is not part of its speed."""

    def __init__(self) -> None:
        self.in_flight_bytes = 0
        self.used_at_s = 0.0
        self._bytes = 0.0
        self._seconds = 0.0

    def bytes_per_s(self, now_s: float) -> float:
        """A moving average, 0.0 if unknown. It is weighted by bytes: small transfers say little about large ones."""
        is_known = self._seconds > 0.0 and now_s - self.used_at_s < MEMORY_S
        return self._bytes / self._seconds if is_known else 0.0

    def begin(self, num_bytes: int) -> None:
        """`num_bytes` have been requested."""
        self.in_flight_bytes += num_bytes

    def end(self, num_bytes: int, arrived_bytes: int, began_s: float, ended_s: float) -> float:
        """Of `num_bytes` requested, `arrived_bytes` came; returns the seconds that the link was busy with them alone.

        A transfer that brought nothing is not a measurement.
        """
        self.in_flight_bytes -= num_bytes
        if not arrived_bytes:
            return 0.0
        if ended_s - self.used_at_s >= MEMORY_S:
            self._bytes = self._seconds = 0.0
        seconds = max(1e-9, ended_s - max(began_s, self.used_at_s))
        keep = 0.5 ** (arrived_bytes / HALF_LIFE_BYTES)
        self._bytes = self._bytes * keep + arrived_bytes
        self._seconds = self._seconds * keep + seconds
        self.used_at_s = max(self.used_at_s, ended_s)
        return seconds


@dataclass(frozen=True)
class Transfer:
    """Blocks in flight over one link."""

    link: Link
    traffic: Traffic
    num_blocks: int
    slot_bytes: int

    def end(self, num_arrived: int, began_s: float, ended_s: float) -> None:
        """`num_arrived` of them came, between these two moments."""
        num_bytes = num_arrived * self.slot_bytes
        self.traffic.seconds += self.link.end(self.num_blocks * self.slot_bytes, num_bytes, began_s, ended_s)
        self.traffic.num_blocks += num_arrived
        self.traffic.num_bytes += num_bytes


class Links:
    """All links of one reader, by name (`link_of`), and what came over them."""

    def __init__(self, slot_bytes: int, clock: Callable[[], float]) -> None:
        self.local = Traffic()
        self.remote = Traffic()
        self._slot_bytes = slot_bytes
        self._clock = clock
        self._links: dict[str, Link] = {}

    def begin(self, name: str, num_blocks: int, is_local: bool = False) -> Transfer:
        """`num_blocks` have been requested; `Transfer.end` must follow."""
        link = self._link(name)
        link.begin(num_blocks * self._slot_bytes)
        return Transfer(link, self.local if is_local else self.remote, num_blocks, self._slot_bytes)

    def stretches(self, places: Sequence[tuple[str, int]]) -> list[Stretch]:
        """The links that would bring blocks from these places (arena id, slot), one place per block."""
        stretches: list[Stretch] = []
        last = None
        for name in map(link_of, places):
            if name == last:
                stretches[-1] = replace(stretches[-1], num_blocks=stretches[-1].num_blocks + 1)
                continue
            link = self._link(name)
            stretches.append(Stretch(1, link.bytes_per_s(self._clock()), link.in_flight_bytes))
            last = name
        return stretches

    def _link(self, name: str) -> Link:
        link = self._links.get(name)
        if link is None:
            now_s = self._clock()
            idle = [
                other_name
                for other_name, other in self._links.items()
                if not other.in_flight_bytes and now_s - other.used_at_s >= MEMORY_S
            ]
            for other_name in idle:  # what they knew is forgotten anyway
                del self._links[other_name]
            link = self._links[name] = Link()
        return link
