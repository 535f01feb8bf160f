"""How long a node's work takes, as formulas with a few factors, which are learned from its legs and reports. Pure.

A node that is new, or has run nothing for a while, is assumed to be as fast as its peers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import TypeVar

from router.fit import LinearFit

STEP_SLOPE = 0.08  # how much longer a step takes per further request, until several sizes were observed
MEDIAN_TOKENS, MEDIAN_REQUESTS = 1024, 8  # speeds are compared by their time for work of this size


@dataclass(frozen=True)
class PrefillSpeed:
    """Seconds of a prefill: a constant, a term per token (matrix products), and one per pair of attending tokens."""

    base_s: float
    token_s: float
    pair_s: float = 0.0

    @classmethod
    def of_rate(cls, tokens_per_s: float) -> PrefillSpeed | None:
        """The speed implied by a rate alone; None if it was not measured."""
        return cls(0.0, 1.0 / tokens_per_s) if tokens_per_s > 0.0 else None

    def seconds(self, uncached_tokens: float, cached_tokens: float) -> float:
        base, tokens, pairs = prefill_features(uncached_tokens, cached_tokens)
        return self.base_s * base + self.token_s * tokens + self.pair_s * pairs

    def queue_seconds(self, num_tokens: float, num_requests: int) -> float:
        """Seconds of a queue of which only the size is known, assuming prompts of equal length and no hits."""
        if num_tokens <= 0:
            return 0.0
        count = max(1, num_requests)
        return count * self.seconds(num_tokens / count, 0)


@dataclass(frozen=True)
class StepSpeed:
    """Seconds of a decode step: a constant (the weights are read once), and a term per request in the batch."""

    base_s: float
    request_s: float = 0.0

    @classmethod
    def of_step(cls, step_s: float, num_requests: int) -> StepSpeed | None:
        """The speed implied by one step of `num_requests`; None if it was not measured."""
        if step_s <= 0.0:
            return None
        alone_s = step_s / (1.0 + STEP_SLOPE * max(0, num_requests - 1))
        return cls(alone_s * (1.0 - STEP_SLOPE), alone_s * STEP_SLOPE)

    def seconds(self, num_requests: float) -> float:
        return self.base_s + self.request_s * num_requests


GUESSED_PREFILL, GUESSED_STEP = PrefillSpeed(0.0, 1 / 2000.0), StepSpeed(0.0276, 0.0024)


def prefill_features(uncached_tokens: float, cached_tokens: float) -> tuple[float, float, float]:
    """The features of `PrefillSpeed`. A token attends to all cached tokens and, on average, half of the others."""
    return 1.0, uncached_tokens, uncached_tokens * (cached_tokens + uncached_tokens / 2)


class PrefillMeter:
    """Learns a node's `PrefillSpeed` from its prefill legs."""

    def __init__(self, prior: PrefillSpeed) -> None:
        # Only long ones: a rate says nothing about a prompt of a few tokens.
        points = [prefill_features(tokens, 0.0) for tokens in (1024.0, 8192.0)]
        self._fit = LinearFit((prior.base_s, prior.token_s, prior.pair_s), points)

    @property
    def is_measured(self) -> bool:
        return self._fit.num_observed > 0

    def observe(self, uncached_tokens: int, cached_tokens: int, seconds: float) -> None:
        """One leg: `seconds` of computing `uncached_tokens` after `cached_tokens`, not including waiting."""
        self._fit.observe(prefill_features(uncached_tokens, cached_tokens), seconds)

    def speed(self) -> PrefillSpeed:
        return PrefillSpeed(*self._fit.factors)


class StepMeter:
    """Learns a node's `StepSpeed` from its reports."""

    def __init__(self, prior: StepSpeed) -> None:
        self._fit = LinearFit((prior.base_s, prior.request_s), [(1.0, 1.0), (1.0, 32.0)])

    @property
    def is_measured(self) -> bool:
        return self._fit.num_observed > 0

    def observe(self, num_requests: int, seconds: float) -> None:
        """One report: steps with `num_requests` take `seconds`."""
        if num_requests > 0:
            self._fit.observe((1.0, float(num_requests)), seconds)

    def speed(self) -> StepSpeed:
        return StepSpeed(*self._fit.factors)


class NodeSpeeds:
    """One node's speeds, by its reports and this router's legs. None: nothing known yet."""

    def __init__(self) -> None:
        self._tokens_per_s = 0.0
        self._reported_prefill: PrefillSpeed | None = None
        self._reported_step: StepSpeed | None = None
        self._prefill: PrefillMeter | None = None
        self._step: StepMeter | None = None
        self.is_rested = False

    def prefill(self) -> PrefillSpeed | None:
        return self._prefill.speed() if self._prefill else self._reported_prefill

    def step(self) -> StepSpeed | None:
        return self._step.speed() if self._step else self._reported_step

    def is_known(self, role: str) -> bool:
        """Whether what this role needs was measured recently."""
        can_tell = (role == "decode" or self.prefill() is not None) and (role == "prefill" or self.step() is not None)
        return can_tell and not self.is_rested

    def reported(self, prefill_tokens_per_s: float, decode_step_s: float, num_running: int) -> None:
        """A new report. For an idle node, the time of its last steps says little."""
        if prefill_tokens_per_s != self._tokens_per_s:
            self._tokens_per_s = prefill_tokens_per_s
            self._reported_prefill = PrefillSpeed.of_rate(prefill_tokens_per_s)
        if self._reported_step is None:
            self._reported_step = StepSpeed.of_step(decode_step_s, num_running)
        elif num_running and decode_step_s > 0.0:
            self._step = self._step or StepMeter(self._reported_step)
            self._step.observe(num_running, decode_step_s)

    def computed(self, uncached_tokens: int, cached_tokens: int, seconds: float, prior: PrefillSpeed) -> None:
        """A leg was computed; `prior` is the speed assumed until now."""
        if seconds > 0.0:
            self._prefill = self._prefill or PrefillMeter(prior)
            self._prefill.observe(uncached_tokens, cached_tokens, seconds)
        self.is_rested = False

    def rest(self) -> None:
        """The node has run nothing for a while: the next work starts a new measurement."""
        self.is_rested = True
        self._reported_prefill, self._reported_step = self.prefill(), self.step()
        self._prefill = self._step = None


SpeedT = TypeVar("SpeedT", PrefillSpeed, StepSpeed)


def in_use(nodes: Sequence[tuple[str, NodeSpeeds]]) -> list[tuple[PrefillSpeed, StepSpeed]]:
    """The speeds to use for each of these (role, speeds): its own, or the median of those most like it.

    A fixed guess that is too low would keep a new node out of work for good; and a node that was slow once would
    never be measured again.
    """
    prefill = [(role, known.is_rested, known.prefill()) for role, known in nodes]
    step = [(role, known.is_rested, known.step()) for role, known in nodes]
    prefills = _typical(prefill, GUESSED_PREFILL, lambda speed: speed.seconds(MEDIAN_TOKENS, 0))
    steps = _typical(step, GUESSED_STEP, lambda speed: speed.seconds(MEDIAN_REQUESTS))
    return list(zip(prefills, steps, strict=True))


def _typical(
    known: Sequence[tuple[str, bool, SpeedT | None]], guess: SpeedT, rank: Callable[[SpeedT], float]
) -> list[SpeedT]:
    """Its own if recent, else a median: of the role's recent ones, of the role's, of all recent ones, of all."""

    def median(may_be_rested: bool, role: str | None) -> SpeedT | None:
        group = [s for r, is_rested, s in known if s and role in (None, r) and (may_be_rested or not is_rested)]
        middle = median_low([rank(speed) for speed in group]) if group else None
        return next((speed for speed in group if rank(speed) == middle), None)

    medians: dict[str, SpeedT] = {}
    speeds = []
    for role, is_rested, own in known:
        if is_rested or own is None:
            if role not in medians:
                groups = ((False, role), (True, role), (False, None), (True, None))
                medians[role] = next(filter(None, (median(*group) for group in groups)), guess)
            own = medians[role]
        speeds.append(own)
    return speeds
