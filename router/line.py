"""Where a new prompt goes in a node's prefill queue: shortest first with ageing, as in `engine/order.py`. Pure.

A prompt's rank falls while it waits, and the ranks of two waiting prompts fall alike. So which of them goes first is
known when they are sent, by a key made of a prompt's seconds of work and the moment it was sent.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

AGEING = 0.05  # as engine.order has it; router and engine do not import each other

SHORTEST_S, LONGEST_S = 1 / 64, 256.0  # range of prompts told apart by length; each class is twice as long
_EDGES_S = tuple(SHORTEST_S * 2**n for n in range(round(math.log2(LONGEST_S / SHORTEST_S)) + 1))


class Waiting(NamedTuple):
    """A first leg that was sent and has not begun. The smallest key goes first."""

    key: float
    work_s: float
    leg: object = None


def key(work_s: float, sent_s: float) -> float:
    """The key by which waiting legs are ordered."""
    return work_s + AGEING * sent_s


class Line:
    """The legs waiting for one node, in order."""

    def __init__(self, ranked: Sequence[Waiting]) -> None:
        self._keys = [one.key for one in ranked]
        self._until_s = [0.0, *itertools.accumulate([one.work_s for one in ranked])]

    def overtaken_s(self, newcomer: float) -> float:
        """Seconds of waiting work that a newcomer with this key overtakes."""
        return self._until_s[-1] - self._until_s[bisect_right(self._keys, newcomer)]


class Demand:
    """The share of the nodes' time that prompts shorter than a given length take, by those that came recently."""

    def __init__(self, memory_s: float = 120.0) -> None:
        self._memory_s = memory_s
        self._work_s = [0.0] * len(_EDGES_S)  # by class; older ones count less
        self._at_s = self._began_s = -math.inf

    def sent(self, work_s: float, now_s: float) -> None:
        """A first leg was sent that will compute for `work_s`."""
        self._fade(now_s)
        if work_s > 0.0:
            self._work_s[_class_of(work_s)] += work_s

    def shares(self, num_nodes: int, now_s: float) -> tuple[float, ...]:
        """By class of length: the share of all nodes' time taken by prompts shorter than the middle of the class."""
        self._fade(now_s)
        seen_s = self._memory_s * -math.expm1(-max(1.0, now_s - self._began_s) / self._memory_s)
        whole_s, shorter_s = seen_s * max(1, num_nodes), itertools.accumulate(self._work_s)
        return tuple([(up_to_s - own_s / 2) / whole_s for up_to_s, own_s in zip(shorter_s, self._work_s, strict=True)])

    def _fade(self, now_s: float) -> None:
        if self._began_s == -math.inf:
            self._began_s = self._at_s = now_s
        if now_s > self._at_s:
            kept = math.exp((self._at_s - now_s) / self._memory_s)
            self._work_s = [work_s * kept for work_s in self._work_s]
            self._at_s = now_s


def with_overtakers(
    wait_s: NDArray[np.float64], work_s: NDArray[np.float64], shares: Sequence[float]
) -> NDArray[np.float64]:
    """How long prompts of `work_s` will wait behind `wait_s` of work, while shorter ones keep overtaking them.

    A prompt that comes t seconds later overtakes if it is shorter by more than `AGEING * t`, so overtakers become fewer
    with time. If prompts shorter than x take a share r(x) of the time, the wait is the one over which the integral of
    1 - r(work_s - AGEING * t) is `wait_s`.
    """
    if not shares or not wait_s.any():
        return wait_s
    rows = np.flatnonzero(wait_s)  # a prompt that does not wait is not overtaken
    left_s, top_s = wait_s[rows], work_s[rows]
    total_s, longest_s = np.zeros(len(rows)), top_s.max()
    for edge_s, share in zip(reversed((0.0, *_EDGES_S[:-1])), reversed(shares), strict=True):
        if edge_s >= longest_s:
            continue
        room = max(0.0, 1.0 - share)
        span_s = np.maximum(0.0, top_s - edge_s) / AGEING
        top_s = np.minimum(top_s, edge_s)
        spent_s = np.minimum(span_s, left_s / room) if room > 0.0 else np.where(left_s > 0.0, span_s, 0.0)
        total_s += spent_s
        left_s = np.maximum(0.0, left_s - room * spent_s)
        if not left_s.any():
            break
    found_s = np.zeros(len(wait_s))
    found_s[rows] = total_s + left_s
    return found_s


def _class_of(work_s: float) -> int:
    return min(len(_EDGES_S) - 1, max(0, math.ceil(math.log2(work_s / SHORTEST_S))))
