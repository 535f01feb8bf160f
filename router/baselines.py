"""Other systems' policies, on the same view and with the same terms, for comparison with ours.

Each chooses a node for each leg by its own rule; the predicted costs are computed alike for all. None of them skips a
leg, and only Mooncake's rejects. Sources: SGLang's model gateway (cache_aware.rs), Dynamo's KV router
(router-concepts.md), Mooncake's Algorithm 1 (FAST'25, 4.1).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from router.cluster import Cluster, Column, Mask
from router.costs import Survey, blocks_needed, survey
from router.plan import Plan, Policy, Rates, Reason, Reject, RequestView
from router.predict import broken_limit

BALANCE_ABS, BALANCE_REL, CACHE_THRESHOLD = 64, 1.5, 0.3  # SGLang's defaults

# Which rows run the first leg and the second.
Rule = Callable[[Survey, random.Random], tuple[int, int]]


def by(rule: Rule, may_fetch: bool = False, keeps_limits: bool = False) -> Policy:
    """A policy made from a rule. `may_fetch`: its first legs fetch what other arenas hold."""

    def decide(request: RequestView, cluster: Cluster, now_s: float, rng: random.Random, rates: Rates) -> Plan | Reject:
        seen = survey(request, cluster, now_s, rates, may_fetch)
        if isinstance(seen, Reject):
            return seen
        if not (seen.firsts.any() and seen.seconds.any()):
            return Reject(Reason.BUSY, seen=seen)
        plan = seen.plan(*rule(seen, rng))
        # As published: a queue is all work ahead, whatever its order.
        in_turn = replace(plan, prefill=replace(plan.prefill, order_s=0.0))
        reason = broken_limit(request, in_turn) if keeps_limits else None
        return plan if reason is None else Reject(reason, plan, retry_after_s=1.0, seen=seen)

    return decide


def at_random(seen: Survey, rng: random.Random) -> tuple[int, int]:
    return int(rng.choice(np.flatnonzero(seen.firsts))), int(rng.choice(np.flatnonzero(seen.seconds)))


class RoundRobin:
    """Takes nodes in turn."""

    def __init__(self) -> None:
        self._turn = -1

    def __call__(self, seen: Survey, _rng: random.Random) -> tuple[int, int]:
        self._turn += 1
        firsts, seconds = np.flatnonzero(seen.firsts), np.flatnonzero(seen.seconds)
        return int(firsts[self._turn % len(firsts)]), int(seconds[self._turn % len(seconds)])


def least_loaded(seen: Survey, rng: random.Random) -> tuple[int, int]:
    """The shortest queue, and the fewest requests."""
    return _least(seen.first.queue_s, seen.firsts, rng), _least(seen.cluster.num_requests, seen.seconds, rng)


def cache_aware(seen: Survey, rng: random.Random) -> tuple[int, int]:
    """SGLang's: the longest hit, unless loads differ much or the hit is small; then the fewest requests."""
    loads, blocks = seen.cluster.num_requests, seen.own_blocks()
    least, most = loads[seen.firsts].min(), loads[seen.firsts].max()
    is_uneven = most - least > BALANCE_ABS and most > BALANCE_REL * least
    rate = blocks[seen.firsts].max() * seen.cluster.block_size / seen.request.num_tokens
    # Among equal hits, the one with fewer requests.
    rank = loads if is_uneven or rate <= CACHE_THRESHOLD else loads - blocks * (most + 1.0)
    return _least(rank, seen.firsts, rng), _least(loads, seen.seconds, rng)


def kv_cost(seen: Survey, rng: random.Random) -> tuple[int, int]:
    """Dynamo's: blocks to prefill, including queued ones, minus cached ones; and blocks that decoding holds."""
    cluster = seen.cluster
    queued = seen.first.queue_s / np.maximum(cluster.prefill_token_s, 1e-9) / cluster.block_size
    to_prefill = np.maximum(queued + blocks_needed(seen.request, cluster) - seen.own_blocks(), 0.0)
    held = cluster.total_blocks - cluster.free_blocks
    return _least(to_prefill, seen.firsts, rng), _least(held, seen.seconds, rng)


def conductor(seen: Survey, rng: random.Random) -> tuple[int, int]:
    """Mooncake's: the least of queue, transfer and prefill; then the decode node with the shortest step."""
    first = seen.first
    transfer_s = np.where(first.fetch_blocks > seen.own_blocks(), first.fetch_s, 0.0)
    ttft_s = first.queue_s + transfer_s + first.compute_s
    return _least(ttft_s, seen.firsts, rng), _least(seen.second.step_s, seen.seconds, rng)


def _least(values: Column, mask: Mask, rng: random.Random) -> int:
    """A row with the least value; ties are broken at random."""
    rows = np.flatnonzero(mask)
    found = values[rows]
    return int(rng.choice(rows[found == found.min()]))
