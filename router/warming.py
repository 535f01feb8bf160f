"""Blocks that a node was just sent to compute: it does not have them yet, but will. Pure: times are passed in.

A burst of prompts with a common prefix would be spread over all nodes, because none of them has it when the second
prompt comes; so the router remembers where it sent the first. By node and not by arena: a prompt that queues behind the
first one finds its blocks computed, while fetching them elsewhere would take longer than that.

A name stands for all blocks before it too, so a node that computes a block computes those as well: how far a prompt is
known is found by looking at a few of its blocks, and whole prompts are noted at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

from kvstore.blocks import BlockHash

MAX_BLOCKS = 100_000  # of all prompts that are remembered, those with the same blocks too
TTL_S = 30.0  # by then the directory knows, or the node has died
_NEVER_S = math.inf


class Warming:
    """Which node is about to have which block. The hashes given here always start with a prompt's first block."""

    def __init__(self, ttl_s: float = TTL_S, max_blocks: int = MAX_BLOCKS) -> None:
        self._ttl_s, self._max_blocks = ttl_s, max_blocks
        self._firsts: dict[BlockHash, dict[str, float]] = {}  # a prompt's first block -> node id -> until when
        self._blocks: dict[str, dict[BlockHash, float]] = {}  # node id -> block -> until when
        self._sent: deque[tuple[float, str, Sequence[BlockHash]]] = deque()  # until when, node id; oldest first
        self._num_blocks = 0  # of all in there, each as often as it was sent
        self._until_s = -math.inf  # of the last one

    def sent(self, hashes: Sequence[BlockHash], node_id: str, now_s: float) -> None:
        """This node will have computed these blocks. `hashes` is kept, and must not change."""
        hashes = hashes[: self._max_blocks]
        if not hashes:
            return
        # Later than any before: what is promised anew has to show.
        until_s = self._until_s = max(now_s + self._ttl_s, math.nextafter(self._until_s, math.inf))
        blocks = self._blocks.setdefault(node_id, {})
        blocks.update(dict.fromkeys(hashes, until_s))
        self._firsts.setdefault(hashes[0], {})[node_id] = until_s
        self._sent.append((until_s, node_id, hashes))
        self._num_blocks += len(hashes)
        while self._num_blocks > self._max_blocks or self._sent[0][0] <= now_s:
            before_s, node_id, hashes = self._sent.popleft()
            self._num_blocks -= len(hashes)
            self._drop(hashes, node_id, before_s)

    def forget(self, hashes: Sequence[BlockHash], node_id: str) -> None:
        """The leg that should have computed them has ended without doing so."""
        self._drop(hashes, node_id, _NEVER_S)

    def runs(self, hashes: Sequence[BlockHash], now_s: float) -> dict[str, int]:
        """Node id -> length of the leading run that it is about to have; nodes with none are left out."""
        firsts = self._firsts.get(hashes[0]) if hashes else None
        if not firsts:
            return {}
        blocks, second = self._blocks, hashes[1] if len(hashes) > 1 else hashes[0]
        # Hundreds of nodes may share a first block, but few the second: those without it cost no call.
        return {
            node_id: _run(blocks[node_id], hashes, now_s) if blocks[node_id].get(second, 0.0) > now_s else 1
            for node_id, until_s in firsts.items()
            if until_s > now_s
        }

    def _drop(self, hashes: Sequence[BlockHash], node_id: str, until_s: float) -> None:
        """Drops the blocks that were not noted again since."""
        blocks = self._blocks.get(node_id, {})
        for block_hash in hashes:
            if blocks.get(block_hash, _NEVER_S) <= until_s:
                blocks.pop(block_hash, None)
        if not blocks:
            self._blocks.pop(node_id, None)
        nodes = self._firsts.get(hashes[0], {}) if hashes else {}
        if node_id in nodes and hashes[0] not in blocks:
            del nodes[node_id]
            if not nodes:
                del self._firsts[hashes[0]]


def _run(blocks: Mapping[BlockHash, float], hashes: Sequence[BlockHash], now_s: float) -> int:
    """How many of `hashes` are noted, given that the first is: by doubling steps, then bisection."""
    known, unknown = 1, 2
    while unknown <= len(hashes) and blocks.get(hashes[unknown - 1], 0.0) > now_s:
        known, unknown = unknown, 2 * unknown
    unknown = min(unknown, len(hashes) + 1)
    while unknown - known > 1:
        middle = (known + unknown) // 2
        if blocks.get(hashes[middle - 1], 0.0) > now_s:
            known = middle
        else:
            unknown = middle
    return known
