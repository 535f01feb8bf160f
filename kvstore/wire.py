"""The interface of what brings blocks here from another machine's arena: capabilities, submit, poll.

A wire moves bytes and verifies them; whom to ask for which block, how long to wait, and whom to avoid for a while
is up to its caller. Two ship, `kvstore/zmq_wire.py` and `kvstore/tcp_wire.py`; `kvstore/wires.py` chooses between them.
RDMA would be another class with these methods.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from kvstore.blocks import BlockHash, Payload
from kvstore.records import ArenaRecord

Ticket = NewType("Ticket", int)  # names one transfer of one wire


class State(enum.Enum):
    PENDING = "pending"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """The most that one transfer may ask for; a single block may always be asked for."""

    max_blocks: int
    max_bytes: int
    is_encrypted: bool  # encrypted and authenticated

    def num_blocks(self, slot_bytes: int) -> int:
        """Blocks of this size that one transfer may ask for."""
        return max(1, min(self.max_blocks, self.max_bytes // slot_bytes))


@dataclass(frozen=True)
class Outcome:
    """The state of a transfer. `payloads` is the leading run of blocks that have arrived and were verified.

    COMPLETED with fewer than requested: the arena does not have the next one (any more), or has other bytes for it.
    FAILED: something is wrong with the arena or the way to it; `reason` says what.

    `begun_at_s` is when the transfer's turn came, by the monotonic clock, on a wire where transfers take turns, and
    `math.inf` until then: a transfer that has requested nothing yet says nothing about the arena.
    """

    state: State
    payloads: Sequence[Payload] = ()
    reason: str = ""
    begun_at_s: float = 0.0


class Wire(Protocol):
    """All methods are called on one event loop, and none raises: a failure is an `Outcome`."""

    @property
    def capabilities(self) -> Capabilities: ...

    def submit(
        self,
        record: ArenaRecord,
        hashes: Sequence[BlockHash],
        timeout_s: float,
        into: Sequence[memoryview] | None = None,
    ) -> Ticket:
        """Begins to transfer these blocks from that arena, and returns at once.

        The transfer is FAILED once nothing has come from that arena for `timeout_s`, for this transfer or another: one
        that waits behind others on a slow link is not at fault. The total time is up to the caller, who may `cancel`.

        `into` has each block's final place: writable, of the block's size. A wire that can receives there and nowhere
        else, until `cancel`; others use memory of their own. The contents of such a view count only once an outcome's
        payloads include it.
        """
        ...

    async def poll(self, ticket: Ticket, wait_s: float) -> Outcome:
        """The state of the transfer, as soon as it is not PENDING any more, or after `wait_s` at the latest."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Ends this transfer, done or not, and releases what it holds. To be called exactly once for each ticket.

        When it returns, nothing is written any more to the views that `submit` got as `into`.
        """
        ...

    async def close(self) -> None:
        """Ends all transfers and connections."""
        ...


@dataclass(frozen=True)
class ReceivedPayload:
    """A verified block that came over a wire, in memory of its own, or in its reader's if that was given."""

    view: memoryview

    def is_valid(self) -> bool:
        return True
