"""What both ends of the TCP wire do with a socket: wait for it on the event loop, and move bytes on a thread meanwhile.

Bytes move on threads, in calls of the kernel that take many at a time, and a thread is with a connection only while
they do: once nothing moved for `LINGER_S` it comes back, and the event loop waits for all that are silent.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LINGER_S = 0.002
SEND_BUFFER_BYTES = 4 << 20  # what the kernel keeps for one reader; with less, sender and reader wait for each other
_MIN_SEND_BUFFER_BYTES = 1 << 20
_TIMEVAL = struct.Struct("@ll")  # seconds, microseconds
_WMEM_MAX = Path("/proc/sys/net/core/wmem_max")


async def readable(stream: socket.socket) -> None:
    """Returns when there is something to receive, or the other side went away."""
    loop = asyncio.get_running_loop()
    await _event(stream, loop.add_reader, loop.remove_reader)


async def writable(stream: socket.socket) -> None:
    """Returns when there is room to send, or the other side went away."""
    loop = asyncio.get_running_loop()
    await _event(stream, loop.add_writer, loop.remove_writer)


async def _event(stream: socket.socket, add: Callable[..., None], remove: Callable[[int], object]) -> None:
    descriptor, event = stream.fileno(), asyncio.Event()
    add(descriptor, event.set)
    try:
        await event.wait()
    finally:
        remove(descriptor)


@contextmanager
def lingering(stream: socket.socket) -> Iterator[None]:
    """For a thread: calls wait meanwhile, `LINGER_S` at most; where nothing moved they raise BlockingIOError then."""
    stream.setblocking(True)
    try:
        yield
    finally:
        with suppress(OSError):
            stream.setblocking(False)


def tune(stream: socket.socket) -> None:
    """Sends at once, and much ahead where the machine allows it. The kernel's own choice is better than a small one."""
    stream.setblocking(False)
    with suppress(OSError):  # not a TCP connection any more
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            stream.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(0, round(1e6 * LINGER_S)))
        limit = _send_buffer_limit()
        if limit >= _MIN_SEND_BUFFER_BYTES:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, min(limit, SEND_BUFFER_BYTES))


def _send_buffer_limit() -> int:
    try:
        return int(_WMEM_MAX.read_text())
    except (OSError, ValueError):
        return 0
