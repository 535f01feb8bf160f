"""Receives one answer of a store over TCP: block after block into memory, verified on the way. Knows no event loop.

An answer is one message (`Got`, with lengths before it) for each of `stream_parts`, followed by the blocks it names;
one that names fewer than its part is the last. Nothing received decides where data goes or how much of it: the
reader knows the size of a block and how many it asked for.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress

import numpy as np
import xxhash

from kvstore.blocks import BlockHash
from kvstore.errors import BadFrame
from kvstore.frames import Got, decode, stream_parts
from kvstore.stream import HEAD_BYTES, pack, parse_head
from kvstore.tcp_sockets import lingering
from kvstore.wire import ReceivedPayload

_PIECE_BYTES = 512 << 10  # received at a time: small enough to be checksummed from the cache, and stopped soon


class Receiver:
    """Receives the answer to `hashes`. `payloads` is the leading run that has come and was verified; it only grows."""

    def __init__(
        self, request_id: int, hashes: Sequence[BlockHash], slot_bytes: int, into: Sequence[memoryview] | None = None
    ) -> None:
        """Blocks go `into` these views of `slot_bytes`, one per hash, or into memory of their own."""
        self.payloads: list[ReceivedPayload] = []
        self.num_bytes = 0  # that came, right or not
        self.is_in_step = False  # the answer is complete, and the connection can be reused
        self._request_id = request_id
        self._hashes = hashes
        self._slot_bytes = slot_bytes
        # Allocated here: memory freed by the thread that allocated it is reused soonest.
        self._into = into if into is not None else [np.empty(slot_bytes, np.uint8).data for _ in hashes]
        self._is_stopped = False
        self._guard = threading.Lock()
        self._steps = self._receive()
        self._rest = next(self._steps)

    def pull(self, stream: socket.socket) -> bool:
        """Receives while anything comes, on the calling thread. Returns whether the answer is complete.

        Raises `BadFrame` for an invalid answer, OSError when the connection ends; must not be called again after that.
        """
        with lingering(stream), suppress(BlockingIOError):
            while self._receive_some(stream):
                if not len(self._rest):
                    following = next(self._steps, None)
                    if following is None:
                        return True
                    self._rest = following
            return True
        return False

    def stop(self) -> None:
        """When this returns, nothing is written any more by any thread. May be called by any thread, repeatedly.

        It waits for one kernel call at most: one piece, or `LINGER_S`.
        """
        with self._guard:
            self._is_stopped = True

    def _receive_some(self, stream: socket.socket) -> bool:
        with self._guard:
            if self._is_stopped:
                return False
            num_bytes = stream.recv_into(self._rest, 0, socket.MSG_WAITALL)
        if not num_bytes:
            raise ConnectionResetError("the store hung up")
        self.num_bytes += num_bytes
        self._rest = self._rest[num_bytes:]
        return True

    def _receive(self) -> Iterator[memoryview]:
        """Yields the next memory to fill; when it is resumed, that has been filled."""
        for indices in stream_parts(len(self._hashes), self._slot_bytes):
            part = self._hashes[indices.start : indices.stop]
            got = yield from self._receive_message(part)
            for index, block in zip(indices, got.blocks, strict=False):
                view = self._into[index]
                digest = xxhash.xxh3_64()
                for at in range(0, self._slot_bytes, _PIECE_BYTES):
                    piece = view[at : at + _PIECE_BYTES]
                    yield piece
                    digest.update(piece)
                if digest.intdigest() != block.checksum:
                    return  # the slot was reused meanwhile; the rest is useless
                self.payloads.append(ReceivedPayload(view))
            if len(got.blocks) < len(part):
                break
        self.is_in_step = True

    def _receive_message(self, part: Sequence[BlockHash]) -> Generator[memoryview, None, Got]:
        head = bytearray(HEAD_BYTES)
        yield memoryview(head)
        frame_bytes, tail_bytes = parse_head(head)
        if tail_bytes or not 0 < frame_bytes <= len(pack(Got(0, ()))) - HEAD_BYTES + len(part) * Got.item.size:
            raise BadFrame(f"an answer of {frame_bytes} bytes and {tail_bytes} behind it")
        frame = bytearray(frame_bytes)
        yield memoryview(frame)
        message = decode(bytes(frame))
        if not isinstance(message, Got) or message.request_id != self._request_id:
            raise BadFrame("the answer does not fit the question")
        if [block.key for block in message.blocks] != list(part[: len(message.blocks)]):
            raise BadFrame("the answer has other blocks than were asked for")
        if any(block.length != self._slot_bytes for block in message.blocks):
            raise BadFrame("the answer has blocks of another size")
        return message
