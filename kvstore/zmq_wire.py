"""Blocks over ZeroMQ: one connection to each arena, and a transfer as many small questions under way at a time.

The blocks of a transfer are asked for in parts. While one part is summed up, ZeroMQ's own thread receives the next
ones; and as no more than `_AHEAD_BYTES` are asked for ahead, that is what a reader holds unchecked, and what a store
queues for it. Transfers over one connection take turns: two at a time, so that one fills the other's gaps.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import xxhash
import zmq.asyncio

from kvstore.blocks import BlockHash, Payload
from kvstore.channel import Answer, Channel
from kvstore.curve import Curve
from kvstore.errors import ArenaUnavailable, BadFrame
from kvstore.frames import MAX_BLOCKS, MAX_QUESTIONS, Get, Got, part_blocks
from kvstore.records import ArenaRecord
from kvstore.wire import Capabilities, Outcome, ReceivedPayload, State, Ticket

logger = logging.getLogger(__name__)

_TRANSFER_BYTES = 32 << 20
_AHEAD_BYTES = 16 << 20  # more than any network between two machines holds
_TURNS = 2  # transfers over one connection that ask at a time
_IDLE_S = 60.0  # a connection that nobody used for so long is closed when the next one is made


@dataclass
class _Connection:
    channel: Channel
    used_at_s: float
    turns: asyncio.Semaphore = field(default_factory=partial(asyncio.Semaphore, _TURNS))


@dataclass(frozen=True)
class _Transfer:
    task: asyncio.Task[Outcome]
    payloads: list[Payload]  # grows


class ZmqWire:
    """A `Wire`. With a `wire_key` it reads from stores that have the same one, without from those that have none."""

    def __init__(self, slot_bytes: int, wire_key: str = "") -> None:
        self._slot_bytes = slot_bytes
        self._part_blocks = part_blocks(slot_bytes)
        part_bytes = self._part_blocks * slot_bytes
        self._num_ahead = min(MAX_QUESTIONS // _TURNS, max(2, _AHEAD_BYTES // part_bytes))
        self._curve = Curve(wire_key) if wire_key else None
        self._context = zmq.asyncio.Context()
        self._connections: dict[str, _Connection] = {}  # by arena id
        self._tickets = itertools.count(1)
        self._transfers: dict[Ticket, _Transfer] = {}
        self._drains: set[asyncio.Task[None]] = set()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_blocks=MAX_BLOCKS, max_bytes=_TRANSFER_BYTES, is_encrypted=self._curve is not None)

    def submit(self, record: ArenaRecord, hashes: Sequence[BlockHash], timeout_s: float) -> Ticket:
        ticket, payloads = Ticket(next(self._tickets)), list[Payload]()
        task = asyncio.create_task(self._transfer(record, hashes, timeout_s, payloads))
        self._transfers[ticket] = _Transfer(task, payloads)
        return ticket

    async def poll(self, ticket: Ticket, wait_s: float) -> Outcome:
        transfer = self._transfers.get(ticket)
        if transfer is None:
            return Outcome(State.FAILED, reason="cancelled")
        await asyncio.wait([transfer.task], timeout=wait_s)
        if transfer.task.cancelled():
            return Outcome(State.FAILED, reason="cancelled")
        return transfer.task.result() if transfer.task.done() else Outcome(State.PENDING, list(transfer.payloads))

    def cancel(self, ticket: Ticket) -> None:
        transfer = self._transfers.pop(ticket, None)
        if transfer is not None:
            transfer.task.cancel()

    async def close(self) -> None:
        for connection in self._connections.values():
            connection.channel.close()
        self._connections.clear()
        tasks = [*(transfer.task for transfer in self._transfers.values()), *self._drains]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _transfer(
        self, record: ArenaRecord, hashes: Sequence[BlockHash], timeout_s: float, payloads: list[Payload]
    ) -> Outcome:
        deadline_s = time.monotonic() + timeout_s
        try:
            if timeout_s <= 0.0:
                raise TimeoutError
            connection = self._connection(record)
            async with asyncio.timeout(timeout_s):
                await connection.turns.acquire()
            await self._bring(connection, hashes, deadline_s, payloads)
        except TimeoutError:
            return Outcome(State.FAILED, payloads, f"no answer within {timeout_s:.1f} s")
        except (ArenaUnavailable, BadFrame) as error:
            return Outcome(State.FAILED, payloads, str(error))
        return Outcome(State.COMPLETED, payloads)

    async def _bring(
        self, connection: _Connection, hashes: Sequence[BlockHash], deadline_s: float, payloads: list[Payload]
    ) -> None:
        """Appends the leading run of `hashes` to `payloads`. It has a turn, and gives it back."""
        channel = connection.channel
        asked: deque[tuple[Sequence[BlockHash], asyncio.Future[Answer]]] = deque()
        todo = deque(hashes[at : at + self._part_blocks] for at in range(0, len(hashes), self._part_blocks))
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                while todo or asked:
                    while todo and len(asked) < self._num_ahead:
                        part = todo.popleft()
                        asked.append((part, channel.ask(partial(Get, hashes=part), max_payloads=len(part))))
                    part, waiting = asked[0]
                    answer = await asyncio.shield(waiting)  # cancelled, it is still on its way
                    asked.popleft()
                    checked = check_blocks(answer, part, self._slot_bytes)
                    payloads += checked
                    if len(checked) < len(part):
                        break
        except (TimeoutError, ArenaUnavailable, BadFrame):
            channel.close()
            raise
        finally:
            self._give_back(connection, [waiting for _, waiting in asked if not waiting.done()], deadline_s)

    def _give_back(self, connection: _Connection, late: list[asyncio.Future[Answer]], deadline_s: float) -> None:
        """Ends a turn, once nothing of it is on its way any more."""
        if not late or connection.channel.is_broken:
            connection.turns.release()
            return
        task = asyncio.create_task(_drain(connection, late, deadline_s - time.monotonic()))
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)

    def _connection(self, record: ArenaRecord) -> _Connection:
        now = time.monotonic()
        connection = self._connections.get(record.arena_id)
        if connection is None or connection.channel.is_broken:
            if connection is not None:
                connection.channel.close()
            for arena_id in [name for name, other in self._connections.items() if other.used_at_s < now - _IDLE_S]:
                self._connections.pop(arena_id).channel.close()
            channel = Channel(self._context, record.address, self._slot_bytes, self._curve)
            connection = self._connections[record.arena_id] = _Connection(channel, now)
        connection.used_at_s = now
        return connection


async def _drain(connection: _Connection, late: Sequence[asyncio.Future[Answer]], timeout_s: float) -> None:
    """Drops answers that nobody waits for any more; a store that does not send them is given up like any other."""
    try:
        _, missing = await asyncio.wait(late, timeout=timeout_s)
        if missing:
            connection.channel.close()
    finally:
        connection.turns.release()


def check_blocks(answer: Answer, hashes: Sequence[BlockHash], slot_bytes: int) -> list[Payload]:
    """The leading run of `hashes` that an answer proves to hold. `BadFrame` when it is no answer to them."""
    message = answer.message
    if not isinstance(message, Got) or [block.key for block in message.blocks] != list(hashes[: len(message.blocks)]):
        raise BadFrame("the answer does not fit the question")
    if len(answer.payloads) != len(message.blocks):
        raise BadFrame(f"{len(answer.payloads)} payloads of {len(message.blocks)} blocks")
    payloads: list[Payload] = []
    for block, view in zip(message.blocks, answer.payloads, strict=True):
        if not block.length == len(view) == slot_bytes or xxhash.xxh3_64_intdigest(view) != block.checksum:
            break
        payloads.append(ReceivedPayload(view))
    return payloads
