"""A ZeroMQ socket on an event loop without a future per message: messages are handed on at once, in bursts.

Small parts of many blocks need this: pyzmq's own asyncio sockets take longer for a message than verifying it takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

Take = Callable[[list[zmq.Frame]], None]

_BURST = 64  # messages, before the event loop runs other tasks


def plain_socket(context: zmq.asyncio.Context, kind: zmq.SocketType) -> zmq.Socket[bytes]:
    """A socket whose methods do not wait. Raises `zmq.ZMQError` when no file descriptor is left."""
    return context.socket(kind, zmq.Socket)  # type: ignore[arg-type, return-value]


class Inbox:
    """Calls `take` with each message that `socket` receives, until it is closed. `take` must not raise.

    The socket's descriptor signals a change only once, and sending may consume the signal: call `wake` after sending.
    """

    def __init__(self, socket: zmq.Socket[Any], take: Take) -> None:
        self._socket = socket
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._is_woken = False
        self._loop.add_reader(self._descriptor, self._receive)
        self.wake()

    def wake(self) -> None:
        """Looks for messages soon."""
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._receive)

    def close(self) -> None:
        """To be called before the socket is closed. Idempotent."""
        if not self._socket.closed:
            self._loop.remove_reader(self._descriptor)

    def _receive(self) -> None:
        self._is_woken = False
        for _ in range(_BURST):
            if self._socket.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._take(frames)
        self.wake()
