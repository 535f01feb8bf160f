"""Receives blocks from other machines in the engine's own memory, if a wire can write there.

Knows neither wires nor what a match means. Blocks received in place are imported without a copy; others are copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from engine.loans import Loan
from engine.loop import EngineLoop
from engine.request import Request
from kvstore.blocks import Payload
from kvstore.client import Match
from kvstore.quotas import Owner
from node.intake import Intake


@contextlib.contextmanager
def landing(loop: EngineLoop, request: Request, num_blocks: int) -> Iterator[Landing]:
    """Memory for the next `num_blocks` of a held request. Nothing may be written to it after the context ends."""
    loan = loop.engine.lend_blocks(request, num_blocks)
    strip = Landing(loop, loan, num_blocks)
    try:
        yield strip
    finally:
        if loan is not None:
            loop.post(lambda engine: engine.end_loan(loan, strip.kept_ids))


class Landing:
    """The memory of one fetch. `views` has one view per block, or is None: then blocks come in memory of their own."""

    def __init__(self, loop: EngineLoop, loan: Loan | None, num_blocks: int) -> None:
        self.kept_ids: list[int] = []  # blocks that others still read when the fetch is over
        self._loop = loop
        self._loan = loan
        self.views = loan.views if loan is not None and len(loan.views) == num_blocks else None

    def keep(self, intake: Intake, match: Match, imported: Sequence[Payload], owner: Owner) -> None:
        """Publishes imported blocks on this machine, straight from the engine's memory, pinned until that is done."""
        let_go: dict[int, Callable[[], object]] = {}
        for index, payload in enumerate(imported):
            if self._loan is not None and self.views is not None and payload.view is self.views[index]:
                let_go[index] = partial(self._unpin, self._loan.block_ids[index])
        taken = intake.keep(match, imported, owner, let_go)
        if self._loan is not None:
            self.kept_ids = [self._loan.block_ids[index] for index in taken]

    def _unpin(self, block_id: int) -> None:
        self._loop.post(lambda engine: engine.unpin([block_id]))
