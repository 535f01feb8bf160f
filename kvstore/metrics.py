"""A store's metrics for Prometheus, read when it scrapes: the sums that operators see too. No block, arena or writer
becomes a label, so there are as many series after a year as after a minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvstore.admin import Admin
from kvstore.tally import GAP_BOUNDS_S, Gaps, StoreTally
from kvstore.told import StoreStats

# name, what of `TierStats`, help
_TIER_GAUGES = (
    ("capacity_blocks", "capacity_blocks", "Blocks that the tier has room for."),
    ("blocks", "num_blocks", "Blocks that can be had from the tier."),
    ("bytes", "num_bytes", "Bytes of these blocks."),
    ("writing_blocks", "num_writing", "Places of the tier that are being written."),
)
_TIER_COUNTERS = (
    (
        "hits",
        "num_hits",
        "Blocks sent to readers over the wire, by the tier that had them. Reads of mapped slots pass the store by: see"
        " baton_kv_mapped_reads_seen, and baton_kv_fetch_blocks of the nodes.",
    ),
    (
        "misses",
        "num_misses",
        "Blocks that readers asked for over the wire and that the tier did not have; one that the disk had is a miss of"
        " memory.",
    ),
    ("evictions", "num_evicted", "Blocks that left the tier to make room; also those that went on to the disk."),
    ("removals", "num_removed", "Blocks that an operator evicted."),
)
# name, what of `StoreStats`, help
_COUNTERS = (
    ("committed_blocks", "num_committed", "Blocks that writers have brought."),
    ("demotions", "num_demoted", "Blocks written to disk after their eviction from memory."),
    ("promotions", "num_promoted", "Blocks brought back from disk into memory."),
    (
        "mapped_reads_seen",
        "num_mapped_reads",
        "Slots found read through the mapping since they were last looked at, at eviction or for a list. Several reads"
        " between two looks count once.",
    ),
    ("writers_reaped", "num_reaped", "Writers that died and whose slots were taken back."),
)


class StoreCollector(Collector):
    """All metrics of one store."""

    def __init__(self, admin: Admin, tally: StoreTally) -> None:
        self._admin = admin
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        stats = self._admin.store_stats()
        yield from self._tiers(stats.slot_bytes)
        yield from self._store(stats)
        yield self._gaps("reuse_gap_seconds", "Seconds between two uses of a block, by the tier that then has it.")
        words = "Seconds from a block's eviction from the tier to somebody asking for it again."
        yield self._gaps("evict_to_reuse_gap_seconds", words)

    def _tiers(self, slot_bytes: int) -> Iterator[Metric]:
        tiers = self._admin.tier_stats()
        for name, field, words in _TIER_GAUGES:
            gauge = GaugeMetricFamily(f"baton_kv_{name}", words, labels=["tier"])
            for tier in tiers:
                gauge.add_metric([tier.tier], getattr(tier, field))
            yield gauge
        capacity = GaugeMetricFamily("baton_kv_capacity_bytes", "Bytes of as many blocks.", labels=["tier"])
        for tier in tiers:
            capacity.add_metric([tier.tier], tier.capacity_blocks * slot_bytes)
        yield capacity
        for name, field, words in _TIER_COUNTERS:
            counter = CounterMetricFamily(f"baton_kv_{name}", words, labels=["tier"])
            for tier in tiers:
                counter.add_metric([tier.tier], getattr(tier, field))
            yield counter

    def _store(self, stats: StoreStats) -> Iterator[Metric]:
        for name, field, words in _COUNTERS:
            yield CounterMetricFamily(f"baton_kv_{name}", words, value=getattr(stats, field))
        refused = CounterMetricFamily(
            "baton_kv_reservations_refused",
            "Requests for slots that got none: all written to, or draining.",
            labels=["why"],
        )
        refused.add_metric(["full"], stats.num_full)
        refused.add_metric(["draining"], stats.num_draining)
        yield refused
        words = "Messages that broke the format, or were not for this socket."
        frames = CounterMetricFamily("baton_kv_refused_frames", words, labels=["socket"])
        frames.add_metric(["control"], stats.num_refused_control)
        frames.add_metric(["data"], stats.num_refused_data)
        yield frames
        yield GaugeMetricFamily("baton_kv_draining", "1 while the store takes no new blocks.", value=stats.draining)

    def _gaps(self, name: str, words: str) -> Metric:
        family = HistogramMetricFamily(f"baton_kv_{name}", words, labels=["tier"])
        for tier in self._admin.tier_stats():
            sums = self._tally.tiers[tier.tier]
            gaps = sums.reuse if name == "reuse_gap_seconds" else sums.evict_to_reuse
            family.add_metric([tier.tier], _buckets(gaps), gaps.total_s)
        return family


def _buckets(gaps: Gaps) -> list[tuple[str, float]]:
    """Bounds, and the number of values at or below each, as Prometheus counts them."""
    bounds = [*(str(bound) for bound in GAP_BOUNDS_S), "+Inf"]
    return list(zip(bounds, accumulate(gaps.counts), strict=True))
