"""Blocks that a node was just sent to compute: it does not have them yet, but will. Pure: times are passed in.

A burst of prompts with a common beginning would be spread over all nodes, for none of them has it when the second
prompt comes; so the router remembers where it sent the first. By node and not by arena: who queues behind that prompt
finds its blocks computed, and whoever would have to fetch them would wait longer than that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvstore.blocks import BlockHash

MAX_BLOCKS = 100_000
TTL_S = 30.0  # by then the directory knows, or the node has died


class Warming:
    """Which node is about to have which block."""

    def __init__(self, ttl_s: float = TTL_S, max_blocks: int = MAX_BLOCKS) -> None:
        self._ttl_s, self._max_blocks = ttl_s, max_blocks
        self._nodes: OrderedDict[BlockHash, dict[str, float]] = OrderedDict()  # block -> node id -> until when

    def sent(self, hashes: Sequence[BlockHash], node_id: str, now_s: float) -> None:
        """This node will have computed these blocks."""
        until_s = now_s + self._ttl_s
        for block_hash in hashes:
            self._nodes.setdefault(block_hash, {})[node_id] = until_s
            self._nodes.move_to_end(block_hash)
        while len(self._nodes) > self._max_blocks:
            self._nodes.popitem(last=False)

    def forget(self, hashes: Sequence[BlockHash], node_id: str) -> None:
        """The leg that was to compute them is over without having done so."""
        for block_hash in hashes:
            nodes = self._nodes.get(block_hash, {})
            nodes.pop(node_id, None)
            if not nodes:
                self._nodes.pop(block_hash, None)

    def runs(self, hashes: Sequence[BlockHash], now_s: float) -> dict[str, int]:
        """Node id -> length of the leading run that it is about to have; nodes with none are left out."""
        runs: dict[str, int] = {}
        going: set[str] | None = None
        for depth, block_hash in enumerate(hashes):
            nodes = self._nodes.get(block_hash)
            here = {node_id for node_id, until_s in nodes.items() if until_s > now_s} if nodes else set()
            going = here if going is None else going & here
            if not going:
                break
            runs.update(dict.fromkeys(going, depth + 1))
        return runs
