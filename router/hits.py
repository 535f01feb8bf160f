"""Where the leading blocks of a prompt lie already. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Hit:
    """The leading run of blocks that one arena holds. Those on its disk alone are taken to be its end.

    They are as a rule: of a chain the tail is evicted first.
    """

    num_blocks: int
    num_disk_blocks: int = 0  # of them

    def num_on_disk(self, start: int, end: int) -> int:
        """How many of the blocks from `start` to `end` lie on disk."""
        first = max(start, self.num_blocks - self.num_disk_blocks)
        return max(0, min(end, self.num_blocks) - first)

    def in_memory(self) -> Hit:
        """What of it need not come from disk."""
        return Hit(self.num_blocks - self.num_disk_blocks)


NO_HIT = Hit(0)


def longest(hits: Mapping[str, Hit]) -> Hit:
    """The longest run; of equal ones that with most in memory."""
    return max(hits.values(), key=lambda hit: (hit.num_blocks, -hit.num_disk_blocks), default=NO_HIT)
