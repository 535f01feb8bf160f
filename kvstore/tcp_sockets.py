"""Socket handling of both ends of the TCP wire: wait on the event loop, move bytes on threads.

Bytes move on threads, in large kernel calls, and a thread stays with a connection only while they move: once nothing
has moved for `LINGER_S` it returns, and the event loop waits for all silent connections.
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
    """For a thread: inside, calls block for at most `LINGER_S`, then raise BlockingIOError if nothing moved."""
    stream.setblocking(True)
    try:
        yield
    finally:
        with suppress(OSError):
            stream.setblocking(False)


def tune(stream: socket.socket) -> None:
    """Disables Nagle, and enlarges the send buffer if the machine allows it; the default is better than a small one."""
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
