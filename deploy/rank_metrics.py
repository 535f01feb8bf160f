"""The work of each rank of a wide node, on its leader's /metrics: a node is one target to scrape, however wide.

The other ranks report to the leader each second, in the call that shows they are alive (`node.ranks`). The label `rank`
is a number below the node's width, so there are as many series after a year as after a minute. The `rate` of the
seconds of phase `compute` is the share of time that a rank, and so a stage, computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from batonpb import rank_pb2
from engine.engine import Engine
from node.intake import Intake
from node.publisher import Publisher
from node.ranks import Ranks


class RankCollector(Collector):
    """In addition to a `NodeCollector`, for a node of several ranks."""

    def __init__(self, engine: Engine, intake: Intake, publisher: Publisher, ranks: Ranks) -> None:
        self._engine = engine
        self._intake = intake
        self._publisher = publisher
        self._ranks = ranks

    def collect(self) -> Iterator[Metric]:
        steps = CounterMetricFamily(
            "baton_rank_steps",
            "Parts of steps that a rank has ended; the leader's: that it told.",
            labels=["rank", "stage"],
        )
        seconds = CounterMetricFamily(
            "baton_rank_seconds",
            "A rank's steps, by what they went into: its own computing; sums and gathers with its stage; waits for"
            " another stage.",
            labels=["rank", "stage", "phase"],
        )
        bytes_ = CounterMetricFamily(
            "baton_rank_bytes",
            "Bytes that a rank put into sums and gathers, handed to another stage, fetched from a store, published.",
            labels=["rank", "stage", "kind"],
        )
        for rank, work in {0: self._leader(), **self._ranks.work}.items():
            name = [str(rank), str(work.stage)]
            steps.add_metric(name, work.num_steps)
            for phase in ("compute", "collective", "pipeline"):
                seconds.add_metric([*name, phase], getattr(work, f"{phase}_s"))
            for kind in ("collective", "pipeline", "fetched", "published"):
                bytes_.add_metric([*name, kind], getattr(work, f"{kind}_bytes"))
        yield from (steps, seconds, bytes_)

    def _leader(self) -> rank_pb2.Work:
        links = self._intake.store.links
        return rank_pb2.Work(
            fetched_bytes=links.local.num_bytes + links.remote.num_bytes,
            published_bytes=self._publisher.num_published_pieces * self._intake.block_bytes,
            **dataclasses.asdict(self._engine.rank_work),
        )
