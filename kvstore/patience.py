"""A time-out for transfers: waits as long as something moves. Pure: no clock."""

from __future__ import annotations

_LOOKS = 8  # within one patience


class Patience:
    """Ends once a position has stayed the same for `patience_s`."""

    def __init__(self, patience_s: float, position: int, now_s: float) -> None:
        self.patience_s = patience_s
        self._position = position
        self._moved_s = now_s

    @property
    def look_s(self) -> float:
        """How long to wait until looking again."""
        return self.patience_s / _LOOKS

    def is_over(self, position: int, now_s: float) -> bool:
        if position != self._position:
            self._position, self._moved_s = position, now_s
        return now_s - self._moved_s >= self.patience_s
