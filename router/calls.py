"""One node's Decode calls, kept when a leg has ended well and reused for the next leg's Admit.

Opening a call costs the router, and the node, three times what its messages cost. A call that a node has ended
meanwhile is dropped; whether it ended before reading an Admit shows in the answer (`DecodeLeg.admit`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_KEPT = 64  # idle calls; any number may be in use


class DecodeCalls:
    """`open_call` opens a new one, with metadata and a time-out in seconds."""

    def __init__(self, open_call: Callable[..., Any]) -> None:
        self._open = open_call
        self._kept: list[Any] = []

    def take(self) -> Any | None:
        """A kept call; None if there is none."""
        while self._kept:
            call = self._kept.pop()
            if not call.done():
                return call
        return None

    def open(self, **options: Any) -> Any:
        return self._open(**options)

    def keep(self, call: Any) -> None:
        """Keeps a call whose leg has ended, so that nothing more will come on it."""
        if len(self._kept) < MAX_KEPT and not call.done():
            self._kept.append(call)
        else:
            call.cancel()

    def clear(self) -> None:
        """Ends the unused calls."""
        while self._kept:
            self._kept.pop().cancel()
