"""Questions and answers over one ZeroMQ socket, many in flight at once.

An answer is matched by the id of its question; one that comes too late is dropped. When the other side goes away, as a
killed process does, all questions in flight fail at once. So they do when it sends something that is not an answer, or
too much that was not requested, be it in whole messages or in one that never ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq
import zmq.asyncio

from kvstore.curve import CURVE_BYTES, Curve
from kvstore.errors import ArenaUnavailable, BadFrame
from kvstore.frames import MAX_FRAME_BYTES, MAX_QUESTIONS, Message, decode
from kvstore.inbox import Inbox, plain_socket
from kvstore.meter import Meter

logger = logging.getLogger(__name__)

_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
_EVENT = struct.Struct("=HI")  # event, value: of EVENT_CONNECTED the descriptor
_MAX_UNASKED = 64  # consecutive messages that answer no question in flight
_UNASKED_BYTES = 8 << 20  # and bytes, beyond what was requested
_FRAME_BYTES = 16 + CURVE_BYTES  # what the wire adds to a frame, at most
_METER_S = 0.05


@dataclass(frozen=True)
class Answer:
    """One answer; `payloads` are the frames after it, in memory of their own."""

    message: Message
    payloads: list[memoryview]


@dataclass(frozen=True)
class _Question:
    answer: asyncio.Future[Answer]
    max_bytes: int  # of the answer, as it crosses the wire


class Channel:
    """A connection to one store. A caller that gets an `ArenaUnavailable` must close it and make a new one.

    With `curve` it is encrypted, and a store that cannot prove that it belongs to the cluster is not accepted.
    """

    def __init__(
        self, context: zmq.asyncio.Context, address: str, max_payload_bytes: int = 0, curve: Curve | None = None
    ) -> None:
        self._address = address
        self._max_payload_bytes = max_payload_bytes
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Question] = {}
        self._num_unasked = 0
        self._arrived_bytes = 0  # in whole messages
        sockets: list[zmq.Socket[bytes]] = []
        try:
            for kind in (zmq.DEALER, zmq.PAIR):
                sockets.append(plain_socket(context, kind))
            self._socket, self._monitor = sockets
            self._connect(curve)
        except zmq.ZMQError as error:  # a bad address, or no descriptor is left
            for socket in sockets:
                socket.close(linger=0)
            raise ArenaUnavailable(f"{address}: {error}") from error
        self.arrived_s = 0.0  # when the last message came, by the monotonic clock
        self.is_broken = False  # the other side went away; a new channel may reach it again
        self._inboxes = [Inbox(self._socket, self._take), Inbox(self._monitor, self._watch)]
        self._limiter: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Questions under way."""
        return len(self._waiting)

    def ask(self, question: Callable[[int], Message], max_payloads: int = 0) -> asyncio.Future[Answer]:
        """Sends `question(request id)` and returns a future of the answer, with at most `max_payloads` payloads.

        Raises `ArenaUnavailable` when the connection is broken; the future fails with it if that happens later.
        """
        if self.is_broken:
            raise ArenaUnavailable("the connection is broken")
        request_id = next(self._ids)
        answer = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._end(request_id))
        max_bytes = MAX_FRAME_BYTES + _FRAME_BYTES + max_payloads * (self._max_payload_bytes + _FRAME_BYTES)
        self._waiting[request_id] = _Question(answer, max_bytes)
        try:
            self._socket.send(question(request_id).encode(), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            answer.cancel()
            raise ArenaUnavailable(f"{self._address}: {error}") from error
        self._inboxes[0].wake()
        return answer

    async def request(self, question: Callable[[int], Message], timeout_s: float) -> Answer:
        """The answer to `question(request id)`. Raises `ArenaUnavailable` after `timeout_s`, or when closed."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self.ask(question)
        except TimeoutError as error:
            raise ArenaUnavailable(f"no answer within {timeout_s:.1f} s") from error

    def close(self) -> None:
        """Closes the connection; questions in flight fail with `ArenaUnavailable`. Idempotent."""
        if self._socket.closed:
            return
        if self._limiter is not None:
            self._limiter.cancel()
        self._break("the connection was given up")
        for inbox in self._inboxes:
            inbox.close()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def _connect(self, curve: Curve | None) -> None:
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 2 * MAX_QUESTIONS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max(MAX_FRAME_BYTES, self._max_payload_bytes) + CURVE_BYTES)
        if curve is not None:
            curve.identify(self._socket)
        self._socket.monitor(f"inproc://channel-{id(self)}", _EVENTS)
        self._monitor.connect(f"inproc://channel-{id(self)}")
        self._socket.connect(self._address)

    def _end(self, request_id: int) -> None:
        question = self._waiting.pop(request_id)
        if not question.answer.cancelled():
            question.answer.exception()  # perhaps nobody else will ask for it

    def _break(self, reason: str) -> None:
        self.is_broken = True
        for question in self._waiting.values():
            if not question.answer.done():
                question.answer.set_exception(ArenaUnavailable(reason))

    def _cut_off(self, reason: str) -> None:
        """Disconnects at once, so that nothing more of what the other side sends is buffered."""
        logger.warning("event=cut_off address=%s error=%r", self._address, reason)
        self._break(reason)
        self.close()

    def _watch(self, frames: list[zmq.Frame]) -> None:
        event, value = _EVENT.unpack(frames[0].buffer)
        if event != zmq.EVENT_CONNECTED:
            self._break("the store is gone")
        elif self._limiter is None:
            self._limiter = asyncio.create_task(self._limit(value))

    async def _limit(self, descriptor: int) -> None:
        """Checks periodically whether more came than was requested, including parts of incomplete messages."""
        try:
            meter = Meter(descriptor)
        except OSError:  # it is gone again
            return
        try:
            while meter.received_bytes() <= self._allowed_bytes:
                await asyncio.sleep(_METER_S)
            self._cut_off("it sends more than it was asked for")
        except OSError as error:
            self._cut_off(str(error))
        finally:
            meter.close()

    @property
    def _allowed_bytes(self) -> int:
        asked_bytes = sum(question.max_bytes for question in self._waiting.values())
        return self._arrived_bytes + asked_bytes + _UNASKED_BYTES

    def _take(self, frames: list[zmq.Frame]) -> None:
        self.arrived_s = time.monotonic()
        self._arrived_bytes += sum(len(frame) + _FRAME_BYTES for frame in frames)
        try:
            message = decode(frames[0].buffer)
        except BadFrame as error:
            self._cut_off(str(error))
            return
        question = self._waiting.get(message.request_id)
        if question is not None and not question.answer.done():
            self._num_unasked = 0
            question.answer.set_result(Answer(message, [frame.buffer for frame in frames[1:]]))
            return
        self._num_unasked += 1
        if self._num_unasked > _MAX_UNASKED:
            self._cut_off(f"{self._num_unasked} messages that nobody asked for")
