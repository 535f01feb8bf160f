"""The capacity of a simulated cluster: the highest speed of a trace at which nine of ten requests are in time.

Found by bisection over the speed. A request is in time when its TTFT and TPOT meet their limits; a rejected one is
not. Runs are cached, because those for different TPOT limits are the same run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from loadtest.sim_config import SimConfig
from loadtest.simulator import Simulator
from loadtest.trace import TracedRequest

ATTAINMENT = 0.9
STEPS = 5  # each halves what is not known: 1/32 of the range between a speed that works and its double


def disaggregated(config: SimConfig, num_nodes: int, prefill: int) -> SimConfig:
    """`prefill` of the nodes for prefill, the others for decode."""
    return replace(config, prefill=prefill, decode=num_nodes - prefill, both=0)


def colocated(config: SimConfig, num_nodes: int, chunk_tokens: int) -> SimConfig:
    """All nodes for both, with prompts in chunks within the decode steps."""
    return replace(config, prefill=0, decode=0, both=num_nodes, chunk_tokens=chunk_tokens)


class Capacity:
    """The capacity of clusters for one trace. `config.ttft_limit_s` is the TTFT limit, which also causes rejections."""

    def __init__(self, requests: Sequence[TracedRequest]) -> None:
        self._requests = requests
        self._runs: dict[tuple[SimConfig, float], list[tuple[float, float]]] = {}  # TTFT and TPOT of the admitted

    def of(self, config: SimConfig, tpot_limit_s: float | None) -> float:
        """Requests per second; 0.0 if even a hundredth of the trace's speed is too much."""
        low = 1.0
        while low > 0.01 and not self._holds(config, low, tpot_limit_s):
            low /= 2
        if low <= 0.01:
            return 0.0
        high = 2 * low
        while low >= 1.0 and self._holds(config, high, tpot_limit_s):
            low, high = high, 2 * high
        for _ in range(STEPS):
            middle = (low + high) / 2
            if self._holds(config, middle, tpot_limit_s):
                low = middle
            else:
                high = middle
        return low * self.offered_rps(1.0)

    def offered_rps(self, scale: float) -> float:
        first, last = self._requests[0], self._requests[-1]
        return scale * len(self._requests) / max(1e-9, last.arrival_s - first.arrival_s)

    def attained(self, config: SimConfig, scale: float, tpot_limit_s: float | None) -> float:
        """The share of requests that are in time."""
        times = self._runs.get((config, scale))
        if times is None:
            jobs = Simulator(config).run([request.faster(scale) for request in self._requests])
            times = self._runs[config, scale] = [(job.ttft_s, job.tpot_s) for job in jobs if not job.rejected]
        ttft_limit_s, most_s = config.ttft_limit_s or math.inf, tpot_limit_s or math.inf
        return sum(ttft_s <= ttft_limit_s and tpot_s <= most_s for ttft_s, tpot_s in times) / len(self._requests)

    def _holds(self, config: SimConfig, scale: float, tpot_limit_s: float | None) -> bool:
        return self.attained(config, scale, tpot_limit_s) >= ATTAINMENT
