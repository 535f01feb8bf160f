"""What a policy is asked, and what it answers: a request, a plan with its terms in seconds, a rejection. Pure data."""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from router.cluster import Cluster
from router.hits import Hit

if TYPE_CHECKING:
    from router.costs import Survey


@dataclass(frozen=True)
class Rates:
    """What predictions assume where nothing is measured, and where they stop to tell choices apart."""

    memory_bytes_per_s: float = 4e9  # from an arena of the same machine
    wire_bytes_per_s: float = 1e9  # from another machine's
    disk_bytes_per_s: float = 5e8  # what comes from an arena's disk first
    request_s: float = 0.002  # what each request ahead costs besides its tokens
    handoff_s: float = 0.01  # what a second leg costs besides its bytes, until it is measured: calls, publishing
    no_room_s: float = 1.0  # waiting until a full node has room for a prefill
    pressure_s: float = 0.15  # times k / (1 - k) where k of the decode node's blocks are in use
    max_stall_s: float = 0.02  # a decode node's own streams may be held up so long by a prompt that skips the first leg
    work_ratio: float = 0.1  # what each second that a prefill node computes costs those who come later
    horizon_tokens: int = 32  # output tokens that a decode node's speed is weighed over
    ttft_slack_s: float = 0.0  # first tokens come so much later than predicted, now and then: kept free under a limit
    tie_s: float = 0.002
    tie_ratio: float = 0.01
    shares: tuple[float, ...] = ()  # of nodes' time that shorter prompts take, by class (router/line.py)
    calls_s: float = 0.0  # what calls add to each first token, wherever it is made
    overtaking_share: float = 1.0  # of the wait for overtakers: what a request under a TTFT limit leaves time for


@dataclass(frozen=True)
class RequestView:
    """What the choice depends on. `hits`: arena id -> the leading run of blocks that it holds.

    `warming`: node id -> the leading run that it was just sent to compute: whoever queues there finds it computed.
    """

    num_tokens: int  # the prompt, and what was put out before a failover
    max_new_tokens: int
    hits: Mapping[str, Hit] = field(default_factory=dict)
    warming: Mapping[str, int] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()  # node ids that broke this request off: as good as dead
    no_prefill: frozenset[str] = frozenset()  # node ids that refused a leg for want of room: alive
    no_decode: frozenset[str] = frozenset()
    ttft_limit_s: float | None = None  # from now on; what its SLO and its deadline leave
    tpot_limit_s: float | None = None


@dataclass(frozen=True)
class PrefillTerms:
    """Predicted seconds of a first leg. `stall_s` is what the node's own streams lose, not the request itself."""

    queue_s: float
    room_s: float
    fetch_s: float  # beside the queue, so the longer of the two counts
    compute_s: float
    stall_s: float = 0.0
    order_s: float = 0.0  # what the queue's order adds to its own wait: whom it overtakes, and who will overtake it

    @property
    def ttft_s(self) -> float:
        return max(self.queue_s + self.order_s + self.room_s, self.fetch_s) + self.compute_s

    @property
    def cost_s(self) -> float:
        """As if nobody overtook anybody: those whom it overtakes wait as much longer as it gains."""
        return max(self.queue_s + self.room_s, self.fetch_s) + self.compute_s + self.stall_s


@dataclass(frozen=True)
class DecodeTerms:
    """Predicted seconds of a second leg over the horizon."""

    step_s: float  # with this request in the batch
    steps_s: float
    pressure_s: float

    @property
    def cost_s(self) -> float:
        return self.steps_s + self.pressure_s


@dataclass(frozen=True)
class Plan:
    """A choice. Without `prefill_node` the decode node runs both legs."""

    prefill_node: str | None
    decode_node: str
    prefill: PrefillTerms
    decode: DecodeTerms
    handoff_s: float
    prefill_tokens: int  # that the first leg computes
    fetch_blocks: int  # leading blocks that it has when it begins to compute
    blocks: int  # that each leg holds
    is_known: bool = True  # both nodes' speeds were measured lately
    calls_s: float = 0.0  # as in `Rates`
    seen: Survey | None = field(default=None, compare=False, repr=False)  # what it was chosen from

    def bare(self) -> Plan:
        """Without what it was chosen from, which is as large as the cluster."""
        return replace(self, seen=None)

    @property
    def cost_s(self) -> float:
        return self.prefill.cost_s + self.handoff_s + self.decode.cost_s

    @property
    def predicted_ttft_s(self) -> float:
        return self.prefill.ttft_s + self.calls_s

    @property
    def predicted_tpot_s(self) -> float:
        """A step, and its share of the hand-off, which lies between the first token and the second."""
        num_steps = self.decode.steps_s / self.decode.step_s if self.decode.step_s else 1.0
        return self.decode.step_s + self.handoff_s / max(1.0, num_steps - 1.0)

    @property
    def explanation(self) -> str:
        """key=value, for one log line."""
        p, d = self.prefill, self.decode
        return (
            f"prefill={self.prefill_node or '-'} decode={self.decode_node} cost_s={self.cost_s:.4f} "
            f"queue_s={p.queue_s:.4f} room_s={p.room_s:.1f} fetch_s={p.fetch_s:.4f} compute_s={p.compute_s:.4f} "
            f"stall_s={p.stall_s:.4f} handoff_s={self.handoff_s:.4f} "
            f"steps_s={d.steps_s:.4f} pressure_s={d.pressure_s:.4f}"
        )


class Reason(enum.Enum):
    NO_NODE = "no node is alive"
    BUSY = "no node that was asked had room for the request"
    TTFT = "the first token would come too late"
    TPOT = "tokens would come too slowly"


@dataclass(frozen=True)
class Reject:
    """Nobody takes the request. `best` is the choice that came closest, where limits were broken."""

    reason: Reason
    best: Plan | None = None
    retry_after_s: float = 0.0
    seen: Survey | None = field(default=None, compare=False, repr=False)

    def bare(self) -> Reject:
        """Without what it was made from, which is as large as the cluster."""
        return replace(self, best=self.best.bare() if self.best else None, seen=None)

    def __str__(self) -> str:
        if self.best is None:
            return self.reason.value
        ttft, tpot = self.best.predicted_ttft_s, self.best.predicted_tpot_s
        return f"{self.reason.value}: predicted TTFT {ttft:.3f} s, TPOT {tpot * 1000:.1f} ms"


class Policy(Protocol):
    """Decides for one request. What it remembers from one call to the next is its own."""

    def __call__(
        self, request: RequestView, cluster: Cluster, now_s: float, rng: random.Random, rates: Rates
    ) -> Plan | Reject: ...
