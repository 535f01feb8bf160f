"""A bound that no router can beat by much: one queue in front of all nodes, and an unlimited cache that costs nothing.

A prompt's blocks are in the cache from the moment it arrives, and every node has the same cache. First come, first
served, so a policy that lets short prompts go first may be a little better.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from loadtest.trace import BLOCK_TOKENS, TracedRequest
from router.speeds import PrefillSpeed


def ideal_ttfts_s(requests: Sequence[TracedRequest], speed: PrefillSpeed, num_nodes: int) -> list[float]:
    """The TTFT of each request, in order of arrival."""
    free_at_s, seen, found = [0.0] * num_nodes, set[int](), []
    for request in requests:
        hit = leading_run(request.blocks, seen)
        seen.update(request.blocks)
        cached = min(hit * BLOCK_TOKENS, request.input_tokens - 1)
        start_s = max(heapq.heappop(free_at_s), request.arrival_s)
        end_s = start_s + speed.seconds(request.input_tokens - cached, cached)
        heapq.heappush(free_at_s, end_s)
        found.append(end_s - request.arrival_s)
    return found


def pooled_hit_rate(requests: Sequence[TracedRequest], num_blocks: int) -> float:
    """The hit rate, over all blocks of the prompts, of one LRU of `num_blocks` full blocks shared by all nodes."""
    held: dict[int, None] = {}  # least lately used first
    num_hits = 0
    for request in requests:
        full = request.blocks[: request.input_tokens // BLOCK_TOKENS]
        num_hits += leading_run(full, held)
        for block in reversed(full):
            held.pop(block, None)
            held[block] = None
        for _ in range(len(held) - num_blocks):
            del held[next(iter(held))]
    return num_hits / sum(len(request.blocks) for request in requests)


def leading_run(blocks: Sequence[int], held: set[int] | dict[int, None]) -> int:
    return next((depth for depth, block in enumerate(blocks) if block not in held), len(blocks))
