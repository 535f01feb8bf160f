"""A router's metrics for Prometheus, read when it scrapes. The number of series does not grow.

Metrics that vLLM has keep their names, with `baton_` in front, and its label `model_name` (the served model). Other
labels have only the router's own fixed values. docs/observability.md lists them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from router.accuracy import Accuracy
from router.plan import Reason
from router.registry import ROLES, Registry
from router.tally import ABORT, ERRORS, HISTOGRAMS, INTERNAL, REASONS, Tally

OUTCOMES = ("both legs", "one leg", "rejected")
QUANTILES = (0.5, 0.9)
STATES = ("up", "draining", "down")


class RouterCollector(Collector):
    """Requests by outcome; decisions by kind, rejections by reason, predictions against actual values."""

    def __init__(self, accuracy: Accuracy, tally: Tally, registry: Registry) -> None:
        self._accuracy = accuracy
        self._tally = tally
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        pool = self._registry.pool
        model = pool.model if pool is not None else ""
        yield from self._requests(model)
        yield from self._histograms(model)
        yield from self._decisions()
        yield from self._errors()
        yield self._nodes()

    def _requests(self, model: str) -> Iterator[Metric]:
        tally, named = self._tally, {"model_name": model}
        finished = {reason: tally.finished[reason] for reason in (*REASONS.values(), ABORT)}
        words = "Answers that ended, by why; abort: the client left."
        yield _counts("finished_reason", "baton_request_success", words, finished, named)
        failed = {error: tally.failed[error] for error in (*ERRORS.values(), INTERNAL)}
        yield _counts("error", "baton_request_failures", "Calls that ended with an error.", failed, named)
        for name, words, value in (
            ("prompt_tokens", "Tokens of prompts.", tally.num_prompt_tokens),
            ("generation_tokens", "Tokens of answers.", tally.num_output_tokens),
            ("prefix_cache_queries", "Prompt tokens that were looked for in caches: all.", tally.num_prompt_tokens),
            ("request_migrations", "Times that answers went on elsewhere, after a leg failed.", tally.num_migrations),
        ):
            yield _counts("", f"baton_{name}", words, {"": value}, named)
        hits = {"local": tally.num_local_hit_tokens, "store": tally.num_store_hit_tokens}
        words = "Prompt tokens that a first leg had not to compute: its engine had them, or a store."
        yield _counts("tier", "baton_prefix_cache_hits", words, hits, named)
        words = "Answers on their way through this router."
        family = GaugeMetricFamily("baton_router_requests_in_flight", words, labels=["model_name"])
        family.add_metric([model], tally.num_in_flight)
        yield family

    def _histograms(self, model: str) -> Iterator[Metric]:
        for field, (name, words) in HISTOGRAMS.items():
            histogram = getattr(self._tally, field)
            family = HistogramMetricFamily(f"baton_{name}", words, labels=["model_name"])
            family.add_metric([model], histogram.buckets(), histogram.total)
            yield family

    def _decisions(self) -> Iterator[Metric]:
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
        words = "Seconds of requests that did not migrate, from the plan on"
        for kind in ("predicted", "actual"):
            sums = {name: getattr(errors, f"{kind}_s") for name, errors in both.items()}
            yield _counts("of", f"baton_router_{kind}_seconds", f"{words}: {kind}.", sums)

    def _nodes(self) -> Metric:
        words = "Nodes in the registry; down: they did not answer this router."
        family = GaugeMetricFamily("baton_router_nodes", words, labels=["role", "state"])
        nodes: list[tuple[str, str]] = [(node.record.role, node.state) for node in self._registry.nodes]
        for role in ROLES:
            for state in STATES:
                family.add_metric([role, state], nodes.count((role, state)))
        return family


def _counts(
    label: str, name: str, words: str, values: Mapping[str, float], common: Mapping[str, str] | None = None
) -> Metric:
    """One counter. With `label` "" it has no label of its own, and one value."""
    given = common or {}
    labels: Sequence[str] = [*given, *([label] if label else [])]
    family = CounterMetricFamily(name, words, labels=labels)
    for value, number in values.items():
        family.add_metric([*given.values(), *([value] if label else [])], number)
    return family
