"""A router's decisions and the accuracy of its predictions: counts, and errors of its last requests. Plain state."""

from __future__ import annotations

from collections import Counter, deque

from batonpb import inference_pb2
from router.overtaking import OvertakingShare
from router.plan import Plan, PrefillTerms, Rates

MAX_REQUESTS = 1000
MAX_SLACK_REQUESTS = 200  # recent underestimates
SLACK_QUANTILE = 0.9
IDLE_SHARE = 0.2  # requests that wait for less than this fraction of their own work measure the calls


class Errors:
    """Predicted against actual seconds of the last requests."""

    def __init__(self, size: int = MAX_REQUESTS) -> None:
        self._seconds: deque[float] = deque(maxlen=size)
        self._ratios: deque[float] = deque(maxlen=size)
        self.predicted_s = self.actual_s = 0.0  # sums over all requests

    def __len__(self) -> int:
        return len(self._seconds)

    def note(self, predicted_s: float, actual_s: float) -> None:
        """Counts one request; one that took no time is ignored."""
        if actual_s > 0.0:
            self._seconds.append(abs(predicted_s - actual_s))
            self._ratios.append(abs(predicted_s - actual_s) / actual_s)
            self.predicted_s += predicted_s
            self.actual_s += actual_s

    def seconds(self, quantile: float) -> float:
        """The quantile of the absolute errors; 0.0 if there are none."""
        return _quantile(self._seconds, quantile)

    def ratio(self, quantile: float) -> float:
        """The quantile of the errors relative to the actual time; 0.0 if there are none."""
        return _quantile(self._ratios, quantile)


class Slack:
    """How much later than predicted first tokens come: the 90th percentile of the last requests."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._late_s: deque[float] = deque(maxlen=MAX_SLACK_REQUESTS)
        self._num_noted = 0

    def note(self, predicted_s: float, actual_s: float) -> None:
        self._late_s.append(actual_s - predicted_s)
        self._num_noted += 1
        if self._num_noted % 8 == 0:  # sorting is not free
            self.seconds = max(0.0, _quantile(self._late_s, SLACK_QUANTILE))


class Calls:
    """What the calls to a node and back add to first tokens, beyond the node's own work: a median.

    Only over requests that hardly waited: the error in predicting a queue is larger than this.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._late_s: deque[float] = deque(maxlen=MAX_SLACK_REQUESTS)
        self._num_noted = 0

    def note(self, terms: PrefillTerms, actual_s: float) -> None:
        if terms.queue_s + abs(terms.order_s) + terms.room_s + terms.fetch_s > IDLE_SHARE * terms.compute_s:
            return
        self._late_s.append(actual_s - terms.ttft_s)
        self._num_noted += 1
        if self._num_noted % 8 == 0:
            self.seconds = max(0.0, _quantile(self._late_s, 0.5))


class HandOffs:
    """What the calls add between the first token and the second, when two nodes make them: a median."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds  # a guess, at first
        self._seen_s: deque[float] = deque(maxlen=MAX_SLACK_REQUESTS)
        self._num_noted = 0

    def note(self, plan: Plan, gap_s: float) -> None:
        """A plan's two nodes made its first two tokens `gap_s` apart."""
        self._seen_s.append(self.seconds + gap_s - plan.decode.step_s - plan.handoff_s)
        self._num_noted += 1
        if self._num_noted % 8 == 0:
            self.seconds = max(0.0, _quantile(self._seen_s, 0.5))


class Accuracy:
    """What one router has decided and predicted."""

    def __init__(self, handoff_s: float = Rates.handoff_s) -> None:
        self.ttft, self.tpot = Errors(), Errors()
        self.slack = Slack()  # of first tokens
        self.calls, self.handoffs, self.overtaking = Calls(), HandOffs(handoff_s), OvertakingShare()
        self.outcomes: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()  # by the name of their reason
        self.decisions_s: deque[float] = deque(maxlen=MAX_REQUESTS)  # durations of the last ones

    def decided(self, outcome: str, rejection: str, seconds: float) -> None:
        self.outcomes[outcome] += 1
        if rejection:
            self.rejections[rejection] += 1
        self.decisions_s.append(seconds)

    def decision_s(self, quantile: float) -> float:
        return _quantile(self.decisions_s, quantile)

    def finished(
        self, timeline: inference_pb2.Timeline, plan: Plan | None = None, limit_s: float | None = None
    ) -> None:
        """A request has ended, with its plan and limit. One that migrated was not predicted to, and is not counted."""
        if timeline.migrations or timeline.first_token_s < 0.0 or timeline.planned_s < 0.0:
            return
        ttft_s = timeline.first_token_s - timeline.planned_s
        self.ttft.note(timeline.predicted_ttft_s, ttft_s)
        self.slack.note(timeline.predicted_ttft_s, ttft_s)
        if plan is not None:
            self.overtaking.note(plan.prefill, limit_s, ttft_s)
            self.calls.note(plan.prefill, ttft_s)
            if plan.prefill_node is not None and timeline.second_token_s >= 0.0:
                self.handoffs.note(plan, timeline.second_token_s - timeline.first_token_s)
        self.tpot.note(timeline.predicted_tpot_s, timeline.tpot_s)


def _quantile(values: deque[float], quantile: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(quantile * len(ranked)))] if ranked else 0.0
