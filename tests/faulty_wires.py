"""Wires for tests: one that carries blocks inside a process, and one that spoils what another one does."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import xxhash
from kvstore_support import content

from kvstore.blocks import BlockHash, Payload
from kvstore.records import ArenaRecord
from kvstore.wire import Capabilities, Outcome, ReceivedPayload, State, Ticket, Wire


class MemoryWire:
    """A `Wire` to arenas that are dicts. It does what a wire has to: checks what it brings, and keeps its time."""

    def __init__(self, max_blocks: int = 8, delay_s: float = 0.0) -> None:
        self.arenas: dict[str, dict[BlockHash, bytes]] = {}
        self.submitted: list[tuple[str, int]] = []  # arena id, number of blocks
        self.open: set[Ticket] = set()
        self.is_closed = False
        self._capabilities = Capabilities(max_blocks=max_blocks, max_bytes=1 << 40, is_encrypted=False)
        self._delay_s = delay_s
        self._tickets = itertools.count(1)
        self._ends: dict[Ticket, tuple[float, Outcome]] = {}

    def hold(self, arena_id: str, hashes: Sequence[BlockHash]) -> None:
        self.arenas[arena_id] = {block_hash: content(block_hash) for block_hash in hashes}

    def corrupt(self, arena_id: str, block_hash: BlockHash) -> None:
        held = self.arenas[arena_id]
        held[block_hash] = bytes([held[block_hash][0] ^ 1]) + held[block_hash][1:]

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def submit(
        self,
        record: ArenaRecord,
        hashes: Sequence[BlockHash],
        timeout_s: float,
        into: Sequence[memoryview] | None = None,
    ) -> Ticket:
        assert 0 < len(hashes) <= self._capabilities.max_blocks and timeout_s >= 0.0
        self.submitted.append((record.arena_id, len(hashes)))
        ticket = Ticket(next(self._tickets))
        self.open.add(ticket)
        outcome = self._outcome(record.arena_id, hashes)
        if self._delay_s >= timeout_s:
            outcome = Outcome(State.FAILED, reason=f"no answer within {timeout_s:.1f} s")
        self._ends[ticket] = (time.monotonic() + min(self._delay_s, timeout_s), outcome)
        return ticket

    def _outcome(self, arena_id: str, hashes: Sequence[BlockHash]) -> Outcome:
        held = self.arenas.get(arena_id)
        if held is None:
            return Outcome(State.FAILED, reason="the store is gone")
        payloads: list[Payload] = []
        for block_hash in hashes:
            data = held.get(block_hash, b"")
            if xxhash.xxh3_64_intdigest(data) != xxhash.xxh3_64_intdigest(content(block_hash)):
                break
            payloads.append(ReceivedPayload(memoryview(data)))
        return Outcome(State.COMPLETED, payloads)

    async def poll(self, ticket: Ticket, wait_s: float) -> Outcome:
        ends_s, outcome = self._ends[ticket]
        await asyncio.sleep(max(0.0, min(wait_s, ends_s - time.monotonic())))
        return outcome if time.monotonic() >= ends_s else Outcome(State.PENDING)

    def cancel(self, ticket: Ticket) -> None:
        self.open.remove(ticket)
        del self._ends[ticket]

    async def close(self) -> None:
        self.is_closed = True


@dataclass(frozen=True)
class Fault:
    """What happens to one transfer."""

    is_refused: bool = False  # the wire beneath never hears of it
    is_endless: bool = False  # it stays PENDING, whatever the wire beneath says
    delay_s: float = 0.0  # it stays PENDING for so long
    change: Callable[[Outcome], Outcome] = lambda outcome: outcome  # of what the wire beneath says when it is done


def refused() -> Fault:
    return Fault(is_refused=True)


def endless() -> Fault:
    return Fault(is_endless=True)


def delayed(delay_s: float) -> Fault:
    return Fault(delay_s=delay_s)


def failed_at_the_end() -> Fault:
    """All came, and then something was wrong: what is known to be right may be used."""
    return Fault(change=lambda outcome: replace(outcome, state=State.FAILED, reason="spoiled"))


def failed_with_nothing() -> Fault:
    return Fault(change=lambda outcome: Outcome(State.FAILED, reason="spoiled"))


def shortened(num_blocks: int) -> Fault:
    return Fault(change=lambda outcome: replace(outcome, payloads=outcome.payloads[:num_blocks]))


class FaultyWire:
    """A `Wire` that does to the transfers of `inner`, in the order of their submits, what `faults` says."""

    def __init__(self, inner: Wire) -> None:
        self.inner = inner
        self.faults: dict[int, Fault] = {}  # number of the submit, from 0 -> what happens to it
        self.num_submitted = 0
        self._faults: dict[Ticket, tuple[Fault, float]] = {}  # and when it began
        self._refused = itertools.count(-1, -1)

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def submit(
        self,
        record: ArenaRecord,
        hashes: Sequence[BlockHash],
        timeout_s: float,
        into: Sequence[memoryview] | None = None,
    ) -> Ticket:
        fault = self.faults.get(self.num_submitted, Fault())
        self.num_submitted += 1
        ticket = Ticket(next(self._refused)) if fault.is_refused else self.inner.submit(record, hashes, timeout_s, into)
        self._faults[ticket] = (fault, time.monotonic())
        return ticket

    async def poll(self, ticket: Ticket, wait_s: float) -> Outcome:
        fault, began_s = self._faults[ticket]
        if fault.is_refused:
            return Outcome(State.FAILED, reason="refused")
        deadline_s = time.monotonic() + wait_s
        if fault.is_endless or began_s + fault.delay_s > deadline_s:
            await asyncio.sleep(wait_s)
            return Outcome(State.PENDING)
        await asyncio.sleep(max(0.0, began_s + fault.delay_s - time.monotonic()))
        outcome = await self.inner.poll(ticket, max(0.0, deadline_s - time.monotonic()))
        return outcome if outcome.state is State.PENDING else fault.change(outcome)

    def cancel(self, ticket: Ticket) -> None:
        fault, _ = self._faults.pop(ticket)
        if not fault.is_refused:
            self.inner.cancel(ticket)

    async def close(self) -> None:
        await self.inner.close()
