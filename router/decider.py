"""Asks a policy about each request, and keeps what later decisions and their explanation need. No I/O.

One per router. Besides the cluster, which belongs to the registry, it knows which blocks were recently sent where.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from batonpb import inference_pb2
from kvstore.blocks import BlockHash
from router.accuracy import Accuracy
from router.cluster import Cluster
from router.hits import Hit
from router.journal import Journal, decision
from router.journey import Journey, RoutedRequest
from router.line import Demand
from router.plan import Plan, Rates, Reason, Reject
from router.policy import DEFAULT, POLICIES
from router.warming import Warming

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promise:
    """Blocks that a node was sent to compute."""

    node_id: str
    hashes: Sequence[BlockHash]


class Decider:
    """`policy` is a name of `POLICIES`."""

    def __init__(
        self,
        rng: random.Random,
        policy: str = DEFAULT,
        rates: Rates | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.journal = Journal()
        self._rng = rng
        self._name = policy
        self._policy = POLICIES[policy]()
        self._rates = rates or Rates()
        self.accuracy = Accuracy(self._rates.handoff_s)
        self._warming, self._demand = Warming(), Demand()
        self._clock = clock

    def began(self, request: RoutedRequest) -> None:
        """A request starts."""
        self.journal.began(request.salt, request.request_id)

    def decide(self, journey: Journey, cluster: Cluster, hits: Mapping[str, Hit]) -> Plan | Reject:
        """Where the request goes next; `hits` is what each arena holds of it, by arena id."""
        begin_s, request = self._clock(), journey.request
        hashes = journey.hashes(journey.pool) if journey.pool is not None else ()
        view = journey.view(hits, self._warming.runs(hashes, begin_s), begin_s)
        shares = self._demand.shares(cluster.num_prefill, begin_s)
        accuracy = self.accuracy
        rates = replace(
            self._rates,
            ttft_slack_s=accuracy.slack.seconds,
            shares=shares,
            calls_s=accuracy.calls.seconds,
            handoff_s=accuracy.handoffs.seconds,
            overtaking_share=accuracy.overtaking.share,
        )
        chosen: Plan | Reject = Reject(Reason.BUSY)
        if not journey.is_refused:
            chosen = self._policy(view, cluster, begin_s, self._rng, rates)
        kept = decision(self._name, view, len(cluster), chosen)
        self.journal.decided(request.salt, request.request_id, kept)
        rejection = chosen.reason.name if isinstance(chosen, Reject) else ""
        self.accuracy.decided(kept.outcome, rejection, self._clock() - begin_s)
        if logger.isEnabledFor(logging.INFO):
            logger.info(
                "request_id=%s event=%s policy=%s tokens=%d hit_blocks=%d %s",
                *(request.request_id, "reject" if rejection else "plan", self._name),
                *(kept.num_tokens, kept.num_hit_blocks),
                chosen if isinstance(chosen, Reject) else chosen.explanation,
            )
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("request_id=%s event=candidates %s", request.request_id, kept.candidates())
        return kept.chosen

    def promise(self, journey: Journey, plan: Plan) -> Promise:
        """The plan's first leg starts: requests with the same prefix now see its blocks as warm on that node."""
        hashes = list(journey.hashes(journey.pool)) if journey.pool is not None else []
        promise = Promise(plan.prefill_node or plan.decode_node, hashes)
        now_s = self._clock()
        self._warming.sent(hashes, promise.node_id, now_s)
        self._demand.sent(plan.prefill.compute_s, now_s)
        return promise

    def take_back(self, promise: Promise) -> None:
        """The leg has ended without having computed its prompt."""
        self._warming.forget(promise.hashes, promise.node_id)

    def finished(self, request: RoutedRequest, timeline: inference_pb2.Timeline) -> None:
        """A request has ended, with this timeline."""
        first = self.journal.finished(request.salt, request.request_id, timeline)
        if first is not None and isinstance(first.chosen, Plan):
            self.accuracy.finished(timeline, first.chosen, first.ttft_limit_s)
        else:
            self.accuracy.finished(timeline)
