"""Bytes that came over a TCP connection, as the kernel counts them.

ZeroMQ delivers whole messages and keeps the parts of one that never ends, and offers no way to see how many it keeps.
"""

from __future__ import annotations

import os
import socket
import struct

_BYTES_RECEIVED_AT = 128  # in struct tcp_info; Linux 4.1 and later
_BYTES_RECEIVED = struct.Struct("=Q")


class Meter:
    """Counts one connection for as long as it is open. Holds a file descriptor of its own until `close`."""

    def __init__(self, descriptor: int) -> None:
        """Raises OSError when that is not a TCP connection, or not any more."""
        self._socket = socket.socket(fileno=os.dup(descriptor))
        try:
            self.received_bytes()
        except OSError:
            self.close()
            raise

    def received_bytes(self) -> int:
        """All bytes since the connection was made. Raises OSError when the kernel does not tell."""
        size = _BYTES_RECEIVED_AT + _BYTES_RECEIVED.size
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
        if len(info) < size:
            raise OSError("the kernel does not count received bytes")
        return int(_BYTES_RECEIVED.unpack_from(info, _BYTES_RECEIVED_AT)[0])

    def cut_off(self) -> None:
        """Ends the connection, for both sides. Raises OSError when it has already ended."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
