"""Why requests were routed as they were: the last decisions, each with the terms of its best candidates.

Plain state, kept as numbers and turned into messages on request.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batonpb import inference_pb2
from router.cluster import Column, Mask
from router.costs import Survey
from router.errors import UnknownRequest
from router.hits import longest
from router.plan import Plan, Reject, RequestView

MAX_REQUESTS = 1000
MAX_DECISIONS = 16  # of one request, besides the first: the last ones
MAX_CANDIDATES = 8  # of each leg
PREFILL_TERMS = ("queue_s", "room_s", "fetch_s", "compute_s", "stall_s", "cost_s", "fetch_blocks")
DECODE_TERMS = ("step_s", "steps_s", "pressure_s", "cost_s")


@dataclass(frozen=True)
class Candidates:
    """The best nodes for one leg. `terms` has a row per term of the leg and a column per node."""

    node_ids: tuple[str, ...] = ()
    terms: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    def words(self, names: tuple[str, ...]) -> str:
        columns = self.terms.T
        return " ".join(
            f"{node_id}({' '.join(f'{name}={value:.4f}' for name, value in zip(names, values, strict=True))})"
            for node_id, values in zip(self.node_ids, columns, strict=True)
        )


@dataclass(frozen=True)
class Decision:
    """One choice, and its candidates."""

    policy: str
    num_tokens: int
    num_hit_blocks: int
    num_nodes: int
    chosen: Plan | Reject  # without its survey, which would keep the whole cluster's columns alive
    prefill: Candidates
    decode: Candidates
    ttft_limit_s: float | None = None  # since then

    @property
    def outcome(self) -> str:
        if isinstance(self.chosen, Reject):
            return "rejected"
        return "both legs" if self.chosen.prefill_node else "one leg"

    def candidates(self) -> str:
        """All terms, for one log line."""
        return f"prefill=[{self.prefill.words(PREFILL_TERMS)}] decode=[{self.decode.words(DECODE_TERMS)}]"

    def message(self) -> inference_pb2.Decision:
        plan = self.chosen.best if isinstance(self.chosen, Reject) else self.chosen
        message = inference_pb2.Decision(
            policy=self.policy,
            outcome=self.outcome,
            reason=str(self.chosen) if isinstance(self.chosen, Reject) else "",
            num_tokens=self.num_tokens,
            num_hit_blocks=self.num_hit_blocks,
            num_nodes=self.num_nodes,
        )
        if plan is not None:
            message.prefill_node, message.decode_node = plan.prefill_node or "", plan.decode_node
            message.predicted_ttft_s, message.predicted_tpot_s = plan.predicted_ttft_s, plan.predicted_tpot_s
            message.handoff_s = plan.handoff_s
        for node_id, column in zip(self.prefill.node_ids, self.prefill.terms.T, strict=True):
            *seconds, num_blocks = column.tolist()
            terms = dict(zip(PREFILL_TERMS, seconds, strict=False))
            message.prefill.add(node_id=node_id, num_hit_blocks=int(num_blocks), **terms)
        for node_id, column in zip(self.decode.node_ids, self.decode.terms.T, strict=True):
            message.decode.add(node_id=node_id, **dict(zip(DECODE_TERMS, column.tolist(), strict=True)))
        return message


@dataclass
class _Entry:
    decisions: list[Decision] = field(default_factory=list)
    ttft_s: float = -1.0
    tpot_s: float = -1.0


class Journal:
    """The decisions on the last requests. A request is known by its id and its tenant's salt."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self._max_requests = max_requests
        self._entries: OrderedDict[tuple[bytes, str], _Entry] = OrderedDict()

    def began(self, salt: bytes, request_id: str) -> None:
        """A request starts; decisions on an older one of the same id are forgotten."""
        self.forget(salt, request_id)
        self._entries[salt, request_id] = _Entry()
        while len(self._entries) > self._max_requests:
            self._entries.popitem(last=False)

    def forget(self, salt: bytes, request_id: str) -> None:
        """Forgets the decisions on a request."""
        self._entries.pop((salt, request_id), None)

    def decided(self, salt: bytes, request_id: str, decision: Decision) -> None:
        entry = self._entries.get((salt, request_id))
        if entry is not None:
            entry.decisions.append(decision)
            del entry.decisions[1:-MAX_DECISIONS]

    def finished(self, salt: bytes, request_id: str, timeline: inference_pb2.Timeline) -> Decision | None:
        """The first decision on the request, if it is still kept."""
        entry = self._entries.get((salt, request_id))
        if entry is None:
            return None
        entry.ttft_s, entry.tpot_s = timeline.first_token_s, timeline.tpot_s
        return entry.decisions[0] if entry.decisions else None

    def explain(self, salt: bytes, request_id: str) -> inference_pb2.ExplainResponse:
        """The decisions on a request; for a call with n answers, those on the first. Raises `UnknownRequest`."""
        entry = self._entries.get((salt, request_id)) or self._entries.get((salt, part_id(request_id, 0)))
        if entry is None:
            raise UnknownRequest(f"no decision on request {request_id[:128]!r} is kept here")
        decisions = [decision.message() for decision in entry.decisions]
        return inference_pb2.ExplainResponse(decisions=decisions, ttft_s=entry.ttft_s, tpot_s=entry.tpot_s)


def part_id(request_id: str, index: int) -> str:
    """The id of one of a call's n answers, if n is more than 1."""
    return f"{request_id}-{index}"


def decision(policy: str, request: RequestView, num_nodes: int, chosen: Plan | Reject) -> Decision:
    """What to keep of a choice. To be called at once, because the cluster keeps changing."""
    seen = chosen.seen
    prefill, decode = Candidates(), Candidates()
    if seen is not None:
        firsts = _best(seen.first.cost_s, seen.firsts | seen.alone)
        columns = [getattr(seen.first, name)[firsts] for name in PREFILL_TERMS]
        prefill = Candidates(_names(seen, firsts), np.array(columns))
        seconds = _best(seen.second.cost_s, seen.seconds)
        columns = [getattr(seen.second, name)[seconds] for name in DECODE_TERMS]
        decode = Candidates(_names(seen, seconds), np.array(columns))
    hit_blocks = longest(request.hits).num_blocks
    limit_s = request.ttft_limit_s
    return Decision(policy, request.num_tokens, hit_blocks, num_nodes, chosen.bare(), prefill, decode, limit_s)


def _best(cost_s: Column, mask: Mask) -> NDArray[np.intp]:
    """The rows of the lowest costs, in order."""
    rows = mask.nonzero()[0]
    if len(rows) > MAX_CANDIDATES:
        rows = rows[np.argpartition(cost_s[rows], MAX_CANDIDATES)[:MAX_CANDIDATES]]
    return rows[np.argsort(cost_s[rows])]


def _names(seen: Survey, rows: NDArray[np.intp]) -> tuple[str, ...]:
    return tuple(seen.cluster.node_ids[row] for row in rows.tolist())
