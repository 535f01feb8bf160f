"""A wide node on a real Ray: its ranks in one placement group, and the whole node back when one of them was killed."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import eventually
from test_deploy_launch import alone, generate, incarnations, left_of, small, timelines_of_a_burst

from deploy.config import ConfigError
from deploy.launch import Cluster

__all__ = ["alone"]

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tiny_model_dir: Path) -> Iterator[Cluster]:
    cluster = Cluster(small(tiny_model_dir, decode_tensor_parallel_size=2, pin_cores=False))
    cluster.start()
    yield cluster
    assert cluster.stop() == []
    assert left_of(cluster) == []


async def test_a_wide_node_gives_the_same_text_from_the_same_blocks(cluster: Cluster, alone: list[int]) -> None:
    assert set(cluster.pids) == {"store-127.0.0.1", "prefill-0", "decode-0", "decode-0.1", "router-0"}
    assert (await generate(cluster))[0] == alone
    timelines = await timelines_of_a_burst(cluster)
    assert any(timeline.prefill_node == "prefill-0" and timeline.decode_store_hit_tokens for timeline in timelines)


@pytest.mark.parametrize("rank", ["decode-0.1", "decode-0"])
async def test_a_killed_rank_brings_the_node_back_whole(cluster: Cluster, alone: list[int], rank: str) -> None:
    before, pids = await incarnations(cluster), cluster.pids
    os.kill(pids[rank], signal.SIGKILL)

    async def is_back() -> bool:
        now = await incarnations(cluster)
        return now.keys() == before.keys() and now["decode-0"] != before["decode-0"]

    await eventually(is_back, 60, "a new decode-0")
    now = cluster.pids
    assert all(now[name] != pids[name] for name in ("decode-0", "decode-0.1"))
    assert (await generate(cluster))[0] == alone


async def test_nodes_are_added_and_drained_while_requests_run(cluster: Cluster, alone: list[int]) -> None:
    """A wide node comes, is used, and goes while it streams; no request notices."""
    grown = dataclasses.replace(cluster.config, decode=2, prefill=2)
    lines = await asyncio.to_thread(cluster.scale, grown)
    assert sorted(line.split()[0] for line in lines) == ["decode-1", "decode-1.1", "prefill-1"]
    used: set[str] = set()

    async def is_used() -> bool:
        used.update(timeline.decode_node for timeline in await timelines_of_a_burst(cluster))
        return {"decode-0", "decode-1"} <= used

    await eventually(is_used, 30, "the new node takes work")
    bursts = [asyncio.create_task(timelines_of_a_burst(cluster)) for _ in range(3)]
    await asyncio.sleep(0.2)
    lines = await asyncio.to_thread(cluster.scale, dataclasses.replace(grown, decode=1, prefill=1))
    assert sorted(lines) == ["decode-1 is drained and gone", "prefill-1 is drained and gone"]
    for burst in bursts:
        assert len(await burst) == 8
    assert (await generate(cluster))[0] == alone
    assert set(cluster.pids) == {"store-127.0.0.1", "prefill-0", "decode-0", "decode-0.1", "router-0"}
    assert (await incarnations(cluster)).keys() == {"prefill-0", "decode-0"}


async def test_a_scale_that_fails_changes_nothing(cluster: Cluster, alone: list[int]) -> None:
    config = cluster.config
    with pytest.raises(ConfigError, match="no Ray machine elsewhere"):
        await asyncio.to_thread(cluster.scale, dataclasses.replace(config, decode=2, decode_hosts=("elsewhere",)))
    assert cluster.config == config
    assert (await generate(cluster))[0] == alone
