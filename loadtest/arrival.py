"""When requests are sent: an open loop, a closed loop, or both. Pure state; the caller passes the time in.

An open loop (Poisson, bursts, a constant rate, a ramp) is independent of the server; a closed loop keeps a fixed
number in flight. Together they are an open loop with a cap, as with `--request-rate` and `--max-concurrency` of
`vllm bench serve`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

RAMPS = ("linear", "exponential")


@dataclass(frozen=True)
class Ramp:
    """A rate that goes from `start_per_s` to `end_per_s`, both positive, as requests go out."""

    start_per_s: float
    end_per_s: float
    kind: str = "linear"  # of `RAMPS`

    def rate_per_s(self, share: float) -> float:
        """The rate when `share` (0 to 1) of the requests are out."""
        if self.kind == "exponential":
            return float(self.start_per_s * (self.end_per_s / self.start_per_s) ** share)
        return self.start_per_s + (self.end_per_s - self.start_per_s) * share


def open_times_s(
    num_requests: int, rate: float | Ramp, rng: random.Random, burstiness: float = 1.0, constant: bool = False
) -> list[float]:
    """Ascending send times. The first is 0; an infinite rate means all of them at once.

    Gaps follow a gamma distribution with shape `burstiness` and the rate's mean: 1 is a Poisson process, less gives
    bursts, more gives more even gaps; with `constant`, all gaps are equal.
    """
    ramp = rate if isinstance(rate, Ramp) else Ramp(rate, rate)
    if not (ramp.start_per_s > 0 and ramp.end_per_s > 0):
        raise ValueError(f"the request rate must be positive, got {min(ramp.start_per_s, ramp.end_per_s)}")
    if not burstiness > 0:
        raise ValueError(f"burstiness must be positive, got {burstiness}")
    times_s = [0.0] * num_requests
    if math.isinf(ramp.start_per_s):
        return times_s
    for i in range(1, num_requests):
        mean_s = 1.0 / ramp.rate_per_s(i / num_requests)
        times_s[i] = times_s[i - 1] + (mean_s if constant else rng.gammavariate(burstiness, mean_s / burstiness))
    return times_s


class Arrivals:
    """Which requests may be sent now: in order, none before its time, at most `max_in_flight` at once (None: no cap).

    `due` returns each index once; the caller calls `finished` once for each.
    """

    def __init__(self, times_s: Sequence[float], max_in_flight: int | None = None) -> None:
        if max_in_flight is not None and max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, got {max_in_flight}")
        self._times_s = times_s
        self._limit = len(times_s) if max_in_flight is None else max_in_flight
        self._num_sent = 0
        self._num_in_flight = 0

    @property
    def all_sent(self) -> bool:
        return self._num_sent == len(self._times_s)

    def due(self, now_s: float) -> list[int]:
        """The requests to send at `now_s`; they count as in flight from here on."""
        first = self._num_sent
        while (next_s := self.next_s()) is not None and next_s <= now_s:
            self._num_sent += 1
            self._num_in_flight += 1
        return list(range(first, self._num_sent))

    def finished(self) -> None:
        """One request in flight has ended."""
        if self._num_in_flight == 0:
            raise ValueError("no request is in flight")
        self._num_in_flight -= 1

    def next_s(self) -> float | None:
        """When the next request may go out; None while every place is taken, and when none is left."""
        if self.all_sent or self._num_in_flight >= self._limit:
            return None
        return self._times_s[self._num_sent]
