"""A transfer over plain TCP, from its turn to its end, and the connections to one arena that transfers share.

The path between a reader and its blocks is kept short: if a connection is free the question is sent at once, a
thread receives from then on, and sets the outcome at the end; the event loop runs only once in between.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from kvstore.blocks import BlockHash
from kvstore.errors import ArenaUnavailable, BadFrame
from kvstore.frames import Get
from kvstore.patience import Patience
from kvstore.stream import pack
from kvstore.tcp_receiver import Receiver
from kvstore.tcp_sockets import tune
from kvstore.wire import Outcome, State

logger = logging.getLogger(__name__)

_CONNECTIONS = 2  # to one arena


class Link:
    """The way to one arena: idle connections, and a queue of transfers that wait for one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.used_at_s = 0.0
        self._idle: list[socket.socket] = []
        self._is_closed = False
        self._moving: set[Transfer] = set()
        self._queue: deque[Transfer] = deque()
        self._is_choosing = False
        self._received_bytes = 0  # by others before them

    def num_bytes(self) -> int:
        """Bytes received over it so far."""
        return self._received_bytes + sum(transfer.receiver.num_bytes for transfer in self._moving)

    def enter(self, transfer: Transfer) -> None:
        """Queues a transfer; its `begin` is called when it is its turn, perhaps at once."""
        self._queue.append(transfer)
        self._next()

    def leave(self, transfer: Transfer, stream: socket.socket | None) -> None:
        """Removes a transfer, before its turn or after it; `stream` is a connection others may reuse, or None."""
        if transfer in self._moving:
            self._moving.remove(transfer)
            self._received_bytes += transfer.receiver.num_bytes
        else:
            self._queue.remove(transfer)
        if stream is not None and not self._is_closed:
            self._idle.append(stream)
        elif stream is not None:
            stream.close()
        self._next()

    def take(self) -> socket.socket | None:
        """An idle connection that the store has not closed, or None."""
        while self._idle:
            stream = self._idle.pop()
            try:
                stream.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return stream
            except OSError:
                pass
            stream.close()  # closed, or has sent unrequested data
        return None

    def close(self) -> None:
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()

    def _next(self) -> None:
        """A transfer that fails at once also leaves at once; the running loop then continues with the next."""
        if self._is_choosing:
            return
        self._is_choosing = True
        while self._queue and len(self._moving) < _CONNECTIONS:
            transfer = self._queue.popleft()
            self._moving.add(transfer)
            transfer.begin()
        self._is_choosing = False


class Transfer:
    """One transfer. `over` says that it has ended and nothing of it is left.

    All methods except `_receive` run on the event loop.
    """

    def __init__(
        self, request_id: int, hashes: Sequence[BlockHash], slot_bytes: int, into: Sequence[memoryview] | None
    ) -> None:
        self.receiver = Receiver(request_id, hashes, slot_bytes, into)
        self.outcome: Outcome | None = None
        self._begun_at_s = 0.0
        self._loop = asyncio.get_running_loop()
        self.over: asyncio.Future[None] = self._loop.create_future()
        self._question = pack(Get(request_id, hashes))
        self._waiting: set[asyncio.Future[None]] = set()
        self._link: Link | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._stream: socket.socket | None = None
        self._has_thread = False
        self._preparing: asyncio.Task[socket.socket] | None = None
        self._patience: Patience | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, link: Link, threads: ThreadPoolExecutor, patience_s: float) -> None:
        """Queues for its turn."""
        self._begun_at_s = math.inf
        self._link, self._threads = link, threads
        self._patience = Patience(patience_s, link.num_bytes(), time.monotonic())
        self._timer = self._loop.call_later(self._patience.look_s, self._look)
        link.enter(self)

    def begin(self) -> None:
        """It is its turn. If a connection is idle the question is sent now, before anything else is prepared."""
        assert self._link is not None
        self._begun_at_s = time.monotonic()
        self._stream = self._link.take()
        if self._stream is not None:
            with suppress(OSError):  # no room, or an error that shows again when the rest is sent
                self._question = self._question[self._stream.send(self._question) :]
            if not self._question:
                self._pull()
                return
        self._preparing = self._loop.create_task(self._prepare(self._link.address))
        self._preparing.add_done_callback(self._prepared)

    async def wait(self, wait_s: float) -> None:
        """Returns as soon as there is an outcome, or after `wait_s` at the latest."""
        if self.outcome is not None:
            return
        waiting = self._loop.create_future()
        self._waiting.add(waiting)
        timer = self._loop.call_later(wait_s, _wake, waiting)
        try:
            await waiting
        finally:
            timer.cancel()
            self._waiting.discard(waiting)

    def so_far(self, state: State, reason: str = "") -> Outcome:
        return Outcome(state, list(self.receiver.payloads), reason, self._begun_at_s)

    def finish(self, state: State, reason: str = "") -> None:
        """Sets the outcome (the first one counts); nothing is written for this transfer any more."""
        self.receiver.stop()
        if self._preparing is not None:
            self._preparing.cancel()
        if not self._has_thread and self._preparing is None:
            self._let_go()  # first, so that a reader that continues at once finds the connection
        if self.outcome is None:
            self.outcome = self.so_far(state, reason)
            for waiting in self._waiting:
                _wake(waiting)

    async def _prepare(self, address: str) -> socket.socket:
        """A connection over which the question was sent."""
        stream, self._stream = self._stream or await _connect(address), None
        try:
            await self._loop.sock_sendall(stream, self._question)
        except BaseException:
            stream.close()
            raise
        return stream

    def _prepared(self, preparing: asyncio.Task[socket.socket]) -> None:
        self._preparing = None
        if preparing.cancelled():
            self.finish(State.FAILED, "cancelled")
        elif (error := preparing.exception()) is not None:
            self._fail(error)
        else:
            self._stream = preparing.result()
            self._pull()

    def _pull(self) -> None:
        if self.outcome is not None:
            self._let_go()
            return
        assert self._threads is not None and self._stream is not None
        self._has_thread = True
        self._threads.submit(self._receive, self._stream)

    def _receive(self, stream: socket.socket) -> None:
        """Runs on a thread while anything comes."""
        is_done = True
        error: Exception | None = None
        try:
            is_done = self.receiver.pull(stream)
        except Exception as raised:
            error = raised
        self._loop.call_soon_threadsafe(self._pulled, is_done, error)

    def _pulled(self, is_done: bool, error: Exception | None) -> None:
        self._has_thread = False
        if error is not None:
            self._fail(error)
        elif is_done or self.outcome is not None:
            self.finish(State.COMPLETED)
        else:
            assert self._stream is not None
            self._loop.add_reader(self._stream, self._readable)

    def _readable(self) -> None:
        assert self._stream is not None
        self._loop.remove_reader(self._stream)
        self._pull()

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, OSError | UnicodeError | BadFrame | ArenaUnavailable):
            logger.error("event=transfer_failed socket=tcp", exc_info=error)
        self.finish(State.FAILED, f"{self._link.address if self._link else ''}: {error}")

    def _look(self) -> None:
        assert self._link is not None and self._patience is not None
        if self._patience.is_over(self._link.num_bytes(), time.monotonic()):
            self.finish(State.FAILED, f"nothing came for {self._patience.patience_s:.1f} s")
        else:
            self._timer = self._loop.call_later(self._patience.look_s, self._look)

    def _let_go(self) -> None:
        if self.over.done():
            return
        self.over.set_result(None)
        stream, self._stream = self._stream, None
        if self._timer is not None:
            self._timer.cancel()
        if stream is not None:
            self._loop.remove_reader(stream)
            if not self.receiver.is_in_step:
                stream.close()
                stream = None
        if self._link is not None:
            self._link.leave(self, stream)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


async def _connect(address: str) -> socket.socket:
    """A connection to "tcp://host:port". Raises OSError or `ArenaUnavailable` when it cannot be made."""
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
