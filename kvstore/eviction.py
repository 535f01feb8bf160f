"""Which block to evict when room is needed, and which evicted blocks go to disk. Pure: no I/O, no clock.

A policy keeps the names of all blocks that may be evicted; the owner of the bytes asks it for a victim. Every call
takes amortised constant time: a sweep passes over blocks touched since the last one, and each touch pays for it.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)
K_contra = TypeVar("K_contra", bound=Hashable, contravariant=True)

MAX_USES = 3  # the most uses that S3-FIFO counts per block: two bits, as in the paper
GAP = 0.05  # of the capacity: uses within this many arrivals belong to the same request
_PROVEN = -1


def _never(_: object) -> bool:
    return False


class Eviction(Protocol[K]):
    """What the owner of the bytes tells a policy and asks of it. A key must not be inserted twice."""

    def insert(self, key: K) -> None:
        """The block is present and may be evicted."""
        ...

    def touch(self, key: K) -> None:
        """A present block was used."""
        ...

    def lend(self, key: K) -> None:
        """Another arena copies a present block: unless this copy is used again, it is evicted first.

        A block that was used a moment ago keeps its place: that is a hand-off within a request, and the next turn may
        well come here. Lend the tail of a chain last: it is evicted before the others.
        """
        ...

    def remove(self, key: K) -> None:
        """The owner dropped a present block for a reason of its own."""
        ...

    def victim(self, kept: Collection[K] = (), was_read: Callable[[K], bool] = _never) -> K | None:
        """Removes and returns the block to evict; None when there is none, or all are in `kept`.

        `was_read` reports, once each, uses for which `touch` was not called. Terminates however often it is true.
        """
        ...

    def __contains__(self, key: object) -> bool: ...

    def __iter__(self) -> Iterator[K]: ...

    def __len__(self) -> int: ...


class Admission(Protocol[K_contra]):
    """What an arena tells of its blocks, and asks of one that goes: whether it is worth a place on disk."""

    def came(self, keys: Iterable[K_contra]) -> None:
        """These came into the arena together."""
        ...

    def saw(self, key: K_contra) -> None:
        """Somebody asked for the block."""
        ...

    def admits(self, key: K_contra) -> bool:
        """Whether the block, which is evicted, is to be written to disk."""
        ...


class LRU(Generic[K]):
    """The block that was not used for longest goes first. One read in secret is put at the end, once a sweep."""

    def __init__(self, capacity: int = 0, gap: float = GAP) -> None:
        self._gap = int(capacity * gap)
        self._num_arrivals = 0
        self._keys: OrderedDict[K, int] = OrderedDict()  # least recently used first; arrivals at its last use

    def insert(self, key: K) -> None:
        self._num_arrivals += 1
        self._keys[key] = self._num_arrivals

    def touch(self, key: K) -> None:
        self._keys[key] = self._num_arrivals
        self._keys.move_to_end(key)

    def lend(self, key: K) -> None:
        if self._num_arrivals - self._keys[key] >= self._gap:
            self._keys.move_to_end(key, last=False)

    def remove(self, key: K) -> None:
        del self._keys[key]

    def victim(self, kept: Collection[K] = (), was_read: Callable[[K], bool] = _never) -> K | None:
        for is_last_sweep in (False, True):
            for _ in range(len(self._keys)):
                key, used_at = self._keys.popitem(last=False)
                if key not in kept and (is_last_sweep or not was_read(key)):
                    return key
                self._keys[key] = used_at
        return None

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(slots=True)
class _Uses:
    """How often a block was used since it came, or since S3-FIFO passed over it."""

    counted_at: int  # arrivals until then
    count: int = 0


class S3FIFO(Generic[K]):
    """S3-FIFO (Yang et al., SOSP 2023): a small queue for newcomers, a main one for those that proved themselves there.

    Most blocks are never used again and leave through the small queue without having pushed anything out of the main
    one. The names of those that left are remembered for a while: one that comes back goes to the main queue at once.

    Two things differ from the paper. The small queue has half of `capacity` and not a tenth, and names of four times
    as many blocks are remembered: a conversation's next turn takes minutes (docs/performance.md has the figures). And
    a touch counts only when a twentieth of `capacity` has come since the last one: prefill and decode of one request
    touch each block several times within seconds, which says nothing about the next request.
    """

    def __init__(self, capacity: int, small: float = 0.5, ghosts: float = 4.0, gap: float = GAP) -> None:
        self._small_size = max(1, int(capacity * small))
        self._max_ghosts = int(capacity * ghosts)
        self._gap = int(capacity * gap)
        self._num_arrivals = 0
        self._small: OrderedDict[K, _Uses] = OrderedDict()  # oldest first, as in both others
        self._main: OrderedDict[K, _Uses] = OrderedDict()
        self._ghosts: OrderedDict[K, None] = OrderedDict()

    def insert(self, key: K) -> None:
        self._num_arrivals += 1
        queue = self._small
        if key in self._ghosts:
            del self._ghosts[key]
            queue = self._main
        queue[key] = _Uses(self._num_arrivals)

    def touch(self, key: K) -> None:
        uses = self._small.get(key) or self._main[key]
        if self._num_arrivals - uses.counted_at >= self._gap:
            uses.counted_at = self._num_arrivals
            uses.count = min(uses.count + 1, MAX_USES)

    def lend(self, key: K) -> None:
        queue = self._small if key in self._small else self._main
        if self._num_arrivals - queue[key].counted_at >= self._gap:
            queue[key].count = 0
            queue.move_to_end(key, last=False)

    def remove(self, key: K) -> None:
        del (self._small if key in self._small else self._main)[key]

    def victim(self, kept: Collection[K] = (), was_read: Callable[[K], bool] = _never) -> K | None:
        for _ in range(len(self._small) + (MAX_USES + 2) * len(self)):
            key = self._look(kept, was_read)
            if key is not None:
                return key
        key = next((key for key in self if key not in kept), None)  # all blocks are being read continuously
        if key is not None:
            self.remove(key)
        return key

    def _look(self, kept: Collection[K], was_read: Callable[[K], bool]) -> K | None:
        """Looks at one block: it goes, or it is put at the end of the main queue."""
        is_new = len(self._small) >= self._small_size or not self._main
        key, uses = (self._small if is_new else self._main).popitem(last=False)
        uses.count += was_read(key)
        if key not in kept and uses.count <= is_new:  # a new block's single use may be its hand-off
            if is_new:
                self._remember(key)
            return key
        uses.count = 0 if is_new else max(0, min(uses.count, MAX_USES) - 1)
        self._main[key] = uses
        return None

    def _remember(self, key: K) -> None:
        self._ghosts[key] = None
        if len(self._ghosts) > self._max_ghosts:
            self._ghosts.popitem(last=False)

    def __contains__(self, key: object) -> bool:
        return key in self._small or key in self._main

    def __iter__(self) -> Iterator[K]:
        return itertools.chain(self._small, self._main)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)


class SecondTouch(Generic[K]):
    """Which blocks are worth writing to disk: those that were asked for again after a while.

    Three of four blocks never are. A block that was evicted meanwhile counts as well, as long as its name is
    remembered. What follows within a twentieth of `capacity` arrivals belongs to the same request (see `S3FIFO`).
    """

    def __init__(self, capacity: int, names: float = 8.0, gap: float = GAP) -> None:
        self._max_names = max(1, int(capacity * names))
        self._gap = max(1, int(capacity * gap))
        self._num_arrivals = 0
        self._names: OrderedDict[K, int] = OrderedDict()  # arrivals when first seen, or _PROVEN

    def came(self, keys: Iterable[K]) -> None:
        """These came into the cache together. For none of them does the time count that the others took."""
        together = list(keys)
        self._num_arrivals += len(together)
        for key in together:
            self.saw(key)

    def saw(self, key: K) -> None:
        """Somebody asked for the block."""
        first = self._names.setdefault(key, self._num_arrivals)
        if first != _PROVEN and self._num_arrivals - first >= self._gap:
            self._names[key] = _PROVEN
        if len(self._names) > self._max_names:
            self._names.popitem(last=False)

    def admits(self, key: K) -> bool:
        return self._names.get(key) == _PROVEN


class AdmitAll(Generic[K]):
    """All that is evicted: the default. Who gives a cluster a disk wants hits.

    Most blocks are asked for again once or never, so with `SecondTouch` the disk has few of those that are: on a real
    trace (docs/performance.md) it hits 1.7 to 42 times as often with all. The price is 5 to 10 times as many writes,
    all of them behind: what a disk cannot keep up with is lost, and nobody waits for it. Where its wear or bandwidth
    is dear, `SecondTouch` is the choice.
    """

    def __init__(self, capacity: int = 0) -> None:
        pass

    def came(self, keys: Iterable[K]) -> None:
        pass

    def saw(self, key: K) -> None:
        pass

    def admits(self, key: K) -> bool:
        return True


# By name, made from a capacity.
ADMISSIONS: dict[str, Callable[[int], Admission[Any]]] = {"all": AdmitAll, "second-touch": SecondTouch}
POLICIES: dict[str, Callable[[int], Eviction[Any]]] = {"lru": LRU, "s3fifo": S3FIFO}
