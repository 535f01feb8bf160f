"""A node's numbers for Prometheus, read when they are asked for: the sums that `GetLoad` sends, and no others.

Series are by source, choice and phase alone, so there are as many after a year as after a minute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.engine import Engine
from node.intake import Intake


class NodeCollector(Collector):
    """What came from the store, what was chosen, and where the time of steps went."""

    def __init__(self, intake: Intake, engine: Engine) -> None:
        self._intake = intake
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        yield from self._fetches()
        yield from self._choices()
        yield from self._steps()

    def _fetches(self) -> Iterator[Metric]:
        """By source: `local` is this machine's mapped arena, `remote` all others."""
        sources = {"local": self._intake.store.links.local, "remote": self._intake.store.links.remote}
        for name, words, values in (
            ("blocks", "Blocks fetched.", {source: link.num_blocks for source, link in sources.items()}),
            ("bytes", "Bytes fetched.", {source: link.num_bytes for source, link in sources.items()}),
            (
                "seconds",
                "Seconds in which blocks were on their way; those of the local arena are of the copy into the engine.",
                {source: link.seconds for source, link in sources.items()},
            ),
        ):
            yield _by("source", f"baton_kv_fetch_{name}", words, values)

    def _choices(self) -> Iterator[Metric]:
        choices = self._intake.choices
        chosen = {"fetch": choices.num_fetched_blocks, "compute": choices.num_computed_blocks}
        yield _by("choice", "baton_kv_chosen_blocks", "Blocks that a store had, by what was chosen for them.", chosen)
        words = "Choices where all speeds were known: those that predicted seconds are summed over."
        yield CounterMetricFamily("baton_kv_predictions", words, value=choices.num_informed)
        seconds = {"fetch": choices.predicted_fetch_s, "compute": choices.predicted_compute_s}
        words = "Seconds predicted for all blocks of these choices, one way and the other."
        yield _by("choice", "baton_kv_predicted_seconds", words, seconds)

    def _steps(self) -> Iterator[Metric]:
        timing = self._engine.timing
        yield CounterMetricFamily("baton_engine_steps", "Steps of the engine.", value=timing.num_steps)
        seconds = {
            "schedule": timing.schedule_s,
            "build": timing.build_s,
            "forward": timing.forward_s,
            "sample": timing.sample_s,
        }
        yield _by("phase", "baton_engine_step_seconds", "Where the time of steps went.", seconds)
        tokens = {"prefill": timing.num_prefill_tokens, "decode": timing.num_decode_tokens}
        yield _by("kind", "baton_engine_tokens", "Tokens computed; decode is a chunk of one.", tokens)
        context = {"prefill": timing.num_prefill_context_tokens, "decode": timing.num_decode_context_tokens}
        yield _by("kind", "baton_engine_context_tokens", "Tokens in the cache that attention read for them.", context)


def _by(label: str, name: str, words: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, words, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
