"""Blocks of held requests that wires write into, and that nobody else may get meanwhile.

`lend` may be called on any thread, everything else on the engine's. A held request's blocks are its own until it is
released or aborted, so lending takes no reference; ending the request first pins what it has lent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.request import Request, RequestStatus


@dataclass(eq=False)
class Loan:
    """Blocks right after what a held request has computed, and their memory. Ends with `Engine.end_loan`, once."""

    request_id: str
    block_ids: Sequence[int]
    views: Sequence[memoryview]  # writable, one a block
    is_pinned: bool = False  # the request is not held any more


class Loans:
    """The books. A request may have several loans while the end of one is on its way to the engine's thread."""

    def __init__(self, pin: Callable[[Sequence[int]], None], unpin: Callable[[Sequence[int]], None]) -> None:
        self._pin = pin
        self._unpin = unpin
        self._guard = threading.Lock()
        self._loans: dict[str, list[Loan]] = {}  # by request, while it is held

    def lend(
        self, request: Request, first: int, end: int, views: Callable[[Sequence[int]], Sequence[memoryview]]
    ) -> Loan | None:
        """Lends the blocks `[first, end)` of a request's block table. None if the request is not held."""
        with self._guard:
            if request.status is not RequestStatus.HELD:
                return None
            block_ids = request.block_table[first:end]
            loan = Loan(request.request_id, block_ids, views(block_ids))
            if not loan.views:
                return None
            self._loans.setdefault(request.request_id, []).append(loan)
            return loan

    def part(self, request_id: str, end_hold: Callable[[], None]) -> None:
        """Runs `end_hold`, after which the request is not held any more; what it has lent stays pinned."""
        with self._guard:
            for loan in self._loans.pop(request_id, ()):
                loan.is_pinned = True
                self._pin(loan.block_ids)
            end_hold()

    def end(self, loan: Loan, kept_ids: Sequence[int]) -> None:
        """Nobody writes into them any more. `kept_ids` of them are pinned from here on."""
        with self._guard:
            self._pin(kept_ids)
            if loan.is_pinned:
                self._unpin(loan.block_ids)
                return
            lent = self._loans[loan.request_id]
            lent.remove(loan)
            if not lent:
                del self._loans[loan.request_id]
