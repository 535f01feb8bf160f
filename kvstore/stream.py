"""Messages on a byte stream: each is two lengths, its frame, and what follows the frame. Pure; knows no socket.

The frames are those of `kvstore.frames`; only a `Told` is followed by anything, namely its JSON.
"""

from __future__ import annotations

import struct

from kvstore.errors import BadFrame
from kvstore.frames import MAX_FRAME_BYTES, Message, decode

_LENGTHS = struct.Struct("<II")  # of the frame, and of what follows it, in bytes
HEAD_BYTES = _LENGTHS.size


def pack(message: Message, tail: bytes = b"") -> bytes:
    """The bytes to send. Raises ValueError when the message exceeds a limit."""
    frame = message.encode()
    return b"".join((_LENGTHS.pack(len(frame), len(tail)), frame, tail))


def parse_head(head: bytes | bytearray) -> tuple[int, int]:
    """The lengths of a frame and of what follows it, from the `HEAD_BYTES` before them. They are not checked yet."""
    frame_bytes, tail_bytes = _LENGTHS.unpack(head)
    return frame_bytes, tail_bytes


class Unpacker:
    """One direction of one connection. It keeps at most one incomplete message, and what was fed last."""

    def __init__(self, max_tail_bytes: int = 0) -> None:
        self._max_tail_bytes = max_tail_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Adds received bytes; afterwards `take` must be called until it returns None."""
        self._buffer += data

    def take(self) -> tuple[Message, bytes] | None:
        """The next message and what follows it; None while it is incomplete.

        Raises `BadFrame` for an invalid message as soon as that is known, which may be with its lengths. The stream
        cannot be parsed after that.
        """
        if len(self._buffer) < _LENGTHS.size:
            return None
        frame_bytes, tail_bytes = _LENGTHS.unpack_from(self._buffer)
        if frame_bytes > MAX_FRAME_BYTES or tail_bytes > self._max_tail_bytes:
            raise BadFrame(f"frame of {frame_bytes} bytes and {tail_bytes} behind it")
        tail_at = _LENGTHS.size + frame_bytes
        end = tail_at + tail_bytes
        if len(self._buffer) < end:
            return None
        message = decode(bytes(self._buffer[_LENGTHS.size : tail_at]))
        tail = bytes(self._buffer[tail_at:end])
        del self._buffer[:end]
        return message, tail
