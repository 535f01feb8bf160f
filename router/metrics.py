"""A router's numbers for Prometheus, read when they are asked for. Their number does not grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from router.accuracy import Accuracy
from router.plan import Reason

OUTCOMES = ("both legs", "one leg", "rejected")
QUANTILES = (0.5, 0.9)


class RouterCollector(Collector):
    """Decisions by kind, rejections by reason, and predictions against what became of them."""

    def __init__(self, accuracy: Accuracy) -> None:
        self._accuracy = accuracy

    def collect(self) -> Iterator[Metric]:
        accuracy = self._accuracy
        outcomes = {outcome.replace(" ", "_"): accuracy.outcomes[outcome] for outcome in OUTCOMES}
        yield _counts("outcome", "baton_router_decisions", "Decisions: one leg is a skipped prefill leg.", outcomes)
        reasons = {reason.name.lower(): accuracy.rejections[reason.name] for reason in Reason}
        yield _counts("reason", "baton_router_rejections", "Decisions that no node takes the request now.", reasons)
        words = "Seconds of the last decisions."
        family = GaugeMetricFamily("baton_router_decision_seconds", words, labels=["quantile"])
        for quantile in QUANTILES:
            family.add_metric([str(quantile)], accuracy.decision_s(quantile))
        yield family
        yield from self._errors()

    def _errors(self) -> Iterator[Metric]:
        both = {"ttft": self._accuracy.ttft, "tpot": self._accuracy.tpot}
        words = "Predicted less actual seconds of the last 1,000 requests, without its sign"
        seconds = GaugeMetricFamily("baton_router_error_seconds", f"{words}.", labels=["of", "quantile"])
        ratios = GaugeMetricFamily("baton_router_error_ratio", f"{words}, by the actual.", labels=["of", "quantile"])
        for name, errors in both.items():
            for quantile in QUANTILES:
                seconds.add_metric([name, str(quantile)], errors.seconds(quantile))
                ratios.add_metric([name, str(quantile)], errors.ratio(quantile))
        yield seconds
        yield ratios


def _counts(label: str, name: str, words: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, words, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
