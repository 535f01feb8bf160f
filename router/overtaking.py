"""Learns, from requests that were late, what share of the expected overtaking must be allowed for. Pure state."""

from __future__ import annotations

from router.plan import PrefillTerms

FIRST_SHARE, LEAST_SHARE = 0.5, 0.02
LATE_STEP, IN_TIME_STEP = 0.4, 0.01


class OvertakingShare:
    """The share of the expected overtakers that a request with a limit must leave time for.

    Bursts end, so fewer overtakers come than the last minutes suggest, unless the load exceeds what the nodes can
    carry. Which it is shows in the requests that were admitted although many might overtake them: each of them that is
    late raises the share, each that is in time lowers it, until about one in forty is late.
    """

    def __init__(self) -> None:
        self.share = FIRST_SHARE

    def note(self, terms: PrefillTerms, limit_s: float | None, actual_s: float) -> None:
        """A request was admitted with these terms under this limit, and its first token took `actual_s`."""
        if limit_s is None or terms.order_s <= 0.0:
            return
        expected_s = terms.ttft_s - terms.order_s + terms.order_s / self.share
        if expected_s >= limit_s / 2:
            is_late = actual_s > limit_s
            self.share = min(1.0, max(LEAST_SHARE, self.share + (LATE_STEP if is_late else -IN_TIME_STEP)))
