"""`docs/kvstore.md` names the metrics that stores and nodes show, and the commands: all that there are, no others."""

from __future__ import annotations

import argparse
import re
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPOSITORY
from scraping import check_documented

from batonpb import rank_pb2
from deploy import kv
from deploy.node_metrics import NodeCollector
from deploy.rank_metrics import RankCollector
from engine.rank_meter import RankWork
from engine.speed import StepTiming
from kvstore.links import Links
from kvstore.server import StoreConfig, StoreServer
from node.intake import Intake

LOAD = ("num_running", "num_waiting", "queued_prefill_tokens", "free_blocks", "total_blocks", "draining")
LOAD += ("prefill_tokens_per_s", "decode_step_s")
PAGE = (REPOSITORY / "docs" / "kvstore.md").read_text()


async def test_the_metrics_that_the_page_names_are_those_that_there_are(redis_url: str, short_dir: Any) -> None:
    store = StoreServer(StoreConfig(dir=str(short_dir / "s"), redis_url=redis_url, slot_bytes=64, memory_bytes=1 << 14))
    await store.start()
    client: Any = SimpleNamespace(links=Links(64, lambda: 0.0))
    engine: Any = SimpleNamespace(timing=StepTiming(), rank_work=RankWork())
    record: Any = SimpleNamespace(**dict.fromkeys(LOAD, 0), model="pocket", role="both")
    intake, ranks = Intake(client, 16, 64), SimpleNamespace(work={1: rank_pb2.Work(stage=1)})
    of_ranks = RankCollector(engine, intake, SimpleNamespace(num_published_pieces=0), ranks)  # type: ignore[arg-type]
    collectors = (store._metrics, NodeCollector(intake, engine, lambda: record, of_ranks))
    families = [family for collector in collectors for family in collector.collect()]
    await store.stop()
    assert all(family.documentation.endswith(".") for family in families)
    check_documented(PAGE, families)


def test_the_commands_that_the_page_names_are_those_that_there_are() -> None:
    parser = argparse.ArgumentParser()
    kv.add_arguments(parser)
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    assert set(re.findall(r"^\*\*`baton kv (\w+)", PAGE, re.MULTILINE)) == set(commands.choices)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_page_is_found(page: str) -> None:
    assert "kvstore.md)" in (REPOSITORY / page).read_text()
