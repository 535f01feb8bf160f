"""Blocks over plain TCP: received where they are to lie, and checked while the next ones come.

A connection carries one transfer at a time. An arena has two at most, so that one fills the other's gaps; a transfer
that ends before its answer does costs its connection. Nothing is encrypted: see `kvstore/wires.py` for who may use it.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from kvstore.blocks import BlockHash
from kvstore.errors import ArenaUnavailable, BadFrame
from kvstore.frames import MAX_BLOCKS, Get
from kvstore.local import to_end
from kvstore.memory import reuse_freed_memory
from kvstore.patience import Standstill, while_moving
from kvstore.records import ArenaRecord
from kvstore.stream import pack
from kvstore.tcp_receiver import Receiver
from kvstore.tcp_sockets import readable, tune
from kvstore.wire import Capabilities, Outcome, State, Ticket

_TRANSFER_BYTES = 32 << 20
_KEPT_BYTES = 64 << 20  # of freed memory: what a node fetches in one go
_CONNECTIONS = 2  # to one arena
_THREADS = 2  # that receive
_IDLE_S = 60.0  # an arena that nobody read from for so long is left when the next one is read from


class TcpWire:
    """A `Wire` to arenas whose records have a `tcp_address`."""

    def __init__(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-tcp")
        reuse_freed_memory(_KEPT_BYTES)
        self._links: dict[str, _Link] = {}  # by arena id
        self._tickets = itertools.count(1)
        self._transfers: dict[Ticket, _Transfer] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_blocks=MAX_BLOCKS, max_bytes=_TRANSFER_BYTES, is_encrypted=False)

    def submit(
        self,
        record: ArenaRecord,
        hashes: Sequence[BlockHash],
        timeout_s: float,
        into: Sequence[memoryview] | None = None,
    ) -> Ticket:
        ticket = Ticket(next(self._tickets))
        transfer = self._transfers[ticket] = _Transfer(ticket, hashes, self._slot_bytes, into)
        if timeout_s <= 0.0:
            transfer.finish(State.FAILED, "no time was left")
        elif self._is_closed:
            transfer.finish(State.FAILED, "the wire is closed")
        else:
            transfer.task = asyncio.create_task(self._run(transfer, self._link(record), timeout_s))
            self._running.add(transfer.task)
            transfer.task.add_done_callback(self._running.discard)
        return ticket

    async def poll(self, ticket: Ticket, wait_s: float) -> Outcome:
        transfer = self._transfers[ticket]
        if not transfer.outcome.done():
            await asyncio.wait([transfer.outcome], timeout=wait_s)
        return transfer.outcome.result() if transfer.outcome.done() else transfer.so_far(State.PENDING)

    def cancel(self, ticket: Ticket) -> None:
        self._transfers.pop(ticket).cancel()

    async def close(self) -> None:
        self._is_closed = True
        for transfer in self._transfers.values():
            transfer.cancel()
        if self._running:
            await asyncio.wait(self._running)
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._threads.shutdown()

    def _link(self, record: ArenaRecord) -> _Link:
        now_s = time.monotonic()
        for arena_id in [name for name, link in self._links.items() if link.used_at_s < now_s - _IDLE_S]:
            self._links.pop(arena_id).close()
        link = self._links.get(record.arena_id)
        if link is None or link.address != record.tcp_address:
            if link is not None:
                link.close()
            link = self._links[record.arena_id] = _Link(record.tcp_address)
        link.used_at_s = now_s
        return link

    async def _run(self, transfer: _Transfer, link: _Link, timeout_s: float) -> None:
        """Whatever happens, the transfer has an outcome, and nothing is written for it any more."""
        try:
            await while_moving(self._in_turn(transfer, link), link.num_bytes, timeout_s)
            transfer.finish(State.COMPLETED)
        except Standstill:
            transfer.finish(State.FAILED, f"nothing came for {timeout_s:.1f} s")
        except (OSError, UnicodeError, BadFrame, ArenaUnavailable) as error:
            transfer.finish(State.FAILED, f"{link.address}: {error}")
        finally:
            transfer.finish(State.FAILED, "cancelled")

    async def _in_turn(self, transfer: _Transfer, link: _Link) -> None:
        async with link.turns:
            with link.counting(transfer.receiver):
                await self._bring(transfer.receiver, transfer.question, link)

    async def _bring(self, receiver: Receiver, question: bytes, link: _Link) -> None:
        stream = link.take() or await _connect(link.address)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(stream, question)
            while not await self._pull(receiver, stream):
                await readable(stream)
        finally:
            if receiver.is_in_step:
                link.give_back(stream)
            else:
                stream.close()

    async def _pull(self, receiver: Receiver, stream: socket.socket) -> bool:
        pulling = asyncio.get_running_loop().run_in_executor(self._threads, receiver.pull, stream)
        try:
            return await asyncio.shield(pulling)
        finally:
            if not pulling.done():  # somebody cancelled; the thread still has the descriptor
                receiver.stop()
                await to_end([pulling])


class _Link:
    """To one arena: connections without a transfer, and turns for those that need one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.used_at_s = 0.0
        self.turns = asyncio.Semaphore(_CONNECTIONS)
        self._idle: list[socket.socket] = []
        self._is_closed = False
        self._receiving: list[Receiver] = []
        self._received_bytes = 0  # by others before them

    def num_bytes(self) -> int:
        """That came over it so far."""
        return self._received_bytes + sum(receiver.num_bytes for receiver in self._receiving)

    @contextmanager
    def counting(self, receiver: Receiver) -> Iterator[None]:
        """Inside, what it receives counts."""
        self._receiving.append(receiver)
        try:
            yield
        finally:
            self._receiving.remove(receiver)
            self._received_bytes += receiver.num_bytes

    def take(self) -> socket.socket | None:
        """One that the store has not closed meanwhile."""
        while self._idle:
            stream = self._idle.pop()
            try:
                stream.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return stream
            except OSError:
                pass
            stream.close()  # closed, or it says what nobody asked for
        return None

    def give_back(self, stream: socket.socket) -> None:
        if self._is_closed:
            stream.close()
        else:
            self._idle.append(stream)

    def close(self) -> None:
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()


class _Transfer:
    """One transfer. `finish` counts the first time."""

    def __init__(
        self, ticket: Ticket, hashes: Sequence[BlockHash], slot_bytes: int, into: Sequence[memoryview] | None
    ) -> None:
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.question = pack(Get(ticket, hashes))
        self.receiver = Receiver(ticket, hashes, slot_bytes, into)
        self.task: asyncio.Task[None] | None = None

    def so_far(self, state: State, reason: str = "") -> Outcome:
        return Outcome(state, list(self.receiver.payloads), reason)

    def finish(self, state: State, reason: str = "") -> None:
        if not self.outcome.done():
            self.receiver.stop()
            self.outcome.set_result(self.so_far(state, reason))

    def cancel(self) -> None:
        """From here on nothing is written for it."""
        self.finish(State.FAILED, "cancelled")
        if self.task is not None:
            self.task.cancel()


async def _connect(address: str) -> socket.socket:
    """A connection to "tcp://host:port". OSError or `ArenaUnavailable` when there is none."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ArenaUnavailable("is no address")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    family, kind, protocol, _, where = found[0]
    stream = socket.socket(family, kind, protocol)
    try:
        tune(stream)
        await loop.sock_connect(stream, where)
    except BaseException:
        stream.close()
        raise
    return stream
