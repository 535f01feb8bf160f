"""Disconnects peers that send a store a message that never ends.

ZeroMQ delivers whole messages and bounds the size of each frame, but not their number; it keeps them all until the last
one. The kernel counts the bytes of each connection, so the excess over what was delivered can be determined.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Sequence
from typing import Any

import zmq
import zmq.asyncio

from kvstore.curve import CURVE_BYTES
from kvstore.inbox import Inbox, plain_socket
from kvstore.meter import Meter

logger = logging.getLogger(__name__)

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_EVENT = struct.Struct("=HI")  # event, value: the descriptor
_FRAME_BYTES = 16 + CURVE_BYTES  # what the wire adds to a frame, at most
_UNTAKEN_BYTES = 8 << 20  # beyond what was delivered: whole questions may be queued
_LOOK_S = 0.1


class FloodGuard:
    """Watches all connections of a listening socket. Holds a descriptor for each while it is open."""

    def __init__(self, context: zmq.asyncio.Context, listener: zmq.Socket[Any]) -> None:
        """To be created before the socket is bound."""
        address = f"inproc://flood-{id(self)}"
        listener.monitor(address, _EVENTS)
        self._listener = listener
        self._monitor = plain_socket(context, zmq.PAIR)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._monitor.connect(address)
        self._inbox = Inbox(self._monitor, self._watch)
        self._meters: dict[int, Meter] = {}  # by ZeroMQ's descriptor
        self._taken_bytes: dict[int, int] = {}

    def took(self, frames: Sequence[zmq.Frame]) -> None:
        """ZeroMQ delivered a message."""
        try:
            descriptor = int(frames[-1].get(zmq.SRCFD))
        except zmq.ZMQError:  # ZeroMQ does not know it any more
            return
        if descriptor in self._meters:
            self._taken_bytes[descriptor] += sum(len(frame) + _FRAME_BYTES for frame in frames)

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for descriptor in list(self._meters):
                self._look(descriptor)

    def close(self) -> None:
        """To be called before the listener is closed."""
        if self._monitor.closed:
            return
        self._inbox.close()
        self._listener.disable_monitor()
        self._monitor.close(linger=0)
        for descriptor in list(self._meters):
            self._forget(descriptor)

    def _look(self, descriptor: int) -> None:
        meter = self._meters[descriptor]
        try:
            if meter.received_bytes() <= self._taken_bytes[descriptor] + _UNTAKEN_BYTES:
                return
            logger.warning("event=cut_off socket=data error='it sends a message without an end'")
            meter.cut_off()
        except OSError:
            pass  # it is gone already
        self._forget(descriptor)

    def _watch(self, frames: list[zmq.Frame]) -> None:
        event, descriptor = _EVENT.unpack(frames[0].buffer)
        self._forget(descriptor)
        if event == zmq.EVENT_ACCEPTED:
            try:
                self._meters[descriptor] = Meter(descriptor)
                self._taken_bytes[descriptor] = 0
            except OSError:
                pass  # it is gone already

    def _forget(self, descriptor: int) -> None:
        meter = self._meters.pop(descriptor, None)
        if meter is not None:
            meter.close()
            del self._taken_bytes[descriptor]
