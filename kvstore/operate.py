"""Questions to one store by its operator, each over a connection of its own; `kvstore.admin` is the other side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from kvstore import told
from kvstore.blocks import BlockHash
from kvstore.channel import Answer
from kvstore.errors import AskFailed, BadFrame
from kvstore.frames import MAX_BLOCKS, MAX_ROWS, Ask, Message, Told, Verb
from kvstore.told import BlockDetail, BlockRow, StoreStats, TierStats

TIMEOUT_S = 10.0
EVICT_TIMEOUT_S = 120.0  # enough to evict all blocks of a large arena, and their records


class Line(Protocol):
    """A connection to a store."""

    async def request(self, question: Callable[[int], Message], timeout_s: float) -> Answer: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class StoreOperator:
    """Asks the store that `connect` makes lines to: to its control socket, or, with the wire key, to its data socket.

    All methods raise `ArenaUnavailable` when it does not answer, `BadFrame` when what it answers is none, and
    `AskFailed` when it says that it cannot.
    """

    connect: Callable[[], Line]

    async def stats(self) -> tuple[StoreStats, list[TierStats]]:
        answer = await self._ask(partial(Ask, verb=Verb.STATS))
        return told.one(StoreStats, answer.get("store")), told.many(TierStats, answer.get("tiers"))

    async def blocks(self, prefix: str, limit: int) -> tuple[list[BlockRow], int]:
        """The first `limit` rows of blocks whose names begin with `prefix`, and how many rows there are."""
        rows: list[BlockRow] = []
        while True:
            page = min(MAX_ROWS, limit - len(rows))
            answer = await self._ask(partial(Ask, verb=Verb.LIST, prefix=prefix, offset=len(rows), limit=page))
            found, total = told.many(BlockRow, answer.get("blocks")), told.count(answer.get("num_blocks"))
            rows += found[:page]
            if not found or len(rows) >= min(limit, total):
                return rows, total

    async def inspect(self, block_hash: BlockHash) -> list[BlockDetail]:
        """One for each tier that holds the block."""
        answer = await self._ask(partial(Ask, verb=Verb.INSPECT, hashes=[block_hash]))
        return told.many(BlockDetail, answer.get("blocks"))

    async def evict(self, hashes: Sequence[BlockHash] | None) -> tuple[int, int]:
        """Drops these blocks, or all (None); how many from memory, and how many from disk."""
        if hashes is None:
            return await self._evict(partial(Ask, verb=Verb.EVICT_ALL))
        num_memory = num_disk = 0
        for start in range(0, len(hashes), MAX_BLOCKS):
            part = hashes[start : start + MAX_BLOCKS]
            in_memory, on_disk = await self._evict(partial(Ask, verb=Verb.EVICT, hashes=part))
            num_memory, num_disk = num_memory + in_memory, num_disk + on_disk
        return num_memory, num_disk

    async def drain(self, undo: bool = False) -> None:
        await self._ask(partial(Ask, verb=Verb.UNDRAIN if undo else Verb.DRAIN))

    async def _evict(self, question: Callable[[int], Ask]) -> tuple[int, int]:
        answer = await self._ask(question, EVICT_TIMEOUT_S)
        return told.count(answer.get("num_memory_blocks")), told.count(answer.get("num_disk_blocks"))

    async def _ask(self, question: Callable[[int], Ask], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        line = self.connect()
        try:
            got = await line.request(question, timeout_s)
        finally:
            line.close()
        if not isinstance(got.message, Told) or [len(text) for text in got.payloads] != [got.message.num_bytes]:
            raise BadFrame("the answer does not fit the question")
        answer = told.decode(got.payloads[0])
        if "error" in answer:
            raise AskFailed(f"the store says {answer['error']!r:.200}")
        return answer
