"""Online fit of seconds as a sum of terms. Pure: no clock, no I/O.

The time of a piece of work cannot be negative, so neither can the factors: of all subsets of terms, the one with the
least error and only positive factors is taken. Old observations fade, and a prior stands in until there are some.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# As errors are relative, fast observations outweigh slow ones by the square of their ratio. A machine that became slow
# is noticed because history is dropped when the fit stays below this fraction of the observed, this often in a row.
SURPRISE, MANY_SURPRISES = 0.3, 2
# A prior fades faster than observations, but never entirely: only it covers what was never observed.
PRIOR_FADE, PRIOR_SHARE = 0.9, 1e-3

Vector = NDArray[np.float64]


class LinearFit:
    """`seconds = factors . features`, all factors at least 0.0.

    Errors are relative: a prompt that is a hundred times longer must not outweigh all others. The prior counts as
    `prior_weight` observations at each of `prior_points` (feature vectors), and soon less; each observation reduces
    the weight of the older ones by the factor `fade`.
    """

    def __init__(
        self,
        prior: Sequence[float],
        prior_points: Sequence[Sequence[float]],
        prior_weight: float = 0.5,
        fade: float = 0.98,
    ) -> None:
        self._fade = fade
        size = len(prior)
        self._products = np.zeros((size, size))
        self._targets = np.zeros(size)
        self._factors: Vector = np.asarray(prior, dtype=np.float64)
        self._subsets = [
            list(subset) for count in range(size, 0, -1) for subset in itertools.combinations(range(size), count)
        ]
        for point in prior_points:
            self._add(np.asarray(point, dtype=np.float64), float(np.dot(prior, point)), prior_weight)
        self._prior = self._products.copy(), self._targets.copy()
        self._products[:], self._targets[:] = 0.0, 0.0
        self._prior_share = 1.0
        self.num_observed = 0
        self._num_surprises = 0  # in a row

    @property
    def factors(self) -> tuple[float, ...]:
        return tuple(float(factor) for factor in self._factors)

    def seconds(self, features: Sequence[float]) -> float:
        """What the fit predicts."""
        return float(np.dot(self._factors, features))

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Adds one observation; one that took no time is ignored."""
        if seconds <= 0.0:
            return
        kept = 1.0 if self._num_surprises < MANY_SURPRISES else SURPRISE**2
        self._products *= self._fade * kept
        self._targets *= self._fade * kept
        self._prior_share = max(PRIOR_SHARE, self._prior_share * PRIOR_FADE * kept)
        self._add(np.asarray(features, dtype=np.float64), seconds, 1.0)
        self._factors = self._solve()
        self.num_observed += 1
        self._num_surprises = self._num_surprises + 1 if self.seconds(features) < SURPRISE * seconds else 0

    def _add(self, features: Vector, seconds: float, weight: float) -> None:
        relative = features / max(seconds, 1e-9)
        self._products += weight * np.outer(relative, relative)
        self._targets += weight * relative

    def _solve(self) -> Vector:
        """Non-negative least squares; three terms have only seven subsets, so all are tried."""
        best, best_gain = self._factors, -np.inf
        products = self._products + self._prior_share * self._prior[0]
        targets = self._targets + self._prior_share * self._prior[1]
        scale = np.sqrt(np.maximum(np.diag(products), 1e-300))
        products, targets = products / np.outer(scale, scale), targets / scale
        for subset in self._subsets:
            part = np.ix_(subset, subset)
            ridge = 1e-9 * np.eye(len(subset))
            solved = np.linalg.solve(products[part] + ridge, targets[subset])
            gain = float(targets[subset] @ solved)  # the part of the error it explains
            if (solved >= 0.0).all() and gain > best_gain + 1e-12:
                best_gain = gain
                best = np.zeros(len(targets))
                best[subset] = solved / scale[subset]
                if len(subset) == len(targets):
                    break  # the whole model explains the most
        return best
