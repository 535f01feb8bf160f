"""Predicted seconds of each leg on each node at once, in columns. Pure: loads, hits and the moment are passed in.

Formulas: a first leg waits for its node's queue while its blocks are fetched, then computes what is left, as in
Mooncake's Algorithm 1 (FAST'25, 4.1), but with the wait and the fetch side by side. The pressure term k / (1 - k) is
SGLang's (least_load).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from router.cluster import Cluster, Column, Mask
from router.hits import NO_HIT
from router.line import key, with_overtakers
from router.plan import DecodeTerms, Plan, PrefillTerms, Rates, Reason, Reject, RequestView
from router.ways import Held, ways


@dataclass(frozen=True)
class PrefillCosts:
    """Costs of first legs, one entry per row of the cluster. Entries of unused rows are meaningless."""

    queue_s: Column
    room_s: Column
    fetch_s: Column
    compute_s: Column
    stall_s: Column
    fetch_blocks: Column  # leading blocks that need not be computed
    order_s: Column  # see `PrefillTerms`

    @property
    def ttft_s(self) -> Column:
        return np.maximum(self.queue_s + self.order_s + self.room_s, self.fetch_s) + self.compute_s

    @cached_property
    def cost_s(self) -> Column:
        return np.maximum(self.queue_s + self.room_s, self.fetch_s) + self.compute_s + self.stall_s

    def terms(self, row: int) -> PrefillTerms:
        columns = (self.queue_s, self.room_s, self.fetch_s, self.compute_s, self.stall_s, self.order_s)
        return PrefillTerms(*(float(column[row]) for column in columns))


@dataclass(frozen=True)
class DecodeCosts:
    """Costs of second legs, likewise."""

    step_s: Column
    steps_s: Column
    pressure_s: Column

    @property
    def cost_s(self) -> Column:
        return self.steps_s + self.pressure_s

    def terms(self, row: int) -> DecodeTerms:
        return DecodeTerms(float(self.step_s[row]), float(self.steps_s[row]), float(self.pressure_s[row]))


def prefill_costs(
    request: RequestView, cluster: Cluster, now_s: float, rates: Rates, may_fetch: bool = True
) -> PrefillCosts:
    """Each node with the blocks of its own arena, or, if that is faster, with the longest run of all arenas.

    Blocks on a disk that is slower than computing are not used. Without `may_fetch`, nodes use only their own arena.
    """
    queue_s = np.maximum(cluster.free_at_s - now_s, 0.0) + cluster.num_requests * rates.request_s
    room_s = np.where(_is_full(request, cluster), rates.no_room_s, 0.0)
    wait_s = queue_s + room_s
    (blocks, fetch_s), *others = ways(request, cluster, rates, may_fetch)
    compute_s = _compute_s(request, cluster, blocks)
    for other_blocks, other_fetch_s in others:
        other_s = _compute_s(request, cluster, other_blocks)
        is_sooner = np.maximum(wait_s, other_fetch_s) + other_s < np.maximum(wait_s, fetch_s) + compute_s
        blocks = np.where(is_sooner, other_blocks, blocks)
        fetch_s = np.where(is_sooner, other_fetch_s, fetch_s)
        compute_s = np.where(is_sooner, other_s, compute_s)
    # Running requests other than first legs each wait for this one's chunks; and later requests wait longer for
    # blocks that are computed once more.
    share = np.where(cluster.is_shared & (cluster.num_requests > 0), 1.0, rates.work_ratio)
    stall_s = share * compute_s
    order_s = _order_s(cluster, now_s, rates, compute_s)
    if request.ttft_limit_s is not None:
        order_s = np.where(order_s > 0.0, rates.overtaking_share * order_s, order_s)
    return PrefillCosts(queue_s, room_s, fetch_s, compute_s, stall_s, blocks, order_s)


def decode_costs(request: RequestView, cluster: Cluster, rates: Rates) -> DecodeCosts:
    """Each node with one more request in its batch, over the first `horizon_tokens`."""
    step_s = cluster.step_base_s + cluster.step_request_s * (cluster.num_requests + 1)
    total = np.maximum(cluster.total_blocks, 1.0)
    used = np.minimum((total - cluster.free_blocks + blocks_needed(request, cluster)) / total, 0.99)
    pressure_s = np.where(cluster.total_blocks > 0, rates.pressure_s * used / (1.0 - used), 0.0)
    return DecodeCosts(step_s, step_s * min(request.max_new_tokens, rates.horizon_tokens), pressure_s)


@dataclass(frozen=True)
class Survey:
    """The basis of one decision: the request, the cluster now, and each leg's seconds on each row."""

    request: RequestView
    cluster: Cluster
    rates: Rates
    first: PrefillCosts
    second: DecodeCosts
    firsts: Mask  # rows that may run the first leg
    seconds: Mask  # and the second
    alone: Mask  # and both of them, without a hand-off
    _first_terms: dict[int, PrefillTerms] = field(default_factory=dict)  # cached by row, as each is in several pairs
    _second_terms: dict[int, DecodeTerms] = field(default_factory=dict)

    def plan(self, source: int, target: int) -> Plan:
        """The plan for a pair of rows: first leg, second leg; the same row twice means that it runs both."""
        is_one = source == target
        blocks = int(self.first.fetch_blocks[source])
        return Plan(
            prefill_node=None if is_one else self.cluster.node_ids[source],
            decode_node=self.cluster.node_ids[target],
            prefill=self._prefill(source),
            decode=self._decode(target),
            handoff_s=0.0 if is_one else self.handoff_s(source, target),
            prefill_tokens=max(1, self.request.num_tokens - blocks * self.cluster.block_size),
            fetch_blocks=blocks,
            blocks=blocks_needed(self.request, self.cluster),
            is_known=bool(self.cluster.is_known[source] and self.cluster.is_known[target]),
            calls_s=self.rates.calls_s,
            seen=self,
        )

    def handoff_s(self, source: int, target: int) -> float:
        """What the hand-off from a first leg on `source` to a second on `target` adds between first and second token.

        Blocks travel as soon as they exist: those that arenas hold at once, the others while prefill goes on. Only the
        time beyond that counts.
        """
        request, cluster, rates = self.request, self.cluster, self.rates
        num_blocks = request.num_tokens // cluster.block_size
        arena_id = cluster.arena_ids[source]
        here = request.hits.get(cluster.arena_ids[target], NO_HIT).up_to(num_blocks)
        if not arena_id:  # it publishes nothing: the target computes what it cannot fetch from others
            return rates.handoff_s + float(self.first.compute_s[target])
        wire_s, memory_s = cluster.block_bytes / rates.wire_bytes_per_s, cluster.block_bytes / rates.memory_bytes_per_s
        disk_s = min(wire_s, memory_s + cluster.block_bytes / rates.disk_bytes_per_s)
        is_near = arena_id == cluster.arena_ids[target]
        new_s = max(0, num_blocks - int(self.first.fetch_blocks[source])) * (memory_s if is_near else wire_s)
        all_s = num_blocks * memory_s
        if not is_near:
            at_hand = here.num_blocks - here.num_disk_blocks
            all_s = at_hand * memory_s + here.num_disk_blocks * disk_s + (num_blocks - here.num_blocks) * wire_s
        first = self._prefill(source)
        return rates.handoff_s + max(0.0, all_s - first.ttft_s, new_s - first.compute_s)

    def _prefill(self, row: int) -> PrefillTerms:
        if row not in self._first_terms:
            self._first_terms[row] = self.first.terms(row)
        return self._first_terms[row]

    def _decode(self, row: int) -> DecodeTerms:
        if row not in self._second_terms:
            self._second_terms[row] = self.second.terms(row)
        return self._second_terms[row]

    def own_blocks(self) -> Column:
        """The leading run that each row's own arena holds."""
        return Held(self.request.hits, self.cluster).own()[0]


def survey(
    request: RequestView, cluster: Cluster, now_s: float, rates: Rates, may_fetch: bool = True
) -> Survey | Reject:
    """Evaluates all nodes at once; a rejection if none could take the request."""
    living = cluster.is_there & (cluster.max_model_len > request.num_tokens)
    _clear(living, request.failed, cluster)
    if not living.any():
        return Reject(Reason.NO_NODE)
    firsts, seconds, alone = candidates(request, cluster, living)
    first = prefill_costs(request, cluster, now_s, rates, may_fetch)
    # A decode node runs the first leg itself if that is its role too, or if its streams hardly notice.
    alone = seconds & (alone | (first.compute_s <= rates.max_stall_s))
    return Survey(request, cluster, rates, first, decode_costs(request, cluster, rates), firsts, seconds, alone)


def candidates(request: RequestView, cluster: Cluster, living: Mask) -> tuple[Mask, Mask, Mask]:
    """Rows that may run a first leg, rows that may run a second one, and rows whose role is both.

    If no node of a role is left, all nodes may play it.
    """
    fits = living & ((cluster.total_blocks == 0) | (cluster.total_blocks >= blocks_needed(request, cluster)))
    living = fits if fits.any() else living  # if no node can hold it, let a node refuse it with the field and the limit
    first, second = living & cluster.can_prefill, living & cluster.can_decode
    first = first if first.any() else living.copy()
    second = second if second.any() else living.copy()
    alone = first & second
    _clear(first, request.no_prefill, cluster)
    _clear(second, request.no_decode, cluster)
    return first, second, alone


def blocks_needed(request: RequestView, cluster: Cluster) -> int:
    """The blocks that a leg reserves: for all its tokens, and one more."""
    return request.num_tokens // cluster.block_size + 1


def _order_s(cluster: Cluster, now_s: float, rates: Rates, compute_s: Column) -> Column:
    """What each queue's order adds to, or takes from, the wait for all of its work."""
    overtaken_s = np.zeros(len(compute_s))
    for row, line in cluster.lines.items():
        overtaken_s[row] = line.overtaken_s(key(float(compute_s[row]), now_s))
    work_s = np.maximum(cluster.free_at_s - now_s, 0.0)
    return with_overtakers(np.maximum(work_s - overtaken_s, 0.0), compute_s, rates.shares) - work_s


def _is_full(request: RequestView, cluster: Cluster) -> Mask:
    return (cluster.total_blocks > 0) & (cluster.free_blocks < blocks_needed(request, cluster))


def _compute_s(request: RequestView, cluster: Cluster, blocks: Column) -> Column:
    uncached = np.maximum(1.0, request.num_tokens - blocks * cluster.block_size)
    pairs = uncached * (request.num_tokens - uncached / 2)
    return cluster.prefill_base_s + cluster.prefill_token_s * uncached + cluster.prefill_pair_s * pairs


def _clear(mask: Mask, node_ids: frozenset[str], cluster: Cluster) -> None:
    for node_id in node_ids:
        row = cluster.row(node_id)
        if row is not None:
            mask[row] = False
