"""Questions and answers over one ZeroMQ socket: many under way at once, each with its own time-out.

An answer is matched by the id of its question; one that comes too late, or that nobody can read, is dropped. When the
other side goes away, as a killed process does, all questions under way fail at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import zmq
import zmq.asyncio

from kvstore.curve import CURVE_BYTES, Curve
from kvstore.errors import ArenaUnavailable, BadFrame
from kvstore.frames import MAX_FRAME_BYTES, Message, decode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """One answer; `payloads` are the frames behind it, in memory of their own."""

    message: Message
    payloads: list[memoryview]


class Channel:
    """A connection to one store. Whoever gets an `ArenaUnavailable` closes it and makes a new one.

    With `curve` it is encrypted, and a store that cannot prove to be one of the cluster's is no store.
    """

    def __init__(
        self, context: zmq.asyncio.Context, address: str, max_payload_bytes: int = 0, curve: Curve | None = None
    ) -> None:
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        try:
            self._socket = context.socket(zmq.DEALER)
        except zmq.ZMQError as error:  # no descriptor is left
            raise ArenaUnavailable(f"{address}: {error}") from error
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max(MAX_FRAME_BYTES, max_payload_bytes) + CURVE_BYTES)
        try:
            if curve is not None:
                curve.identify(self._socket)
            self._socket.connect(address)
            self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ArenaUnavailable(f"{address}: {error}") from error
        self.is_broken = False  # the other side went away; a new channel may find it again
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]

    async def request(self, question: Callable[[int], Message], timeout_s: float) -> Answer:
        """Sends `question(request id)` and returns the answer. `ArenaUnavailable` after `timeout_s`, or when closed."""
        if self.is_broken:
            raise ArenaUnavailable("the connection is broken")
        request_id = next(self._ids)
        waiting = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = waiting
        try:
            async with asyncio.timeout(timeout_s):
                await self._socket.send(question(request_id).encode())
                answer: Answer = await waiting
                return answer
        except TimeoutError as error:
            raise ArenaUnavailable(f"no answer within {timeout_s:.1f} s") from error
        except zmq.ZMQError as error:
            raise ArenaUnavailable(str(error)) from error
        finally:
            del self._waiting[request_id]

    def close(self) -> None:
        """Closes the connection; questions under way fail with `ArenaUnavailable`. Idempotent."""
        if self._socket.closed:
            return
        for task in self._tasks:
            task.cancel()
        self._break("the connection was given up")
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def _break(self, reason: str) -> None:
        self.is_broken = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ArenaUnavailable(reason))

    async def _watch(self) -> None:
        await self._monitor.recv_multipart()
        self._break("the store is gone")

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            try:
                message = decode(frames[0].buffer)
            except BadFrame as error:
                logger.warning("event=bad_answer error=%r", error)
                continue
            waiting = self._waiting.get(message.request_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(Answer(message, [frame.buffer for frame in frames[1:]]))
