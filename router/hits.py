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

    def up_to(self, num_blocks: int) -> Hit:
        """What of it lies before this block."""
        if self.num_blocks <= num_blocks:
            return self
        return Hit(num_blocks, max(0, self.num_disk_blocks - (self.num_blocks - num_blocks)))

    def in_memory(self) -> Hit:
        """What of it need not come from disk."""
        return Hit(self.num_blocks - self.num_disk_blocks)


NO_HIT = Hit(0)


def longest(hits: Mapping[str, Hit]) -> Hit:
    """The longest run; of equal ones that with most in memory."""
    return max(hits.values(), key=lambda hit: (hit.num_blocks, -hit.num_disk_blocks), default=NO_HIT)
