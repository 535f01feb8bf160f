"""The simulator's arenas: the shipped eviction policies over names of blocks, and who holds what."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.eviction import Eviction


class Directory:
    """Which arena holds which block."""

    def __init__(self) -> None:
        self._holders: dict[int, set[str]] = {}

    def add(self, block: int, arena: str) -> None:
        self._holders.setdefault(block, set()).add(arena)

    def drop(self, block: int, arena: str) -> None:
        holders = self._holders.get(block)
        if holders is not None:
            holders.discard(arena)
            if not holders:
                del self._holders[block]

    def num_entries(self) -> int:
        return sum(map(len, self._holders.values()))

    def runs(self, blocks: Sequence[int]) -> dict[str, int]:
        """Arena -> the leading run of `blocks` that it holds; arenas with none are left out."""
        runs: dict[str, int] = {}
        open_arenas: set[str] = set()
        for depth, block in enumerate(blocks):
            holders = self._holders.get(block)
            here = (holders if depth == 0 else open_arenas & holders) if holders else set()
            for arena in sorted(open_arenas - here):  # sorted: equal seeds give equal runs
                runs[arena] = depth
            open_arenas = here
            if not here:
                return runs
        runs.update(dict.fromkeys(sorted(open_arenas), len(blocks)))
        return runs


class Arena:
    """One node's blocks."""

    def __init__(self, arena_id: str, capacity: int, policy: Eviction[int], directory: Directory) -> None:
        self.arena_id, self.capacity = arena_id, capacity
        self._policy, self._directory = policy, directory

    def __len__(self) -> int:
        return len(self._policy)

    def run(self, blocks: Sequence[int]) -> int:
        """The leading run that it holds; counts as a use, the tail first."""
        count = 0
        for block in blocks:
            if block not in self._policy:
                break
            count += 1
        for block in reversed(blocks[:count]):
            self._policy.touch(block)
        return count

    def lend(self, blocks: Sequence[int]) -> None:
        """Another node copies these blocks of a chain."""
        for block in blocks:
            if block in self._policy:
                self._policy.lend(block)

    def publish(self, blocks: Sequence[int]) -> None:
        """Adds the blocks it lacks, the tail first, so that a chain's tail is evicted first."""
        policy = self._policy
        missing = [block for block in blocks if block not in policy]
        room = self.capacity - len(policy)
        if len(missing) > room:
            kept = set(blocks)
            for _ in range(len(missing) - room):
                victim = policy.victim(kept)
                if victim is None:
                    break
                self._directory.drop(victim, self.arena_id)
        for block in reversed(missing[: self.capacity - len(policy)]):
            policy.insert(block)
            self._directory.add(block, self.arena_id)

    def forget(self) -> None:
        """Drops everything: the node died."""
        for block in list(self._policy):
            self._policy.remove(block)
            self._directory.drop(block, self.arena_id)
