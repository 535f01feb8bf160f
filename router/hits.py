"""Where the leading blocks of a prompt already are. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Hit:
    """The leading run of blocks that one arena holds. Those only on its disk are assumed to be the end of the run.

    Usually they are, because the tail of a chain is evicted first.
    """

    num_blocks: int
    num_disk_blocks: int = 0  # of them

    def up_to(self, num_blocks: int) -> Hit:
        """The part of the run before this block."""
        if self.num_blocks <= num_blocks:
            return self
        return Hit(num_blocks, max(0, self.num_disk_blocks - (self.num_blocks - num_blocks)))

    def in_memory(self) -> Hit:
        """The part of the run that is in memory."""
        return Hit(self.num_blocks - self.num_disk_blocks)


NO_HIT = Hit(0)


def longest(hits: Mapping[str, Hit]) -> Hit:
    """The longest run; among equals, the one with most blocks in memory."""
    return max(hits.values(), key=lambda hit: (hit.num_blocks, -hit.num_disk_blocks), default=NO_HIT)
