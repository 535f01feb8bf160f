"""A node's metrics for Prometheus, read when it scrapes: its load as in its heartbeat, and the sums of `GetLoad`.

Series are by source, choice and phase only, so there are as many after a year as after a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.engine import Engine
from kvstore.directory import NodeRecord
from node.intake import TIERS, Intake


class NodeCollector(Collector):
    """Fetches from the store, choices, and where the time of steps went."""

    def __init__(
        self, intake: Intake, engine: Engine, record: Callable[[], NodeRecord], ranks: Collector | None = None
    ) -> None:
        """`record` gives the last heartbeat's record; `ranks` has the further metrics of a wide node."""
        self._intake = intake
        self._engine = engine
        self._record = record
        self._ranks = ranks

    def collect(self) -> Iterator[Metric]:
        yield from self._load()
        yield from self._fetches()
        yield from self._choices()
        yield from self._steps()
        if self._ranks is not None:
            yield from self._ranks.collect()

    def _load(self) -> Iterator[Metric]:
        """The load as of the last heartbeat: asking the engine would wait for its step."""
        record = self._record()
        used = 1.0 - record.free_blocks / record.total_blocks if record.total_blocks else 0.0
        for name, words, value in (
            ("num_requests_running", "Requests in the engine's batch.", record.num_running),
            ("num_requests_waiting", "Requests that wait for their turn or for blocks.", record.num_waiting),
            ("kv_cache_usage_perc", "Part of the engine's KV blocks that requests hold; 1 is all.", used),
            ("queued_prefill_tokens", "Prompt tokens that are still to be computed.", record.queued_prefill_tokens),
            ("prefill_tokens_per_second", "Speed of prompts, measured; 0: not yet.", record.prefill_tokens_per_s),
            ("decode_step_seconds", "Seconds to a stream's next token, measured; 0: not yet.", record.decode_step_s),
            ("node_draining", "1 while the node takes no requests.", float(record.draining)),
        ):
            family = GaugeMetricFamily(f"baton_{name}", words, labels=["model_name", "role"])
            family.add_metric([record.model, record.role], value)
            yield family

    def _fetches(self) -> Iterator[Metric]:
        """Fetches by source: `local` is the mapped arena, `remote` the wire: other arenas, and this one's disk."""
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

        hits = {tier: self._intake.hits[tier] for tier in TIERS}
        yield _by("tier", "baton_kv_prefix_hit_blocks", "Blocks of prompts that came out of a store, by where.", hits)

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
