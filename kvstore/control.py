"""The control socket of a store: questions and answers between processes of one machine, over a Unix stream.

Reserve and commit are on the path of each block that is published, so what counts is the time of a round trip: a
stream on the event loop takes a quarter of what ZeroMQ takes with its threads. `ControlChannel` is the side of writers
and operators; `ControlDoor` is the store's.

The kernel closes a dead process's sockets, so the end of the stream says at once that the other side is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from kvstore.channel import Answer
from kvstore.errors import ArenaUnavailable, BadFrame
from kvstore.frames import MAX_TOLD_BYTES, Message
from kvstore.stream import Unpacker, pack

logger = logging.getLogger(__name__)

MAX_QUESTIONS = 64  # in flight on one connection
MAX_POSTED = 16  # of these, for whose answers nobody waits
MAX_PEERS = 512
_MAX_UNREAD_BYTES = 1 << 20  # buffered for a peer that does not read
_BACKLOG = 16
_RETRY_S = 0.005

# The packed answer to a question, or an awaitable of it. Raises `BadFrame` for what is not a question to this store.
Serve = Callable[[Message], bytes | Coroutine[Any, Any, bytes]]


class ControlChannel(asyncio.Protocol):
    """A connection to this machine's store. After an `ArenaUnavailable` it must be closed, and a new one made."""

    def __init__(self, path: Path) -> None:
        """Connects with the first question."""
        self._path = path
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._turns = asyncio.Semaphore(MAX_QUESTIONS - MAX_POSTED)
        self._unpacker = Unpacker(MAX_TOLD_BYTES)
        self._connecting: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self.is_broken = False  # the store went away; a new channel may reach it again

    async def request(self, question: Callable[[int], Message], timeout_s: float) -> Answer:
        """The answer to `question(request id)`. Raises `ArenaUnavailable` after `timeout_s`, or when closed."""
        try:
            async with asyncio.timeout(timeout_s), self._turns:
                transport = self._transport or await self._connect()
                request_id = next(self._ids)
                waiting = self._waiting[request_id] = asyncio.get_running_loop().create_future()
                try:
                    self._send(transport, pack(question(request_id)))
                    answer: Answer = await waiting
                    return answer
                finally:
                    del self._waiting[request_id]
        except TimeoutError as error:
            raise ArenaUnavailable(f"no answer within {timeout_s:.1f} s") from error

    @property
    def is_open(self) -> bool:
        """Whether there is a connection; the first question opens it."""
        return self._transport is not None

    def post(self, question: Callable[[int], Message], heard: Callable[[Message], None]) -> None:
        """Sends `question(request id)` without waiting; `heard` is called with the answer, if one comes.

        Only while `is_open`, and at most `MAX_POSTED` at a time. Anything after the answer's frame is ignored.
        """
        if self._transport is None:
            raise ArenaUnavailable("there is no connection")
        request_id = next(self._ids)
        waiting = self._waiting[request_id] = asyncio.get_running_loop().create_future()

        def done(answer: asyncio.Future[Answer]) -> None:
            del self._waiting[request_id]
            if not answer.cancelled() and answer.exception() is None:
                heard(answer.result().message)

        waiting.add_done_callback(done)
        self._send(self._transport, pack(question(request_id)))

    def close(self) -> None:
        """Closes the connection; questions in flight fail with `ArenaUnavailable`. Idempotent."""
        self._break("the connection was given up")
        if self._connecting is not None:
            self._connecting.cancel()

    async def _connect(self) -> asyncio.Transport:
        if self._connecting is None and not self.is_broken:
            self._connecting = asyncio.create_task(self._open())
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())  # or nobody asks
        if self._connecting is not None:
            await asyncio.wait([self._connecting])
            if not self._connecting.cancelled() and (error := self._connecting.exception()) is not None:
                self._break(str(error))
                raise ArenaUnavailable(f"{self._path}: {error}") from error
        if self._transport is None:
            raise ArenaUnavailable("the connection is broken")
        return self._transport

    async def _open(self) -> None:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            while True:
                try:
                    stream.connect(str(self._path))
                    break
                except BlockingIOError:  # others wait to be let in; asyncio would take this for a connection
                    await asyncio.sleep(_RETRY_S)
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=stream)
        except BaseException:
            stream.close()
            raise

    def _send(self, transport: asyncio.Transport, data: bytes) -> None:
        transport.write(data)
        if transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self._break("the store does not read")

    # --- the event loop's calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self.is_broken:
            transport.abort()
        else:
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        try:
            while (taken := self._unpacker.take()) is not None:
                message, tail = taken
                waiting = self._waiting.get(message.request_id)
                if waiting is not None and not waiting.done():  # else it comes too late
                    waiting.set_result(Answer(message, [memoryview(tail)] if tail else []))
        except BadFrame as error:
            logger.warning("event=bad_answer socket=control error=%r", str(error))
            self._break(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._break("the store is gone")

    def _break(self, reason: str) -> None:
        self.is_broken = True
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ArenaUnavailable(reason))


class ControlDoor:
    """Answers all who connect, from `open` to `close`, both on one event loop.

    `refuse` is told of each peer that sends an invalid message, or more than a peer may; the peer is disconnected.
    """

    def __init__(self, serve: Serve, refuse: Callable[[BadFrame], None]) -> None:
        self.serve = serve
        self.refuse = refuse
        self.peers: set[_Peer] = set()
        self._server: asyncio.Server | None = None

    async def open(self, path: Path) -> None:
        """Listens at `path`, where only this user can connect. Raises OSError if it cannot."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            path.chmod(0o600)  # before anybody can connect: the folder may be older than this store, with a wider mode
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(lambda: _Peer(self), sock=listener, backlog=_BACKLOG)
        except OSError:
            listener.close()
            raise

    async def close(self) -> None:
        """Disconnects everybody. Idempotent."""
        if self._server is not None:
            self._server.close()
        answers = [task for peer in self.peers for task in peer.cut_off()]
        await asyncio.gather(*answers, return_exceptions=True)


class _Peer(asyncio.Protocol):
    """One connection, as the store sees it."""

    def __init__(self, door: ControlDoor) -> None:
        self._door = door
        self._unpacker = Unpacker()
        self._under_way: set[asyncio.Task[bytes]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._door.peers.add(self)
        if len(self._door.peers) > MAX_PEERS:
            logger.warning("event=too_many_peers socket=control")
            self.cut_off()

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        try:
            num_questions = len(self._under_way)
            while not self._transport.is_closing() and (taken := self._unpacker.take()) is not None:
                num_questions += 1
                if num_questions > MAX_QUESTIONS:
                    raise BadFrame(f"more than {MAX_QUESTIONS} questions at a time")
                self._answer(self._door.serve(taken[0]))
        except BadFrame as error:
            self.cut_off()
            self._door.refuse(error)
        except Exception:  # whatever one message causes, others are served
            logger.exception("event=message_failed socket=control")
            self.cut_off()

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.peers.discard(self)
        self.cut_off()

    def cut_off(self) -> list[asyncio.Task[bytes]]:
        """Disconnects; cancels the answers in preparation, for which nobody waits any more, and returns them."""
        self._transport.abort()
        for task in self._under_way:
            task.cancel()
        return list(self._under_way)

    def _answer(self, answer: bytes | Coroutine[Any, Any, bytes]) -> None:
        if isinstance(answer, bytes):
            self._send(answer)
            return
        task = asyncio.create_task(answer)
        self._under_way.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[bytes]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            self._send(task.result())

    def _send(self, answer: bytes) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(answer)
        if self._transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            logger.warning("event=cut_off socket=control error='it does not read'")
            self.cut_off()
