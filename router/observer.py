"""Observes the beginning and end of each call, for the sums, the last answers, and traces, if any.

Its cost is paid once per answer, at its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from batonpb import inference_pb2
from router.journey import RoutedRequest
from router.recent import Ended, Recent
from router.spans import spans
from router.tally import ABORT, REASONS, Tally


class Watched:
    """One answer in progress."""

    is_finished = False


class Observer:
    """One per router."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.tally = Tally()
        self.recent = Recent()
        self._clock = clock

    @contextmanager
    def call(self) -> Iterator[None]:
        """Counts the call's error, if there is one."""
        try:
            yield
        except Exception as error:
            self.tally.fail(error)
            raise

    @contextmanager
    def answer(self) -> Iterator[Watched]:
        """Counts an answer in progress. If the context ends early without an error, it is counted as an abort."""
        watched = Watched()
        self.tally.num_in_flight += 1
        try:
            yield watched
        except Exception:
            watched.is_finished = True  # counted with the call
            raise
        finally:
            self.tally.num_in_flight -= 1
            if not watched.is_finished:
                self.tally.finished[ABORT] += 1

    def finished(self, watched: Watched, request: RoutedRequest, response: inference_pb2.GenerateResponse) -> None:
        """An answer has ended with this response."""
        watched.is_finished = True
        legs = spans(response.timeline)
        self.tally.finish(response, {leg.name: leg.seconds for leg in legs}, request.sampling.max_tokens)
        reason = REASONS.get(response.finish_reason, "stop")
        self.recent.note(Ended(request.request_id, self._clock(), reason, response.usage, response.timeline))
        request.trace.legs(request.request_id, legs, reason, response)
