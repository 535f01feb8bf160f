"""A router's recent past: its last answers, and figures of the last minutes. Plain state of bounded size.

It never contains text of a prompt or an answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from batonpb import inference_pb2

MAX_ANSWERS = 50
BIN_S = 2.0
NUM_BINS = 150  # five minutes
MAX_SAMPLES = 64  # per bin; the last ones, if there are more


@dataclass(frozen=True, slots=True)
class Ended:
    """One answer. `at_s` is when it ended, in seconds since the epoch."""

    request_id: str
    at_s: float
    reason: str
    usage: inference_pb2.Usage
    timeline: inference_pb2.Timeline


@dataclass(slots=True)
class Bin:
    """The answers that ended in one interval."""

    index: int  # of the stretch
    count: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)

    def add(self, usage: inference_pb2.Usage, timeline: inference_pb2.Timeline) -> None:
        _sample(self.ttft_s, self.count, timeline.first_token_s)
        if usage.output_tokens > 1:
            _sample(self.tpot_s, self.count, timeline.tpot_s)
        self.count += 1
        self.num_prompt_tokens += usage.prompt_tokens
        self.num_cached_tokens += usage.cached_tokens
        self.num_output_tokens += usage.output_tokens


class Recent:
    """Call `note` for each answer that has ended."""

    def __init__(self) -> None:
        self.answers: deque[Ended] = deque(maxlen=MAX_ANSWERS)
        self.bins: deque[Bin] = deque(maxlen=NUM_BINS)

    def note(self, ended: Ended) -> None:
        self.answers.append(ended)
        index = int(ended.at_s // BIN_S)
        if not self.bins or self.bins[-1].index < index:  # if the clock was set back, it goes into the newest
            self.bins.append(Bin(index))
        if ended.timeline.first_token_s >= 0.0:
            self.bins[-1].add(ended.usage, ended.timeline)

    def since(self, now_s: float) -> list[Bin]:
        """The bins that are recent enough, oldest first; intervals in which nothing ended have none."""
        oldest = int(now_s // BIN_S) - NUM_BINS
        return [one for one in self.bins if one.index > oldest]


def quantile(values: Sequence[float], part: float) -> float | None:
    """The quantile of `values`; None if there are none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(part * len(ranked)))] if ranked else None


def _sample(values: list[float], count: int, value: float) -> None:
    if len(values) < MAX_SAMPLES:
        values.append(value)
    else:
        values[count % MAX_SAMPLES] = value
