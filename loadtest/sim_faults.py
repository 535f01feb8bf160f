"""Faults in a simulated cluster, and when they happen. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("kill", "slow", "link", "drain", "join")
_FAULT = re.compile(
    r"(\w+):([\w-]+)(?:\*(\d{1,6}(?:\.\d{1,6})?))?@(\d{1,9}(?:\.\d{1,6})?)(?:-(\d{1,9}(?:\.\d{1,6})?))?"
)


class BadFault(ValueError):
    """An invalid fault; says what is wrong with it."""


@dataclass(frozen=True)
class Fault:
    """`subject`: a node id, or the role of one that joins. `factor`: how many times slower, until `until_s`."""

    kind: str
    subject: str
    at_s: float
    factor: float = 1.0
    until_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """kill:NODE@S, drain:NODE@S, join:ROLE@S, slow:NODE*FACTOR@S[-UNTIL], link:NODE*FACTOR@S[-UNTIL]."""
        match = _FAULT.fullmatch(text)
        if match is None or match[1] not in KINDS:
            raise BadFault(f"fault {text!r}: write it like kill:prefill-3@600 or slow:decode-0*3@300-900")
        kind, subject, factor, at_s, until_s = match.groups()
        if (factor is not None) != (kind in ("slow", "link")):
            raise BadFault(f"fault {text!r}: slow and link take a factor, like slow:{subject}*3@{at_s}; no other does")
        if factor is not None and float(factor) <= 0:
            raise BadFault(f"fault {text!r}: the factor must be positive, got {factor}")
        if until_s is not None and (factor is None or float(until_s) <= float(at_s)):
            raise BadFault(f"fault {text!r}: only slow and link end, and later than they begin")
        if kind == "join" and subject not in ("prefill", "decode", "both"):
            raise BadFault(f"fault {text!r}: a node joins as prefill, decode or both, got {subject}")
        return cls(kind, subject, float(at_s), float(factor or 1.0), None if until_s is None else float(until_s))
