"""What a node's work takes, as formulas with a few factors, and how these are learned from what it did. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from router.fit import LinearFit


@dataclass(frozen=True)
class PrefillSpeed:
    """Seconds of a prefill: a constant, each token's share of the products, and each pair of tokens that attend."""

    base_s: float
    token_s: float
    pair_s: float = 0.0

    def seconds(self, uncached_tokens: float, cached_tokens: float) -> float:
        base, tokens, pairs = prefill_features(uncached_tokens, cached_tokens)
        return self.base_s * base + self.token_s * tokens + self.pair_s * pairs


@dataclass(frozen=True)
class StepSpeed:
    """Seconds of a decode step: a constant (weights are read once), and a share for each request of the batch."""

    base_s: float
    request_s: float = 0.0

    def seconds(self, num_requests: float) -> float:
        return self.base_s + self.request_s * num_requests


def prefill_features(uncached_tokens: float, cached_tokens: float) -> tuple[float, float, float]:
    """What `PrefillSpeed`'s factors are multiplied with. A token attends to all cached ones and half of the others."""
    return 1.0, uncached_tokens, uncached_tokens * (cached_tokens + uncached_tokens / 2)


class PrefillMeter:
    """Learns a node's `PrefillSpeed` from its prefill legs."""

    def __init__(self, prior: PrefillSpeed) -> None:
        points = [prefill_features(tokens, 0.0) for tokens in (64.0, 1024.0, 8192.0)]
        self._fit = LinearFit((prior.base_s, prior.token_s, prior.pair_s), points)

    @property
    def is_measured(self) -> bool:
        return self._fit.num_observed > 0

    def observe(self, uncached_tokens: int, cached_tokens: int, seconds: float) -> None:
        """One leg: `seconds` of computing `uncached_tokens` behind `cached_tokens`, waiting not included."""
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
        """One report: steps of so many requests take so long."""
        if num_requests > 0:
            self._fit.observe((1.0, float(num_requests)), seconds)

    def speed(self) -> StepSpeed:
        return StepSpeed(*self._fit.factors)
