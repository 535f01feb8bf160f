"""Which wire a reader uses.

With a wire key it is ZeroMQ only, which encrypts: whatever a record says, no block comes unencrypted. Without a key,
blocks come over plain TCP from stores whose records give an address for it, and over ZeroMQ from others.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from kvstore.blocks import BlockHash
from kvstore.records import ArenaRecord
from kvstore.tcp_wire import TcpWire
from kvstore.wire import Capabilities, Outcome, Ticket, Wire
from kvstore.zmq_wire import ZmqWire


def default_wire(slot_bytes: int, wire_key: str) -> Wire:
    """The wire of a client that was given none. Raises ValueError for an invalid wire key."""
    if wire_key:
        return ZmqWire(slot_bytes, wire_key)
    return WireByRecord(TcpWire(slot_bytes), ZmqWire(slot_bytes))


class WireByRecord:
    """A `Wire` that gives each transfer to one of two, by whether the arena's record has a `tcp_address`."""

    def __init__(self, tcp: Wire, other: Wire) -> None:
        self._tcp = tcp
        self._other = other
        self._tickets = itertools.count(1)
        self._transfers: dict[Ticket, tuple[Wire, Ticket]] = {}

    @property
    def capabilities(self) -> Capabilities:
        both = (self._tcp.capabilities, self._other.capabilities)
        return Capabilities(
            max_blocks=min(one.max_blocks for one in both),
            max_bytes=min(one.max_bytes for one in both),
            is_encrypted=all(one.is_encrypted for one in both),
        )

    def submit(
        self,
        record: ArenaRecord,
        hashes: Sequence[BlockHash],
        timeout_s: float,
        into: Sequence[memoryview] | None = None,
    ) -> Ticket:
        ticket, wire = Ticket(next(self._tickets)), self._tcp if record.tcp_address else self._other
        self._transfers[ticket] = wire, wire.submit(record, hashes, timeout_s, into)
        return ticket

    async def poll(self, ticket: Ticket, wait_s: float) -> Outcome:
        wire, its_ticket = self._transfers[ticket]
        return await wire.poll(its_ticket, wait_s)

    def cancel(self, ticket: Ticket) -> None:
        wire, its_ticket = self._transfers.pop(ticket)
        wire.cancel(its_ticket)

    async def close(self) -> None:
        await asyncio.gather(self._tcp.close(), self._other.close())
