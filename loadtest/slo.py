"""Service-level objectives, and whether a request met them: `ttft:500 tpot:50 e2el:10000`, as with vLLM. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.record import RequestRecord

NAMES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Slo:
    """Limits in ms; infinite where there is none."""

    ttft_ms: float = math.inf
    tpot_ms: float = math.inf
    e2el_ms: float = math.inf

    @classmethod
    def parse(cls, words: Sequence[str]) -> Slo:
        """Parses `NAME:MILLISECONDS`, each name once. Raises ValueError."""
        limits: dict[str, float] = {}
        for word in words:
            name, colon, text = word.partition(":")
            try:
                limit_ms = float(text)
            except ValueError:
                limit_ms = math.nan
            if name not in NAMES or not colon or not 0 < limit_ms < math.inf:
                raise ValueError(f"--goodput: {word!r} is not {'|'.join(NAMES)}:MILLISECONDS with a positive number")
            if f"{name}_ms" in limits:
                raise ValueError(f"--goodput: {name} is given twice")
            limits[f"{name}_ms"] = limit_ms
        return cls(**limits)

    def met(self, record: RequestRecord) -> bool:
        """Whether a successful request met them. An answer of one token has no TPOT, and meets any limit on it."""
        tpot_s = record.tpot_s or 0.0
        return (
            1e3 * record.ttft_s <= self.ttft_ms and 1e3 * tpot_s <= self.tpot_ms and 1e3 * record.e2e_s <= self.e2el_ms
        )

    def words(self) -> str:
        """The objectives, as they were given."""
        limits = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "e2el": self.e2el_ms}
        return " ".join(f"{name}:{limit_ms:g}" for name, limit_ms in limits.items() if not math.isinf(limit_ms))
