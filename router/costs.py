"""Predicted seconds of each leg on each node at once, in columns. Pure: loads, hits and the moment are passed in.

Formulas: a first leg waits for its node's queue while its blocks are fetched, then computes what is left, as in
Mooncake's Algorithm 1 (FAST'25, 4.1), but with the wait and the fetch side by side. The pressure term k / (1 - k) is
SGLang's (least_load).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router.cluster import Cluster, Column, Mask
from router.hits import NO_HIT, longest
from router.plan import DecodeTerms, Plan, PrefillTerms, Rates, Reason, Reject, RequestView


@dataclass(frozen=True)
class PrefillCosts:
    """First legs: one entry a row of the cluster. Rows where nobody is hold anything."""

    queue_s: Column
    room_s: Column
    fetch_s: Column
    compute_s: Column
    stall_s: Column
    fetch_blocks: Column  # leading blocks that need not be computed

    @property
    def ttft_s(self) -> Column:
        return np.maximum(self.queue_s + self.room_s, self.fetch_s) + self.compute_s

    @property
    def cost_s(self) -> Column:
        return self.ttft_s + self.stall_s

    def terms(self, row: int) -> PrefillTerms:
        columns = (self.queue_s, self.room_s, self.fetch_s, self.compute_s, self.stall_s)
        return PrefillTerms(*(float(column[row]) for column in columns))


@dataclass(frozen=True)
class DecodeCosts:
    """Second legs, likewise."""

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
    """Each node with the blocks of its own arena, or, where that is sooner, with the longest run of all.

    Without `may_fetch` nobody fetches from others.
    """
    own, own_disk = _own_runs(request, cluster)
    best = longest(request.hits)
    queue_s = np.maximum(cluster.free_at_s - now_s, 0.0) + cluster.num_requests * rates.request_s
    room_s = np.where(_is_full(request, cluster), rates.no_room_s, 0.0)
    wait_s = queue_s + room_s
    near_s = own * (cluster.block_bytes / rates.memory_bytes_per_s) + own_disk * _disk_block_s(cluster, rates)
    compute_s = _compute_s(request, cluster, own)
    fetch_s, blocks = near_s, own
    if may_fetch and best.num_blocks > own.min(initial=best.num_blocks):
        far_s = near_s + (best.num_blocks - own) * (cluster.block_bytes / rates.wire_bytes_per_s)
        far_s += best.num_on_disk(0, best.num_blocks) * _disk_block_s(cluster, rates) * (own < best.num_blocks)
        far_compute_s = _compute_s(request, cluster, np.full(len(own), float(best.num_blocks)))
        is_far = np.maximum(wait_s, far_s) + far_compute_s < np.maximum(wait_s, near_s) + compute_s
        fetch_s = np.where(is_far, far_s, near_s)
        compute_s = np.where(is_far, far_compute_s, compute_s)
        blocks = np.where(is_far, float(best.num_blocks), own)
    # Where requests run that are not first legs themselves, each of them waits for this one's chunks.
    stall_s = np.where(cluster.is_shared & (cluster.num_requests > 0), compute_s, 0.0)
    return PrefillCosts(queue_s, room_s, fetch_s, compute_s, stall_s, blocks)


def decode_costs(request: RequestView, cluster: Cluster, rates: Rates) -> DecodeCosts:
    """Each node with one more request in its batch, over the first `horizon_tokens`."""
    step_s = cluster.step_base_s + cluster.step_request_s * (cluster.num_requests + 1)
    total = np.maximum(cluster.total_blocks, 1.0)
    used = np.minimum((total - cluster.free_blocks + blocks_needed(request, cluster)) / total, 0.99)
    pressure_s = np.where(cluster.total_blocks > 0, rates.pressure_s * used / (1.0 - used), 0.0)
    return DecodeCosts(step_s, step_s * min(request.max_new_tokens, rates.horizon_tokens), pressure_s)


@dataclass(frozen=True)
class Survey:
    """All that one decision rests on: the request, the cluster now, and each leg's seconds on each row."""

    request: RequestView
    cluster: Cluster
    rates: Rates
    first: PrefillCosts
    second: DecodeCosts
    firsts: Mask  # rows that may run the first leg
    seconds: Mask  # and the second

    def plan(self, source: int, target: int) -> Plan:
        """The plan for a pair of rows: first leg, second leg; the same row twice runs both."""
        prefill, is_one = self.first.terms(source), source == target
        blocks = int(self.first.fetch_blocks[source])
        return Plan(
            prefill_node=None if is_one else self.cluster.node_ids[source],
            decode_node=self.cluster.node_ids[target],
            prefill=prefill,
            decode=self.second.terms(target),
            handoff_s=0.0 if is_one else self.handoff_s(source, target),
            prefill_tokens=max(1, self.request.num_tokens - blocks * self.cluster.block_size),
            fetch_blocks=blocks,
            blocks=blocks_needed(self.request, self.cluster),
        )

    def handoff_s(self, source: int, target: int) -> float:
        """What the way from a first leg on `source` to a second on `target` adds between first and second token.

        Blocks travel while the prompt is still being computed, so only what takes longer than that counts.
        """
        request, cluster, rates = self.request, self.cluster, self.rates
        num_blocks = request.num_tokens // cluster.block_size
        arena_id = cluster.arena_ids[source]
        if not arena_id:  # it publishes nothing: the target computes all that no arena holds
            tokens = uncached_tokens(request, cluster)
            return rates.handoff_s + _compute_row_s(cluster, target, tokens, request.num_tokens - tokens)
        near = num_blocks if arena_id == cluster.arena_ids[target] else 0
        near = max(near, request.hits.get(cluster.arena_ids[target], NO_HIT).num_blocks)
        bytes_s = near / rates.memory_bytes_per_s + max(0, num_blocks - near) / rates.wire_bytes_per_s
        return rates.handoff_s + max(0.0, bytes_s * cluster.block_bytes - float(self.first.compute_s[source]))

    def own_blocks(self) -> Column:
        """The leading run that each row's own arena holds."""
        return _own_runs(self.request, self.cluster)[0]


def survey(
    request: RequestView, cluster: Cluster, now_s: float, rates: Rates, may_fetch: bool = True
) -> Survey | Reject:
    """Looks at all nodes at once; a rejection where nobody could take the request."""
    firsts, seconds = candidates(request, cluster)
    if not seconds.any():
        return Reject(Reason.BUSY if cluster.is_there.any() else Reason.NO_NODE)
    first = prefill_costs(request, cluster, now_s, rates, may_fetch)
    return Survey(request, cluster, rates, first, decode_costs(request, cluster, rates), firsts, seconds)


def candidates(request: RequestView, cluster: Cluster) -> tuple[Mask, Mask]:
    """Rows that may run a first leg, and a second. A role that nobody is left to play is played by everybody."""
    living = cluster.is_there & (cluster.max_model_len > request.num_tokens)
    _clear(living, request.failed, cluster)
    fits = living & ((cluster.total_blocks == 0) | (cluster.total_blocks >= blocks_needed(request, cluster)))
    living = fits if fits.any() else living  # where none can hold it, for a node to say so by name and limit
    first, second = living & cluster.can_prefill, living & cluster.can_decode
    first = first if first.any() else living.copy()
    second = second if second.any() else living.copy()
    _clear(first, request.no_prefill, cluster)
    _clear(second, request.no_decode, cluster)
    return first, second


def uncached_tokens(request: RequestView, cluster: Cluster) -> int:
    """How many tokens no arena holds. At least one is always computed."""
    return max(1, request.num_tokens - longest(request.hits).num_blocks * cluster.block_size)


def blocks_needed(request: RequestView, cluster: Cluster) -> int:
    """What a leg reserves: all its tokens, and one more."""
    return request.num_tokens // cluster.block_size + 1


def _own_runs(request: RequestView, cluster: Cluster) -> tuple[Column, Column]:
    """The leading run that each row's own arena holds, and how much of it lies on disk."""
    runs, on_disk = np.zeros(len(cluster.node_ids)), np.zeros(len(cluster.node_ids))
    found = [(row, hit) for arena_id, hit in request.hits.items() for row in cluster.rows_of(arena_id)]
    if found:
        rows = [row for row, _ in found]
        runs[rows] = [hit.num_blocks for _, hit in found]
        on_disk[rows] = [hit.num_disk_blocks for _, hit in found]
    return runs, on_disk


def _is_full(request: RequestView, cluster: Cluster) -> Mask:
    return (cluster.total_blocks > 0) & (cluster.free_blocks < blocks_needed(request, cluster))


def _compute_s(request: RequestView, cluster: Cluster, blocks: Column) -> Column:
    uncached = np.maximum(1.0, request.num_tokens - blocks * cluster.block_size)
    pairs = uncached * (request.num_tokens - uncached / 2)
    return cluster.prefill_base_s + cluster.prefill_token_s * uncached + cluster.prefill_pair_s * pairs


def _compute_row_s(cluster: Cluster, row: int, uncached: float, cached: float) -> float:
    pairs = uncached * (cached + uncached / 2)
    base, token, pair = cluster.prefill_base_s[row], cluster.prefill_token_s[row], cluster.prefill_pair_s[row]
    return float(base + token * uncached + pair * pairs)


def _disk_block_s(cluster: Cluster, rates: Rates) -> float:
    return cluster.block_bytes / rates.disk_bytes_per_s


def _clear(mask: Mask, node_ids: frozenset[str], cluster: Cluster) -> None:
    for node_id in node_ids:
        row = cluster.row(node_id)
        if row is not None:
            mask[row] = False
