"""The store as a node sees it: match, fetch, publish. Every failure is a miss within a bounded time, never an error.

One `KVClient` a process. The arena of its own machine is mapped and read without any call; other arenas are read
over ZeroMQ, many blocks a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.blocks import BlockHash, Payload
from kvstore.directory import ArenaRecord, Directory


@dataclass(frozen=True)
class Match:
    """The leading run of blocks that can be fetched, over all arenas together, and where each block is."""

    hashes: tuple[BlockHash, ...] = ()
    places: tuple[tuple[str, int], ...] = ()  # (arena id, slot), one a hash
    arenas: Mapping[str, ArenaRecord] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        return len(self.hashes)


class KVClient:
    """Reads and writes blocks of `slot_bytes`. `local_dir` is the directory of this machine's store; with None all
    goes over the wire and nothing is published."""

    def __init__(self, directory: Directory, slot_bytes: int, local_dir: Path | None) -> None: ...

    @property
    def local_arena_id(self) -> str:
        """Id of the mapped arena; "" while there is none."""
        raise NotImplementedError

    async def open(self) -> None:
        """Maps the arena if the store is up; a store that comes later is found by later calls."""

    async def close(self) -> None:
        """Waits for copies under way, then lets go of everything."""

    async def match(self, hashes: Sequence[BlockHash]) -> Match:
        """The leading run of `hashes` that the directory knows of. Never raises; empty when Redis is away."""
        raise NotImplementedError

    async def fetch(self, match: Match) -> list[Payload]:
        """The leading run of `match` that could be had, in order. Never raises; failures shorten the run."""
        raise NotImplementedError

    async def publish(
        self, hashes: Sequence[BlockHash], write: Callable[[Sequence[int], Sequence[memoryview]], None]
    ) -> int:
        """Stores blocks; returns how many were committed (those already present do not count).

        `write(indices, views)` is called on a thread with the indices into `hashes` of the blocks to write and as
        many writable views of `slot_bytes`. `publish` does not end before `write` has, not even when cancelled, so
        what `write` reads may be freed afterwards. Only errors of `write` itself are raised.
        """
        raise NotImplementedError
