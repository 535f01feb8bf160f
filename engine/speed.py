"""How fast an engine is, measured on its own steps: recently, and since it started. Pure: seconds are passed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.scheduler import Chunk

PREFILL_HALF_LIFE_TOKENS = 4096
DECODE_WEIGHT = 0.1  # weight of the newest step in the moving average
LONG_TOKENS = 64  # a step of fewer takes about as long as one of a single token, so it says nothing about long prompts


@dataclass(frozen=True)
class RunSeconds:
    """The seconds of the runner's part of one step."""

    build_s: float
    forward_s: float
    sample_s: float

    @property
    def total_s(self) -> float:
        return self.build_s + self.forward_s + self.sample_s


@dataclass(frozen=True)
class StepTiming:
    """Where the seconds of steps went, and for how much work: of one step, or summed over many. Subtracting two sums
    gives what a metric or a cost model needs.

    A chunk of one token is a decode step, whatever token it is; all others are prefill. Context tokens are those in
    the cache before a chunk: the step's attention reads them without computing them.
    """

    num_steps: int = 0
    schedule_s: float = 0.0
    build_s: float = 0.0
    forward_s: float = 0.0  # up to the logits, including the wait for the device
    sample_s: float = 0.0
    num_prefill_tokens: int = 0
    num_prefill_context_tokens: int = 0
    num_decode_tokens: int = 0
    num_decode_context_tokens: int = 0

    def __add__(self, other: StepTiming) -> StepTiming:
        return StepTiming(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @classmethod
    def of_step(cls, chunks: Sequence[Chunk], schedule_s: float, run: RunSeconds) -> StepTiming:
        """The timing of one step; to be called before the requests' cursors move."""
        prefill = [chunk for chunk in chunks if chunk.num_tokens > 1]
        decode = [chunk for chunk in chunks if chunk.num_tokens == 1]
        return cls(
            num_steps=1,
            schedule_s=schedule_s,
            build_s=run.build_s,
            forward_s=run.forward_s,
            sample_s=run.sample_s,
            num_prefill_tokens=sum(chunk.num_tokens for chunk in prefill),
            num_prefill_context_tokens=sum(chunk.start for chunk in prefill),
            num_decode_tokens=len(decode),
            num_decode_context_tokens=sum(chunk.start for chunk in decode),
        )


class _Rate:
    """Tokens per second, a moving average; 0.0 before the first. Weighted by tokens: a few short tails say little."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        keep = 0.5 ** (num_tokens / PREFILL_HALF_LIFE_TOKENS)
        self._tokens = self._tokens * keep + num_tokens
        self._seconds = self._seconds * keep + seconds


class SpeedMeter:
    """Moving averages, 0.0 before the first measurement.

    `prefill_tokens_per_s` is the speed that prompts see, so a step that also decodes counts with all its seconds.
    `decode_step_s` is how long a running request waits for its next token, so a step that also prefills counts too.

    `long_prefill_tokens_per_s` is the speed of a prompt of many blocks: measured only on steps with at least
    `long_tokens`, including those of the warm-up. A node that only runs tails after hits has no other measurement.
    """

    def __init__(self, long_tokens: int = LONG_TOKENS) -> None:
        self.decode_step_s = 0.0
        self._long_tokens = long_tokens
        self._prefill = _Rate()
        self._long = _Rate()

    @property
    def prefill_tokens_per_s(self) -> float:
        return self._prefill.tokens_per_s

    @property
    def long_prefill_tokens_per_s(self) -> float:
        return self._long.tokens_per_s or self._prefill.tokens_per_s

    def forget(self) -> None:
        """Forgets everything except the speed of long prompts."""
        self.decode_step_s = 0.0
        self._prefill = _Rate()

    def observe(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """Counts one step; a chunk of one token is a decode step, whatever token it is."""
        if any(chunk.num_tokens == 1 for chunk in chunks):
            newest = DECODE_WEIGHT if self.decode_step_s else 1.0
            self.decode_step_s += newest * (seconds - self.decode_step_s)
        if prefilled := sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1):
            self._prefill.observe(prefilled, seconds)
            if prefilled >= self._long_tokens:
                self._long.observe(prefilled, seconds)
