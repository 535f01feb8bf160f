"""Where a rank's time went and how many bytes it sent: sums over all its steps. Knows no torch and no network."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class RankWork:
    """One rank's sums. `compute_s` is the time of its steps without the waits in them.

    Between GPUs all-reduces and gathers are launched, not waited for, and count as computing.
    """

    num_steps: int = 0  # parts of steps, where there are stages
    compute_s: float = 0.0
    collective_s: float = 0.0  # in all-reduces and gathers within its stage
    pipeline_s: float = 0.0  # waiting for another stage: for activations, logits, or acknowledgements
    collective_bytes: int = 0  # put into all-reduces and gathers
    pipeline_bytes: int = 0  # activations and logits sent on


class Watch:
    """Sums the seconds spent inside its `with`. For one thread; not reentrant."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began_s = 0.0

    def __enter__(self) -> Watch:
        self._began_s = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began_s


class RankMeter:
    """One rank's meter. The computing thread writes; any thread may read `work`."""

    def __init__(self) -> None:
        self.work = RankWork()  # a new object at the end of each step, so that its sums are consistent
        self.collective, self.pipeline = Watch(), Watch()
        self.collective_bytes = self.pipeline_bytes = 0
        self._seconds = 0.0

    def end_step(self, num_steps: int, seconds: float) -> None:
        """There were `num_steps` steps so far; those since the last call took `seconds`, including waits."""
        self._seconds += seconds
        waited_s = self.collective.seconds + self.pipeline.seconds
        self.work = RankWork(
            num_steps,
            max(self.work.compute_s, self._seconds - waited_s),  # a counter never falls
            self.collective.seconds,
            self.pipeline.seconds,
            self.collective_bytes,
            self.pipeline_bytes,
        )
