"""One node's Decode calls, kept when a leg has ended well: the next leg's Admit goes into one of them.

To open a call costs the router, and the node, three times what its messages do. A call that a node has ended meanwhile
is left; whether that was before it read an Admit shows in its answer (`DecodeLeg.admit`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_KEPT = 64  # that wait for a leg; any number may have one


class DecodeCalls:
    """`open_call` opens a new one, with metadata and a time-out in seconds."""

    def __init__(self, open_call: Callable[..., Any]) -> None:
        self._open = open_call
        self._kept: list[Any] = []

    def take(self) -> Any | None:
        """One that was kept; None where there is none."""
        while self._kept:
            call = self._kept.pop()
            if not call.done():
                return call
        return None

    def open(self, **options: Any) -> Any:
        return self._open(**options)

    def keep(self, call: Any) -> None:
        """A leg of this call has ended, and nothing more of it will come."""
        if len(self._kept) < MAX_KEPT and not call.done():
            self._kept.append(call)
        else:
            call.cancel()

    def clear(self) -> None:
        """Ends those that nobody uses."""
        while self._kept:
            self._kept.pop().cancel()
