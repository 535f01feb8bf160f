"""How much of the overtaking that is expected has to be reckoned with, as it shows in who came too late. Pure state."""

from __future__ import annotations

from router.plan import PrefillTerms

FIRST_SHARE, LEAST_SHARE = 0.5, 0.02
LATE_STEP, IN_TIME_STEP = 0.4, 0.01


class OvertakingShare:
    """Which part of the overtakers that are expected a request under a limit is to leave time for.

    Bursts end, so fewer come than the last minutes say, unless there is more load than the nodes can carry: which of
    the two it is shows in what becomes of those that were admitted in spite of all that might overtake them. Each of
    them that is late puts the share up, each that is in time down, until about one in forty is late.
    """

    def __init__(self) -> None:
        self.share = FIRST_SHARE

    def note(self, terms: PrefillTerms, limit_s: float | None, actual_s: float) -> None:
        """A request was admitted with these terms under that limit, and its first token took so long."""
        if limit_s is None or terms.order_s <= 0.0:
            return
        expected_s = terms.ttft_s - terms.order_s + terms.order_s / self.share
        if expected_s >= limit_s / 2:
            is_late = actual_s > limit_s
            self.share = min(1.0, max(LEAST_SHARE, self.share + (LATE_STEP if is_late else -IN_TIME_STEP)))
