"""The store's side of the TCP wire: questions in, blocks straight out of the slots, without a copy of our own.

A question is a `Get` of any number of blocks, with its lengths before it; the answer is described in
`kvstore/tcp_receiver.py`. A slot may be reused while it is being sent; the reader's checksum catches that. A peer that
sends anything else, or does not read, is disconnected. A reader's cost is bounded: one question at a time is looked up,
a window of it ahead, and the kernel keeps one send buffer.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from kvstore.errors import BadFrame
from kvstore.frames import Get, Got, stream_parts
from kvstore.local import to_end
from kvstore.stream import Unpacker, pack
from kvstore.tcp_sockets import lingering, tune, writable

logger = logging.getLogger(__name__)

Find = Callable[[Get], Awaitable[tuple[Got, Sequence[int]]]]
"""What there is of what a question asks for, and in which slots. Must not raise."""

_MAX_READERS = 128  # connections at a time; each may make the kernel keep `SEND_BUFFER_BYTES`
_THREADS = 2  # that send
# Three parts are looked up ahead: the later a part is looked up, the less likely it is evicted while being sent.
_WINDOW_BYTES = 18 << 20
_FIRST_QUESTION_S = 5.0  # how long a peer that asks nothing may hold a descriptor
_NEXT_QUESTION_S = 120.0
_STALL_S = 5.0  # how long a reader may accept nothing of its answer
_READ_BYTES = 1 << 16
_MAX_BUFFERS = 512  # per call; the kernel takes 1024
_ACCEPT_PAUSE_S = 0.1  # when no descriptor is left
_LOG_EVERY_S = 1.0


class TcpDoor:
    """A listening socket and its connections. All methods belong to one event loop."""

    def __init__(
        self,
        find: Find,
        view: Callable[[int], memoryview],
        slot_bytes: int,
        refuse: Callable[[BadFrame], None],
    ) -> None:
        """`view` gives a slot's bytes; `refuse` is told of invalid questions."""
        self._find = find
        self._view = view
        self._slot_bytes = slot_bytes
        self._refuse = refuse
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-tcp")
        self._readers: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.Task[None], None] = {}  # those that may ask now; idle for longest first
        self._num_ended = self._num_refused = 0  # because all connections were taken
        self._told_s = -math.inf
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    @property
    def num_readers(self) -> int:
        """The number of open connections."""
        return len(self._readers)

    async def open(self, bind_host: str, advertise_host: str) -> str:
        """Listens at a port that the kernel chooses; returns the address for others. Raises OSError if it cannot."""
        self._listener = await asyncio.to_thread(_listen, bind_host)
        self._accepting = asyncio.create_task(self._accept(self._listener))
        return f"tcp://{advertise_host}:{self._listener.getsockname()[1]}"

    async def close(self) -> None:
        """Ends all connections. Idempotent."""
        tasks = [task for task in (self._accepting, *self._readers) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        self._threads.shutdown()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                stream, _ = await loop.sock_accept(listener)
            except OSError as error:
                logger.warning("event=accept_failed socket=tcp error=%r", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if len(self._readers) >= _MAX_READERS and not self._make_room():
                stream.close()
                continue
            task = asyncio.create_task(self._serve(stream))
            self._readers.add(task)
            task.add_done_callback(self._readers.discard)

    def _make_room(self) -> bool:
        """Ends the connection that has been idle for longest; its reader opens another when it needs one.

        Returns False if all connections are being answered.
        """
        longest = next(iter(self._waiting), None)
        if longest is None:
            self._num_refused += 1
        else:
            self._num_ended += 1
            del self._waiting[longest]
            longest.cancel()
        if time.monotonic() >= self._told_s + _LOG_EVERY_S:
            self._told_s = time.monotonic()
            words = "event=readers_full socket=tcp readers=%d ended=%d refused=%d"
            logger.warning(words, _MAX_READERS, self._num_ended, self._num_refused)
        return longest is not None

    async def _serve(self, stream: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            tune(stream)
            unpacker, patience_s = Unpacker(), _FIRST_QUESTION_S
            while True:
                self._waiting[task] = None
                async with asyncio.timeout(patience_s):
                    question = await _question(stream, unpacker)
                del self._waiting[task]
                await self._answer(stream, question)
                patience_s = _NEXT_QUESTION_S
        except BadFrame as error:
            self._refuse(error)
        except TimeoutError:
            logger.info("event=reader_given_up socket=tcp")
        except OSError:
            pass  # it went away
        except Exception:
            logger.exception("event=message_failed socket=tcp")
        finally:
            self._waiting.pop(task, None)
            stream.close()

    async def _answer(self, stream: socket.socket, question: Get) -> None:
        """Sends the first part while the next ones are looked up."""
        outbox = _Outbox(stream, self._threads)
        try:
            num_ahead = 0
            for indices in stream_parts(len(question.hashes), self._slot_bytes):
                part = question.hashes[indices.start : indices.stop]
                if num_ahead and (num_ahead + len(part)) * self._slot_bytes > _WINDOW_BYTES:
                    await outbox.drain()
                    num_ahead = 0
                num_ahead += len(part)
                got, slots = await self._find(Get(question.request_id, part))
                outbox.put([memoryview(pack(got)), *map(self._view, slots)])
                if len(slots) < len(part):
                    break
            await outbox.drain()
        finally:
            await outbox.close()


class _Outbox:
    """What is to be sent over one connection, in order. Not usable after an error."""

    def __init__(self, stream: socket.socket, threads: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._threads = threads
        self._rest: deque[memoryview] = deque()
        self._pushing: asyncio.Future[None] | None = None
        self._is_begun = False

    def put(self, buffers: Sequence[memoryview]) -> None:
        """Queues buffers behind earlier ones, and returns at once. Raises OSError when the reader is gone.

        As much of the first part as the kernel takes is sent from here: another thread would be slower to start.
        """
        self._rest.extend(buffers)
        if self._pushing is not None:
            if not self._pushing.done():
                return
            self._pushing.result()
        if not self._is_begun:
            self._is_begun = True
            with suppress(BlockingIOError):
                _send_some(self._stream, self._rest)
        if self._rest:
            self._push()

    async def drain(self) -> None:
        """Waits until all is sent. Raises OSError when the reader is gone, TimeoutError when it takes nothing."""
        while self._pushing is not None:
            await asyncio.shield(self._pushing)
            self._pushing = None
            if self._rest:
                async with asyncio.timeout(_STALL_S):
                    await writable(self._stream)
                self._push()

    async def close(self) -> None:
        """Returns when no thread uses the connection any more. Undrained data is given up, with the connection."""
        if self._pushing is not None:
            with suppress(OSError):
                self._stream.shutdown(socket.SHUT_RDWR)
            await to_end([self._pushing])
            self._pushing.exception()  # nobody else will ask for it

    def _push(self) -> None:
        loop = asyncio.get_running_loop()
        self._pushing = loop.run_in_executor(self._threads, _push, self._stream, self._rest)


def _push(stream: socket.socket, rest: deque[memoryview]) -> None:
    """Sends while the reader accepts data; the remainder stays in `rest`. Raises OSError when the reader is gone."""
    with lingering(stream), suppress(BlockingIOError):
        while rest:
            _send_some(stream, rest)


def _send_some(stream: socket.socket, rest: deque[memoryview]) -> None:
    num_bytes = stream.sendmsg(list(itertools.islice(rest, _MAX_BUFFERS)))
    while rest and num_bytes >= len(rest[0]):
        num_bytes -= len(rest.popleft())
    if num_bytes:
        rest[0] = rest[0][num_bytes:]


async def _question(stream: socket.socket, unpacker: Unpacker) -> Get:
    """The next question. Raises `BadFrame` for anything else, OSError when the reader went away."""
    loop = asyncio.get_running_loop()
    while (taken := unpacker.take()) is None:
        data = await loop.sock_recv(stream, _READ_BYTES)
        if not data:
            raise ConnectionResetError
        unpacker.feed(data)
    message, _ = taken
    if not isinstance(message, Get) or not message.hashes:
        raise BadFrame(f"{type(message).__name__} is no question to this socket")
    return message


def _listen(host: str) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(where)
        listener.listen(_MAX_READERS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{host}: {error}") from error
    return listener
