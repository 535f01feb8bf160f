"""Who runs a request: predicted seconds for each choice, and the least of them. Pure: no clock, no I/O, no state.

The same code decides live and in the simulator. Loads, hits and randomness are passed in; all terms are in seconds, so
that a busy node and a far cache weigh against each other without weights. What it cannot know (what an engine holds
beyond its machine's arena) it leaves out.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from router.hits import NO_HIT, Hit, longest

SHORTLIST = 4  # nodes of each role that are tried in pairs


@dataclass(frozen=True)
class Rates:
    """What the predictions assume where nothing was measured, and where they stop to tell choices apart."""

    prefill_tokens_per_s: float = 2000.0  # until any node has measured its own
    step_s: float = 0.03  # a decode step of a single request, likewise
    step_slope: float = 0.08  # how much longer a step takes with each further request
    memory_bytes_per_s: float = 4e9  # from an arena of the same machine
    wire_bytes_per_s: float = 1e9  # from another machine's
    disk_bytes_per_s: float = 1e9  # from an arena's disk into the arena, before either
    request_s: float = 0.002  # what each request ahead costs besides its tokens
    handoff_s: float = 0.01  # what a second leg costs besides its bytes: calls, publishing, the tail's recomputation
    no_room_s: float = 1.0  # waiting until a full node has room for a prefill
    pressure_s: float = 0.15  # times k / (1 - k) where k of the decode node's blocks are in use
    max_stall_s: float = 0.02  # a decode node's own streams may be held up so long by a prompt that skips the first leg
    horizon_tokens: int = 32  # output tokens that a decode node's speed is weighed over
    tie_s: float = 0.002
    tie_ratio: float = 0.01


@dataclass(frozen=True)
class NodeView:
    """One living node in a snapshot: what it reported, and what this router sent it since."""

    node_id: str
    role: str  # "prefill", "decode" or "both"
    block_size: int  # tokens
    block_bytes: int
    max_model_len: int  # tokens
    arena_id: str = ""  # "" publishes nothing
    num_requests: int = 0  # running and waiting
    queued_prefill_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0  # 0: not known
    prefill_tokens_per_s: float = 0.0  # 0.0: not measured yet
    step_s: float = 0.0  # of a single request, likewise
    is_rested: bool = False  # has run nothing for a while: what it measured then says little

    def with_leg(self, prefill_tokens: int, blocks: int) -> NodeView:
        """This node after one more leg was sent to it."""
        return replace(
            self,
            num_requests=self.num_requests + 1,
            queued_prefill_tokens=self.queued_prefill_tokens + prefill_tokens,
            free_blocks=max(0, self.free_blocks - blocks),
        )


@dataclass(frozen=True)
class RequestView:
    """What the choice depends on. `hits`: arena id -> the leading run of blocks that it holds."""

    num_tokens: int  # the prompt, and what was put out before a failover
    max_new_tokens: int
    hits: Mapping[str, Hit] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()  # node ids that broke this request off: as good as dead
    no_prefill: frozenset[str] = frozenset()  # node ids that refused a leg for want of room: alive
    no_decode: frozenset[str] = frozenset()


@dataclass(frozen=True)
class PrefillTerms:
    """Predicted seconds of a first leg. `stall_s` is what the node's own streams lose, not the request itself."""

    queue_s: float
    room_s: float
    fetch_s: float
    compute_s: float
    stall_s: float

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.room_s + self.fetch_s + self.compute_s

    @property
    def cost_s(self) -> float:
        return self.ttft_s + self.stall_s


@dataclass(frozen=True)
class DecodeTerms:
    """Predicted seconds of a second leg over the horizon."""

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
    blocks: int  # that each leg holds

    @property
    def cost_s(self) -> float:
        return self.prefill.cost_s + self.handoff_s + self.decode.cost_s

    @property
    def predicted_ttft_s(self) -> float:
        return self.prefill.ttft_s

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


class Reject(enum.Enum):
    NO_NODE = "no node is alive"
    BUSY = "every node that could take the request has refused it"


def plan(request: RequestView, nodes: Sequence[NodeView], rng: random.Random, rates: Rates = Rates()) -> Plan | Reject:
    """The cheapest choice; one of them at random where several are about as cheap."""
    # 1) Filter: the living, then their roles. A role that nobody is left to play is played by everybody.
    living = [node for node in nodes if node.node_id not in request.failed and node.max_model_len > request.num_tokens]
    living = with_typical_speeds(_that_fit(request, living))
    prefillers = _of_role("prefill", living)
    decoders = [node for node in _of_role("decode", living) if node.node_id not in request.no_decode]
    if not living:
        return Reject.NO_NODE
    # 2) Score: seconds for each node alone, the best few in pairs.
    first = {node.node_id: prefill_terms(request, node, rates) for node in living}
    # A decode node runs the first leg itself where that is its role too, or where its streams hardly notice.
    can_skip = {node.node_id for node in prefillers}
    can_skip |= {node.node_id for node in decoders if first[node.node_id].compute_s <= rates.max_stall_s}
    helpers = [node for node in prefillers if node.node_id not in request.no_prefill]
    helpers = _shortlist(helpers, lambda node: first[node.node_id].cost_s, rng)
    decoders = _shortlist(decoders, lambda node: _decode_rank(request, node, rates), rng)
    choices = [
        _choice(request, prefiller, decoder, first, rates)
        for decoder in decoders
        for prefiller in [*helpers, decoder]
        if (prefiller is not decoder or decoder.node_id in can_skip)
    ]
    # 3) Pick: at random among near ties, so that routers with the same snapshot do not all pick the same node.
    if not choices:
        return Reject.BUSY
    best = min(choice.cost_s for choice in choices)
    margin = max(rates.tie_s, rates.tie_ratio * best)
    return rng.choice([choice for choice in choices if choice.cost_s <= best + margin])


def with_typical_speeds(nodes: Sequence[NodeView]) -> list[NodeView]:
    """Gives nodes that are new or rested the median speeds of their role.

    A fixed guess would keep a newcomer out of work for good where it is too low; and a node that was slow once would
    never be measured again.
    """
    return [
        replace(
            node,
            prefill_tokens_per_s=_speed(node, nodes, lambda other: other.prefill_tokens_per_s),
            step_s=_speed(node, nodes, lambda other: other.step_s),
        )
        for node in nodes
    ]


def prefill_terms(request: RequestView, node: NodeView, rates: Rates) -> PrefillTerms:
    """What a first leg on `node` would take."""
    speed = _prefill_speed(node, rates)
    hits = hits_worth_it(request, node, rates)
    compute_s = uncached_tokens(request, node, rates) / speed
    # Where requests run that are not first legs themselves, each of them waits for this one's chunks.
    is_shared = node.role != "prefill" and node.num_requests > 0
    return PrefillTerms(
        queue_s=node.queued_prefill_tokens / speed + node.num_requests * rates.request_s,
        room_s=rates.no_room_s if node.total_blocks and node.free_blocks < blocks_needed(request, node) else 0.0,
        fetch_s=_fetch_s(node, hits, longest(hits).num_blocks, rates),
        compute_s=compute_s,
        stall_s=compute_s if is_shared else 0.0,
    )


def decode_terms(request: RequestView, node: NodeView, rates: Rates) -> DecodeTerms:
    """What a second leg on `node` would take, over the first `horizon_tokens`."""
    step_s = (node.step_s or rates.step_s) * (1.0 + rates.step_slope * node.num_requests)
    pressure_s = 0.0
    if node.total_blocks:
        used = node.total_blocks - node.free_blocks + blocks_needed(request, node)
        k = min(0.99, used / node.total_blocks)
        pressure_s = rates.pressure_s * k / (1.0 - k)
    return DecodeTerms(steps_s=min(request.max_new_tokens, rates.horizon_tokens) * step_s, pressure_s=pressure_s)


def handoff_s(request: RequestView, source: NodeView, target: NodeView, prefill: PrefillTerms, rates: Rates) -> float:
    """What the way from a first leg on `source` to a second on `target` adds between first and second token.

    Blocks travel while the prompt is still being computed, so only what takes longer than that counts.
    """
    if not source.arena_id:  # it publishes nothing: the target computes all that no arena holds
        return rates.handoff_s + uncached_tokens(request, target, rates) / _prefill_speed(target, rates)
    num_blocks = request.num_tokens // source.block_size
    there = {**hits_worth_it(request, target, rates), source.arena_id: Hit(num_blocks)}
    return rates.handoff_s + max(0.0, _fetch_s(target, there, num_blocks, rates) - prefill.compute_s)


def hits_worth_it(request: RequestView, node: NodeView, rates: Rates) -> Mapping[str, Hit]:
    """The runs as far as `node` fetches them: up to a disk from which a block takes longer than computing it."""
    if not any(hit.num_disk_blocks for hit in request.hits.values()):
        return request.hits
    block_s = node.block_size / _prefill_speed(node, rates)
    return {
        arena_id: hit if _fetch_s(node, {arena_id: Hit(1, 1)}, 1, rates) <= block_s else hit.in_memory()
        for arena_id, hit in request.hits.items()
    }


def uncached_tokens(request: RequestView, node: NodeView, rates: Rates) -> int:
    """How many tokens `node` computes: those that no arena holds within its reach. At least one always is."""
    return max(1, request.num_tokens - longest(hits_worth_it(request, node, rates)).num_blocks * node.block_size)


def blocks_needed(request: RequestView, node: NodeView) -> int:
    """What a leg reserves: all its tokens, and one more."""
    return request.num_tokens // node.block_size + 1


def _speed(node: NodeView, nodes: Sequence[NodeView], speed: Callable[[NodeView], float]) -> float:
    """The node's own measurement if it is fresh, else the median of those most like it; 0.0 where nothing is known."""
    if not node.is_rested and speed(node):
        return speed(node)
    peers = [other for other in nodes if other.role == node.role]
    fresh = [other for other in nodes if not other.is_rested]
    for group in ([other for other in peers if not other.is_rested], peers, fresh, nodes):
        if known := [speed(other) for other in group if speed(other)]:
            return median(known)
    return 0.0


def _prefill_speed(node: NodeView, rates: Rates) -> float:
    return node.prefill_tokens_per_s or rates.prefill_tokens_per_s


def _fetch_s(node: NodeView, hits: Mapping[str, Hit], num_blocks: int, rates: Rates) -> float:
    """Seconds until `node` has `num_blocks` blocks: from its machine's arena what that holds, the rest by wire.

    What lies on disk, here or there, is read before it comes.
    """
    here = hits.get(node.arena_id, NO_HIT) if node.arena_id else NO_HIT
    near = min(num_blocks, here.num_blocks)
    on_disk = here.num_on_disk(0, near) + longest(hits).num_on_disk(near, num_blocks)
    near_s, far_s = near / rates.memory_bytes_per_s, (num_blocks - near) / rates.wire_bytes_per_s
    return node.block_bytes * (near_s + far_s + on_disk / rates.disk_bytes_per_s)


def _that_fit(request: RequestView, nodes: list[NodeView]) -> list[NodeView]:
    """Nodes whose whole pool can hold the request; all where none can, for a node to say so by name and limit."""
    fit = [node for node in nodes if not node.total_blocks or node.total_blocks >= blocks_needed(request, node)]
    return fit or nodes


def _of_role(role: str, nodes: list[NodeView]) -> list[NodeView]:
    return [node for node in nodes if node.role in (role, "both")] or nodes


def _decode_rank(request: RequestView, node: NodeView, rates: Rates) -> float:
    num_blocks = request.num_tokens // node.block_size
    hits = hits_worth_it(request, node, rates)
    return decode_terms(request, node, rates).cost_s + _fetch_s(node, hits, num_blocks, rates)


def _shortlist(nodes: Iterable[NodeView], key: Callable[[NodeView], float], rng: random.Random) -> list[NodeView]:
    shuffled = list(nodes)
    rng.shuffle(shuffled)  # or the first of many equal nodes would always be in it
    return sorted(shuffled, key=key)[:SHORTLIST]


def _choice(
    request: RequestView, prefiller: NodeView, decoder: NodeView, first: Mapping[str, PrefillTerms], rates: Rates
) -> Plan:
    prefill, is_skip = first[prefiller.node_id], prefiller is decoder
    return Plan(
        prefill_node=None if is_skip else prefiller.node_id,
        decode_node=decoder.node_id,
        prefill=prefill,
        decode=decode_terms(request, decoder, rates),
        handoff_s=0.0 if is_skip else handoff_s(request, prefiller, decoder, prefill, rates),
        prefill_tokens=uncached_tokens(request, prefiller, rates),
        blocks=blocks_needed(request, prefiller),
    )
