"""A policy's input and output: a request, a plan with its terms in seconds, a rejection. Pure data."""

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
    """What predictions assume where nothing was measured, and the margins within which choices count as equal."""

    memory_bytes_per_s: float = 4e9  # from an arena of the same machine
    wire_bytes_per_s: float = 1e9  # from another machine's
    disk_bytes_per_s: float = 5e8  # from an arena's disk
    request_s: float = 0.002  # what each request ahead costs besides its tokens
    handoff_s: float = 0.01  # what a second leg costs besides its bytes (calls, publishing), until it is measured
    no_room_s: float = 1.0  # waiting until a full node has room for a prefill
    pressure_s: float = 0.15  # times k / (1 - k), where k is the fraction of the decode node's blocks in use
    max_stall_s: float = 0.02  # how long a prompt that skips the first leg may stall a decode node's running streams
    work_ratio: float = 0.1  # what each second that a prefill node computes costs later requests
    horizon_tokens: int = 32  # output tokens over which a decode node's speed is weighed
    ttft_slack_s: float = 0.0  # margin kept below a TTFT limit: how late first tokens are, at the 90th percentile
    tie_s: float = 0.002
    tie_ratio: float = 0.01
    shares: tuple[float, ...] = ()  # of the nodes' time that shorter prompts take, by class (router/line.py)
    calls_s: float = 0.0  # what calls add to each first token, wherever it is computed
    overtaking_share: float = 1.0  # of the expected wait for overtakers that a request with a TTFT limit allows for


@dataclass(frozen=True)
class RequestView:
    """What the choice depends on. `hits`: arena id -> the leading run of blocks that it holds.

    `warming`: node id -> the leading run that it was just sent to compute, and will have when its queue gets there.
    """

    num_tokens: int  # the prompt, and output before a failover
    max_new_tokens: int
    hits: Mapping[str, Hit] = field(default_factory=dict)
    warming: Mapping[str, int] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()  # node ids that failed this request: treated as dead
    no_prefill: frozenset[str] = frozenset()  # node ids that refused a leg for lack of room: alive
    no_decode: frozenset[str] = frozenset()
    ttft_limit_s: float | None = None  # from now on: what its SLO and deadline leave
    tpot_limit_s: float | None = None


@dataclass(frozen=True)
class PrefillTerms:
    """Predicted seconds of a first leg. `stall_s` is what the node's running streams lose, not the request itself."""

    queue_s: float
    room_s: float
    fetch_s: float  # parallel to the queue, so the longer of the two counts
    compute_s: float
    stall_s: float = 0.0
    order_s: float = 0.0  # what the queue's order adds to its own wait: those it overtakes, and its overtakers

    @property
    def ttft_s(self) -> float:
        return max(self.queue_s + self.order_s + self.room_s, self.fetch_s) + self.compute_s

    @property
    def cost_s(self) -> float:
        """The cost without any overtaking: what the request gains by it, the overtaken lose."""
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
    is_known: bool = True  # both nodes' speeds were measured recently
    calls_s: float = 0.0  # as in `Rates`
    seen: Survey | None = field(default=None, compare=False, repr=False)  # what it was chosen from

    def bare(self) -> Plan:
        """The plan without its alternatives, which are as large as the cluster."""
        return replace(self, seen=None)

    @property
    def cost_s(self) -> float:
        return self.prefill.cost_s + self.handoff_s + self.decode.cost_s

    @property
    def predicted_ttft_s(self) -> float:
        return self.prefill.ttft_s + self.calls_s

    @property
    def predicted_tpot_s(self) -> float:
        """A step, plus its share of the hand-off, which falls between the first token and the second."""
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
    """No node takes the request. `best` is the choice that came closest, if limits were the reason."""

    reason: Reason
    best: Plan | None = None
    retry_after_s: float = 0.0
    seen: Survey | None = field(default=None, compare=False, repr=False)

    def bare(self) -> Reject:
        """The rejection without its basis, which is as large as the cluster."""
        return replace(self, best=self.best.bare() if self.best else None, seen=None)

    def __str__(self) -> str:
        if self.best is None:
            return self.reason.value
        ttft, tpot = self.best.predicted_ttft_s, self.best.predicted_tpot_s
        return f"{self.reason.value}: predicted TTFT {ttft:.3f} s, TPOT {tpot * 1000:.1f} ms"


class Policy(Protocol):
    """Decides for one request. It may keep state from one call to the next."""

    def __call__(
        self, request: RequestView, cluster: Cluster, now_s: float, rng: random.Random, rates: Rates
    ) -> Plan | Reject: ...
