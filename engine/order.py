"""In which order prompts are computed: shortest first, but nobody waits for ever. Pure: times are passed in.

Shortest first makes the mean wait the least. Ageing bounds what the long ones pay for it: nobody is overtaken by who
comes more than `(its seconds + what its priority lags behind) / AGEING` seconds later.
"""

from __future__ import annotations

AGEING = 0.05  # seconds of work that a second of waiting counts as
PRIORITY_S = 5.0  # seconds of work that a step of priority counts as: more than nearly any prompt takes
MAX_PRIORITY = 100  # and -100 the least


def rank(remaining_s: float, waited_s: float, priority: int = 0) -> float:
    """The least goes first. `remaining_s`: what is left to compute; of priorities the smaller one is preferred."""
    return PRIORITY_S * priority + remaining_s - AGEING * waited_s
