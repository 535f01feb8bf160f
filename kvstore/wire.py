"""What brings blocks from another machine's arena to this one, whatever it is made of: capabilities, submit, poll.

A wire moves bytes and checks them; whom to ask for which block, how long to wait, and whom to leave alone for a while
is its caller's affair. Two ship, `kvstore/zmq_wire.py` and `kvstore/tcp_wire.py`; `kvstore/wires.py` says which is used
when. RDMA would be another class with these methods.
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
    """What one transfer may ask for, at most; a single block may always be asked for."""

    max_blocks: int
    max_bytes: int
    is_encrypted: bool  # nobody on the way can read or change what is sent

    def num_blocks(self, slot_bytes: int) -> int:
        """Blocks of this size that one transfer may ask for."""
        return max(1, min(self.max_blocks, self.max_bytes // slot_bytes))


@dataclass(frozen=True)
class Outcome:
    """How a transfer stands. `payloads` is the leading run of blocks that came so far and were found to be right.

    COMPLETED with fewer than were asked for: the arena does not have the next one (any more), or not those bytes.
    FAILED: something is wrong with the arena or the way to it, and `reason` tells what.

    `begun_at_s` is when its turn came, by the monotonic clock, in a wire where transfers take turns; `math.inf` while
    it waits for it. Who asked an arena for nothing yet has learned nothing of it.
    """

    state: State
    payloads: Sequence[Payload] = ()
    reason: str = ""
    begun_at_s: float = 0.0


class Wire(Protocol):
    """All methods are called on one event loop, and none raises: what goes wrong is an `Outcome`."""

    @property
    def capabilities(self) -> Capabilities: ...

    def submit(
        self,
        record: ArenaRecord,
        hashes: Sequence[BlockHash],
        timeout_s: float,
        into: Sequence[memoryview] | None = None,
    ) -> Ticket:
        """Begins to bring these blocks from that arena, and returns at once.

        FAILED once nothing came from that arena for `timeout_s`, for this transfer or another: one that waits for
        others on a slow link is not at fault. How long all of it may take is its caller's affair, who may `cancel`.

        `into` has for each block where its reader wants it in the end: writable, of the block's size. A wire that can
        receives there and nowhere else, until `cancel`; others bring blocks in memory of their own. Whatever lies in
        such a view counts only as an outcome's payload.
        """
        ...

    async def poll(self, ticket: Ticket, wait_s: float) -> Outcome:
        """How the transfer stands, as soon as it is not PENDING any more, and after `wait_s` at the latest."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Nobody will ask for this transfer again, done or not: what it holds is let go. Each ticket needs it, once.

        When it returns, nothing is written any more `into` what `submit` was given.
        """
        ...

    async def close(self) -> None:
        """Ends all transfers and connections."""
        ...


@dataclass(frozen=True)
class ReceivedPayload:
    """A block that came over a wire, checked, in memory of its own, or of its reader's where that was given."""

    view: memoryview

    def is_valid(self) -> bool:
        return True
