"""Blocks that a node was just sent to compute: its arena does not have them yet, but will. Pure: times are passed in.

A burst of prompts with a common beginning would be spread over all nodes, for none of them has it when the second
prompt comes; so the router remembers where it sent the first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvstore.blocks import BlockHash

MAX_BLOCKS = 200_000
TTL_S = 30.0  # by then the directory knows, or the node has died


class Warming:
    """Which arena is about to hold which block."""

    def __init__(self, ttl_s: float = TTL_S, max_blocks: int = MAX_BLOCKS) -> None:
        self._ttl_s, self._max_blocks = ttl_s, max_blocks
        self._arenas: OrderedDict[BlockHash, dict[str, float]] = OrderedDict()  # block -> arena -> until when

    def sent(self, hashes: Sequence[BlockHash], arena_id: str, now_s: float) -> None:
        """A node that publishes into this arena will have computed these blocks."""
        until_s = now_s + self._ttl_s
        for block_hash in hashes:
            self._arenas.setdefault(block_hash, {})[arena_id] = until_s
            self._arenas.move_to_end(block_hash)
        while len(self._arenas) > self._max_blocks:
            self._arenas.popitem(last=False)

    def runs(self, hashes: Sequence[BlockHash], now_s: float) -> dict[str, int]:
        """Arena id -> length of the leading run that it is about to hold; arenas with none are left out."""
        runs: dict[str, int] = {}
        open_arenas: set[str] | None = None
        for depth, block_hash in enumerate(hashes):
            arenas = self._arenas.get(block_hash)
            here = {arena for arena, until_s in arenas.items() if until_s > now_s} if arenas else set()
            open_arenas = here if open_arenas is None else open_arenas & here
            if not open_arenas:
                break
            for arena_id in open_arenas:
                runs[arena_id] = depth + 1
        return runs
