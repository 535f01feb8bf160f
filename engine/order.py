"""The order in which prompts are computed: shortest first, but nobody waits forever. Pure: times are passed in.

Shortest first minimises the mean wait. Ageing bounds what long prompts pay for it: no prompt is overtaken by one that
comes more than `(its seconds + the seconds of its lower priority) / AGEING` seconds later.
"""

from __future__ import annotations

AGEING = 0.05  # seconds of work that a second of waiting counts as
PRIORITY_S = 5.0  # seconds of work that a step of priority counts as: more than nearly any prompt takes
MAX_PRIORITY = 100  # and -100 the least


def rank(remaining_s: float, waited_s: float, priority: int = 0) -> float:
    """The smallest goes first. `remaining_s` is what is left to compute; smaller priorities are preferred."""
    return PRIORITY_S * priority + remaining_s - AGEING * waited_s
