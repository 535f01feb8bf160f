"""Searches the highest rate at which enough requests meet the objectives: doubling, then bisection. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loadtest.report import Report


@dataclass(frozen=True)
class Step:
    """One run of a sweep."""

    rate_per_s: float
    report: Report

    @property
    def good_share(self) -> float:
        return self.report.good_share or 0.0


class Search:
    """Proposes rates (`next_per_s`), is told whether each met the objectives (`tell`), ends with `best_per_s`.

    From `start_per_s` it doubles while rates pass, and halves, at most `_MAX_HALVINGS` times, while none does; then it
    bisects until the highest rate that passed and the lowest that failed are within `precision` of each other.
    """

    _MAX_HALVINGS = 6

    def __init__(self, start_per_s: float, max_per_s: float = math.inf, precision: float = 0.1) -> None:
        if not 0 < start_per_s <= max_per_s or not 0 < precision < 1:
            raise ValueError(f"a sweep needs 0 < start <= max and 0 < precision < 1, got {start_per_s}, {precision}")
        self._start_per_s = start_per_s
        self._max_per_s = max_per_s
        self._precision = precision
        self._met_per_s = 0.0
        self._missed_per_s = math.inf

    @property
    def best_per_s(self) -> float | None:
        """The highest rate that passed, if any."""
        return self._met_per_s or None

    def next_per_s(self) -> float | None:
        """The rate to try now; None when the search is done."""
        met, missed = self._met_per_s, self._missed_per_s
        if math.isinf(missed):
            if not met:
                return self._start_per_s
            return None if met >= self._max_per_s else min(2 * met, self._max_per_s)
        if not met:
            lowest = self._start_per_s / 2**self._MAX_HALVINGS
            return None if missed <= lowest else missed / 2
        return None if missed - met <= self._precision * met else (met + missed) / 2

    def tell(self, rate_per_s: float, is_met: bool) -> None:
        """Reports the result of a proposed rate."""
        if is_met:
            self._met_per_s = max(self._met_per_s, rate_per_s)
        else:
            self._missed_per_s = min(self._missed_per_s, rate_per_s)
