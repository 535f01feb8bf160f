"""Blocks over ZeroMQ: one connection to each arena, and a transfer as many small questions in flight at a time.

The blocks of a transfer are requested in parts. While one part is verified, ZeroMQ's own thread receives the next
ones; at most `_AHEAD_BYTES` are requested ahead, which bounds what a reader holds unverified and what a store queues
for it. Transfers over one connection take turns: two at a time, so that one fills the other's gaps.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

import xxhash
import zmq.asyncio

from kvstore.blocks import BlockHash, Payload
from kvstore.channel import Answer, Channel
from kvstore.curve import Curve
from kvstore.errors import ArenaUnavailable, BadFrame
from kvstore.frames import MAX_BLOCKS, MAX_QUESTIONS, Get, Got, part_blocks
from kvstore.memory import reuse_freed_memory
from kvstore.records import ArenaRecord
from kvstore.wire import Capabilities, Outcome, ReceivedPayload, State, Ticket

_TRANSFER_BYTES = 32 << 20
_AHEAD_BYTES = 16 << 20  # more than the bandwidth-delay product of any network between two machines
_KEPT_BYTES = 64 << 20  # of freed memory: what a node fetches in one go
_TURNS = 2  # transfers that request at the same time over one connection
_IDLE_S = 60.0  # a connection unused for this long is closed when the next one is made


class ZmqWire:
    """A `Wire`. With a `wire_key` it reads from stores with the same key; without one, from those without a key."""

    def __init__(self, slot_bytes: int, wire_key: str = "") -> None:
        self._slot_bytes = slot_bytes
        self._curve = Curve(wire_key) if wire_key else None
        self._context = zmq.asyncio.Context()
        self._context.linger = 0
        reuse_freed_memory(_KEPT_BYTES)
        self._connections: dict[str, _Connection] = {}  # by arena id
        self._tickets = itertools.count(1)
        self._transfers: dict[Ticket, _Transfer] = {}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_blocks=MAX_BLOCKS, max_bytes=_TRANSFER_BYTES, is_encrypted=self._curve is not None)

    def submit(
        self,
        record: ArenaRecord,
        hashes: Sequence[BlockHash],
        timeout_s: float,
        into: Sequence[memoryview] | None = None,  # ZeroMQ brings messages in memory of its own
    ) -> Ticket:
        ticket, transfer = Ticket(next(self._tickets)), _Transfer(hashes, self._slot_bytes)
        self._transfers[ticket] = transfer
        try:
            if timeout_s <= 0.0:
                raise ArenaUnavailable("no time was left")
            transfer.begin(self._connection(record), timeout_s)
        except ArenaUnavailable as error:
            transfer.finish(State.FAILED, str(error))
        return ticket

    async def poll(self, ticket: Ticket, wait_s: float) -> Outcome:
        transfer = self._transfers[ticket]
        if not transfer.outcome.done():
            await asyncio.wait([transfer.outcome], timeout=wait_s)
        return transfer.outcome.result() if transfer.outcome.done() else transfer.so_far(State.PENDING)

    def cancel(self, ticket: Ticket) -> None:
        self._transfers.pop(ticket).finish(State.FAILED, "cancelled")

    async def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        await asyncio.sleep(0)  # so that waiting callers are told
        self._context.destroy(linger=0)

    def _connection(self, record: ArenaRecord) -> _Connection:
        now = time.monotonic()
        connection = self._connections.get(record.arena_id)
        if connection is None or connection.channel.is_broken:
            if connection is not None:
                connection.close()
            for arena_id in [name for name, other in self._connections.items() if other.used_at_s < now - _IDLE_S]:
                self._connections.pop(arena_id).close()
            channel = Channel(self._context, record.address, self._slot_bytes, self._curve)
            connection = self._connections[record.arena_id] = _Connection(channel)
        connection.used_at_s = now
        return connection


class _Connection:
    """To one store. A transfer enters, has its turn, and leaves when nothing of it is in flight any more."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.used_at_s = 0.0
        self.asking: list[_Transfer] = []
        self.queue: deque[_Transfer] = deque()
        self._is_choosing = False

    def enter(self, transfer: _Transfer) -> None:
        self.queue.append(transfer)
        self._next()

    def leave(self, transfer: _Transfer) -> None:
        (self.asking if transfer in self.asking else self.queue).remove(transfer)
        self._next()

    def close(self) -> None:
        self.channel.close()
        for transfer in list(self.queue):
            transfer.finish(State.FAILED, "the connection was given up")

    def _next(self) -> None:
        """A transfer that fails at once also leaves at once; the running loop then continues with the next."""
        if self._is_choosing:
            return
        self._is_choosing = True
        while self.queue and len(self.asking) < _TURNS:
            transfer = self.queue.popleft()
            self.asking.append(transfer)
            transfer.take_turn()
        self._is_choosing = False


class _Transfer:
    """One transfer. It keeps its connection as long as anything of it is in flight, even after its outcome."""

    def __init__(self, hashes: Sequence[BlockHash], slot_bytes: int) -> None:
        step = part_blocks(slot_bytes)
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._slot_bytes = slot_bytes
        self._num_ahead = min(MAX_QUESTIONS // _TURNS, max(2, _AHEAD_BYTES // (step * slot_bytes)))
        self._todo = deque(hashes[at : at + step] for at in range(0, len(hashes), step))
        self._asked: deque[tuple[Sequence[BlockHash], asyncio.Future[Answer]]] = deque()
        self._payloads: list[Payload] = []
        self._connection: _Connection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._begun_at_s = 0.0

    def begin(self, connection: _Connection, timeout_s: float) -> None:
        """Queues for its turn."""
        self._begun_at_s = math.inf
        self._connection = connection
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, timeout_s)
        connection.enter(self)

    def take_turn(self) -> None:
        self._begun_at_s = time.monotonic()
        self.advance()

    def so_far(self, state: State, reason: str = "") -> Outcome:
        return Outcome(state, list(self._payloads), reason, self._begun_at_s)

    def finish(self, state: State, reason: str = "") -> None:
        """Requests nothing more. What was already requested still comes, and is dropped."""
        self._todo.clear()
        if not self.outcome.done():
            self.outcome.set_result(self.so_far(state, reason))
        self._leave_if_idle()

    def advance(self) -> None:
        """Takes the answers that have come, in order, and requests more ahead."""
        connection = self._connection
        if connection is None:
            return
        try:
            while self._asked and self._asked[0][1].done():
                self._take(*self._asked.popleft())
            # Many questions at a time, half of what may be in flight: each send wakes four threads.
            num_ahead = self._num_ahead if len(self._asked) <= self._num_ahead // 2 else 0
            while self._todo and len(self._asked) < num_ahead:
                part = self._todo.popleft()
                answer = connection.channel.ask(partial(Get, hashes=part), max_payloads=len(part))
                answer.add_done_callback(lambda _: self.advance())
                self._asked.append((part, answer))
        except (ArenaUnavailable, BadFrame) as error:
            connection.channel.close()
            self.finish(State.FAILED, str(error))
        if not self._todo and not self._asked:
            self.finish(State.COMPLETED)

    def _take(self, part: Sequence[BlockHash], answer: asyncio.Future[Answer]) -> None:
        if self.outcome.done():
            return
        payloads = check_blocks(answer.result(), part, self._slot_bytes)
        self._payloads += payloads
        if len(payloads) < len(part):
            self.finish(State.COMPLETED)

    def _expire(self, timeout_s: float) -> None:
        """Gives up a store that owes an answer by now, unless other answers came meanwhile."""
        connection = self._connection
        if connection is None:
            return
        left_s = connection.channel.arrived_s + timeout_s - time.monotonic()
        if left_s > 0.0:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._expire, timeout_s)
            return
        is_owed = bool(self._asked)
        self.finish(State.FAILED, f"nothing came for {timeout_s:.1f} s")
        if is_owed:
            connection.channel.close()

    def _leave_if_idle(self) -> None:
        if self._connection is None or self._asked:
            return
        connection, self._connection = self._connection, None
        if self._timer is not None:
            self._timer.cancel()
        connection.leave(self)


def check_blocks(answer: Answer, hashes: Sequence[BlockHash], slot_bytes: int) -> list[Payload]:
    """The leading run of `hashes` that an answer verifiably holds. Raises `BadFrame` when it does not answer them."""
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
