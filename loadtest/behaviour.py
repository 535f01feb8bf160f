"""Clients that leave or misbehave: which do, how, and how the server reacted. Pure."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from loadtest.exchange import CONNECTION_LOST
from loadtest.record import RequestRecord


class Kind(StrEnum):
    """The kind of a client. Figures are over GOOD ones; each other kind is counted separately."""

    GOOD = ""
    CANCEL = "cancel"  # leaves after some tokens, in order
    MALFORMED = "malformed"  # sends what is no request
    OVERSIZED = "oversized"  # sends a prompt of megabytes
    SLOW_READER = "slow-reader"  # takes its time between two messages
    DISCONNECT = "disconnect"  # its connection goes in the middle of the answer


BAD_KINDS = (Kind.MALFORMED, Kind.OVERSIZED, Kind.SLOW_READER, Kind.DISCONNECT)


def draw_kinds(count: int, cancel_rate: float, bad_rate: float, rng: random.Random) -> list[Kind]:
    """The kind of each session's client: a share `cancel_rate` leaves; a share `bad_rate` is bad, in equal parts."""
    if cancel_rate < 0 or bad_rate < 0 or cancel_rate + bad_rate > 1:
        raise ValueError(f"--cancel-rate and --bad-clients must be 0 to 1 together, got {cancel_rate} and {bad_rate}")
    num_cancels, num_bad = round(count * cancel_rate), round(count * bad_rate)
    num_cancels = min(num_cancels, count - num_bad)
    kinds = [Kind.CANCEL] * num_cancels + [BAD_KINDS[i % len(BAD_KINDS)] for i in range(num_bad)]
    kinds += [Kind.GOOD] * (count - len(kinds))
    rng.shuffle(kinds)
    return kinds


def outcome(record: RequestRecord) -> str:
    """The outcome of a misbehaving request: "refused", "cut off", "left", "served", or "failed: WHY".

    A server need not read megabytes to the end: it may close the connection.
    """
    if record.kind == Kind.OVERSIZED and record.error.startswith(CONNECTION_LOST):
        return "cut off"
    if record.error:
        return "refused" if record.refused else f"failed: {record.error}"
    return "left" if record.kind in (Kind.CANCEL, Kind.DISCONNECT) else "served"


def outcomes(records: Sequence[RequestRecord]) -> dict[str, dict[str, int]]:
    """kind -> outcome -> count, for the kinds that occurred."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        if record.kind:
            found.setdefault(record.kind, Counter())[outcome(record)] += 1
    return {kind: dict(counts.most_common()) for kind, counts in sorted(found.items())}
