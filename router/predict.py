"""Baton's own policy: the pair of legs with the least predicted seconds. Pure and stateless."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from router.cluster import Cluster, Column, Mask
from router.costs import survey
from router.plan import Plan, Rates, Reason, Reject, RequestView

SHORTLIST = 4  # nodes of each role that are tried in pairs


def predict(request: RequestView, cluster: Cluster, now_s: float, rng: random.Random, rates: Rates) -> Plan | Reject:
    """The cheapest choice that keeps the request's limits; a random one of those that are about equally cheap."""
    request = cautious(request, rates)
    # 1) Filter and score: who may run which leg, and seconds for each node alone.
    seen = survey(request, cluster, now_s, rates)
    if isinstance(seen, Reject):
        return seen
    known = cluster.is_known
    firsts = within(seen.firsts, known, seen.first.ttft_s, request.ttft_limit_s)
    sources = shortlist(seen.first.cost_s, firsts, rng, rates)
    seconds = within(seen.seconds, known, seen.second.step_s, request.tpot_limit_s)
    targets = shortlist(seen.second.cost_s, seconds, rng, rates)
    # If one node runs both legs, its queue and its hits count as much as its steps.
    both = shortlist(seen.first.cost_s + seen.second.cost_s, seen.alone, rng, rates)
    # 2) The best few in pairs.
    pairs = [(source, target) for source, target in itertools.product(sources, targets) if source != target]
    plans = [seen.plan(*pair) for pair in [*pairs, *((row, row) for row in both)]]
    # 3) Pick: at random among near ties, so that routers with the same snapshot do not all pick the same node.
    chosen = pick(request, plans, rng, rates)
    return replace(chosen, seen=seen) if isinstance(chosen, Reject) else chosen


def cautious(request: RequestView, rates: Rates) -> RequestView:
    """Lowers the TTFT limit by the recent lateness of predictions, but to no less than half.

    Otherwise half of what is admitted under overload would be late: each request is admitted as soon as it is predicted
    to be just in time, and several routers, which do not see what the others send meanwhile, are all too optimistic.
    """
    limit_s = request.ttft_limit_s
    if limit_s is None or rates.ttft_slack_s <= 0.0:
        return request
    return replace(request, ttft_limit_s=limit_s - min(rates.ttft_slack_s, max(0.0, limit_s) / 2))


def pick(request: RequestView, plans: Sequence[Plan], rng: random.Random, rates: Rates) -> Plan | Reject:
    """One of the cheapest plans that keep the request's limits."""
    if not plans:
        return Reject(Reason.BUSY)
    has_limits = request.ttft_limit_s is not None or request.tpot_limit_s is not None
    good = [plan for plan in plans if broken_limit(request, plan) is None] if has_limits else plans
    if not good:
        best = min(plans, key=lambda plan: plan.predicted_ttft_s)
        reason = broken_limit(request, best) or Reason.TTFT
        late_s = best.predicted_ttft_s - (request.ttft_limit_s or 0.0)
        return Reject(reason, best, retry_after_s=max(late_s if reason is Reason.TTFT else 0.0, 1.0))
    costs_s = [plan.cost_s for plan in good]
    limit_s = _margin(min(costs_s), rates)
    return rng.choice([plan for plan, cost_s in zip(good, costs_s, strict=True) if cost_s <= limit_s])


def broken_limit(request: RequestView, plan: Plan) -> Reason | None:
    """Which limit of the request the plan is predicted to break, if any.

    A guess breaks none: if requests were refused because of it, the node would never be measured.
    """
    if not plan.is_known:
        return None
    if request.ttft_limit_s is not None and plan.predicted_ttft_s > request.ttft_limit_s:
        return Reason.TTFT
    if request.tpot_limit_s is not None and plan.predicted_tpot_s > request.tpot_limit_s:
        return Reason.TPOT
    return None


def within(mask: Mask, known: Mask, values_s: Column, limit_s: float | None) -> Mask:
    """The rows of `mask` that keep the limit, as far as that is `known`; all of `mask` if there are none."""
    if limit_s is None:
        return mask
    kept = mask & ((values_s <= limit_s) | ~known)
    return kept if kept.any() else mask


def shortlist(cost_s: Column, mask: Mask, rng: random.Random, rates: Rates) -> list[int]:
    """The rows of `mask` with the least cost; near ties are chosen at random, or the first rows would always win."""
    rows = mask.nonzero()[0]
    if len(rows) <= SHORTLIST:
        return [int(row) for row in rows]
    costs = cost_s[rows]
    near = rows[costs <= _margin(float(costs.min()), rates)]
    if len(near) >= SHORTLIST:
        return [int(row) for row in rng.sample(list(near), SHORTLIST)]
    return [int(row) for row in rows[np.argpartition(costs, SHORTLIST)[:SHORTLIST]]]


def _margin(best_s: float, rates: Rates) -> float:
    return best_s + max(rates.tie_s, rates.tie_ratio * best_s)
