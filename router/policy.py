"""Who runs a request: the policies by name. Pure: no clock, no I/O; each may keep state of its own.

The same code decides live and in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable

from router.baselines import RoundRobin, at_random, by, cache_aware, conductor, kv_cost, least_loaded
from router.plan import Policy
from router.predict import predict

DEFAULT = "predict"

POLICIES: dict[str, Callable[[], Policy]] = {
    "predict": lambda: predict,
    "random": lambda: by(at_random),
    "round_robin": lambda: by(RoundRobin()),
    "least_loaded": lambda: by(least_loaded),
    "cache_aware": lambda: by(cache_aware),
    "kv_cost": lambda: by(kv_cost),
    "local": lambda: by(conductor),  # Mooncake's without fetching: "local cache-aware" in the paper's figure 5
    "conductor": lambda: by(conductor, may_fetch=True, keeps_limits=True),
}
