"""Blocks over plain TCP: received into their final place, and verified while the next ones come.

A connection carries one transfer at a time. An arena has at most two, so that one fills the other's gaps; a transfer
that ends before its answer does costs its connection. Nothing is encrypted: see `kvstore/wires.py` for when it is used.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvstore.blocks import BlockHash
from kvstore.frames import MAX_BLOCKS
from kvstore.memory import reuse_freed_memory
from kvstore.records import ArenaRecord
from kvstore.tcp_transfer import Link, Transfer
from kvstore.wire import Capabilities, Outcome, State, Ticket

_TRANSFER_BYTES = 32 << 20
_KEPT_BYTES = 64 << 20  # of freed memory: what a node fetches in one go
_THREADS = 2  # that receive
_IDLE_S = 60.0  # connections to an arena unused for this long are closed when another is read from


class TcpWire:
    """A `Wire` to arenas whose records have a `tcp_address`."""

    def __init__(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-tcp")
        reuse_freed_memory(_KEPT_BYTES)
        self._links: dict[str, Link] = {}  # by arena id
        self._tickets = itertools.count(1)
        self._transfers: dict[Ticket, Transfer] = {}
        self._running: set[Transfer] = set()
        self._is_closed = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_blocks=MAX_BLOCKS, max_bytes=_TRANSFER_BYTES, is_encrypted=False)

    def submit(
        self,
        record: ArenaRecord,
        hashes: Sequence[BlockHash],
        timeout_s: float,
        into: Sequence[memoryview] | None = None,
    ) -> Ticket:
        ticket = Ticket(next(self._tickets))
        transfer = self._transfers[ticket] = Transfer(ticket, hashes, self._slot_bytes, into)
        self._running.add(transfer)
        transfer.over.add_done_callback(lambda _: self._running.discard(transfer))
        if timeout_s <= 0.0:
            transfer.finish(State.FAILED, "no time was left")
        elif self._is_closed:
            transfer.finish(State.FAILED, "the wire is closed")
        else:
            transfer.start(self._link(record), self._threads, timeout_s)
        return ticket

    async def poll(self, ticket: Ticket, wait_s: float) -> Outcome:
        transfer = self._transfers[ticket]
        await transfer.wait(wait_s)
        return transfer.outcome or transfer.so_far(State.PENDING)

    def cancel(self, ticket: Ticket) -> None:
        self._transfers.pop(ticket).finish(State.FAILED, "cancelled")

    async def close(self) -> None:
        self._is_closed = True
        for transfer in list(self._running):
            transfer.finish(State.FAILED, "cancelled")
        if self._running:
            await asyncio.wait([transfer.over for transfer in self._running])
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._threads.shutdown()

    def _link(self, record: ArenaRecord) -> Link:
        now_s = time.monotonic()
        for arena_id in [name for name, link in self._links.items() if link.used_at_s < now_s - _IDLE_S]:
            self._links.pop(arena_id).close()
        link = self._links.get(record.arena_id)
        if link is None or link.address != record.tcp_address:
            if link is not None:
                link.close()
            link = self._links[record.arena_id] = Link(record.tcp_address)
        link.used_at_s = now_s
        return link
