"""When a node will have computed everything it was given: what it reported, and what was sent since. Pure.

The moment is absolute, so the remaining work shrinks by itself while the node works.
"""

from __future__ import annotations

from bisect import bisect_left, insort_right
from operator import attrgetter

from router.line import Line, Waiting, key

_KEY = attrgetter("key")


class Backlog:
    """The prefill work of one node, in seconds of its own time."""

    def __init__(self) -> None:
        self._reported_free_at_s = 0.0
        self._sent: dict[object, tuple[float, float]] = {}  # leg -> (when, seconds), if no report includes it yet
        self._begun: object = None  # the leg being computed, according to the node's order
        self._keys: dict[object, float] = {}  # of all other legs that were sent and are not over
        # Those legs, kept in order: a node may have hundreds, and their line is read for each request.
        self._ranked: list[Waiting] = []

    def reported(self, now_s: float, queued_s: float) -> None:
        """The node reported that at `now_s` it had `queued_s` of work, including the `sent` legs it had received."""
        self._reported_free_at_s = now_s + queued_s

    def sent(self, leg: object, now_s: float, seconds: float) -> None:
        """A leg was sent that will compute for `seconds`."""
        self._sent[leg] = (now_s, seconds)
        if self._begun is None:
            self._begun = leg
            return
        waiting = Waiting(key(seconds, now_s), seconds, leg)
        self._keys[leg] = waiting.key
        insort_right(self._ranked, waiting, key=_KEY)  # equals in order of arrival

    def counted(self, leg: object) -> None:
        """The node's report includes the leg. Idempotent."""
        self._sent.pop(leg, None)

    def over(self, leg: object) -> None:
        """The leg is over, computed or not. Idempotent."""
        self._sent.pop(leg, None)
        rank = self._keys.pop(leg, None)
        if rank is not None:
            place = bisect_left(self._ranked, rank, key=_KEY)
            while self._ranked[place].leg != leg:
                place += 1
            del self._ranked[place]
        elif leg == self._begun:
            self._begin_next()

    def computed(self, leg: object, now_s: float) -> None:
        """The leg is done: the node was busy until now, and has begun nothing that was sent after it."""
        if self._sent.pop(leg, None) is not None:
            self._reported_free_at_s = max(self._reported_free_at_s, now_s)
        self.over(leg)

    def free_at_s(self) -> float:
        """When all of it is computed; in the past if there is nothing."""
        free_at_s = self._reported_free_at_s
        for sent_s, seconds in self._sent.values():  # in the order of sending
            free_at_s = max(free_at_s, sent_s) + seconds
        return free_at_s

    def line(self) -> Line | None:
        """The legs that wait behind the one being computed; None: none that was sent from here."""
        return Line(self._ranked) if self._ranked else None

    def _begin_next(self) -> None:
        """The node continues with the next leg in its queue."""
        self._begun = None
        if self._ranked:
            self._begun = self._ranked.pop(0).leg
            del self._keys[self._begun]
