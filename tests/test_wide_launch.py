"""A wide node on a real Ray: its ranks in one placement group, and the whole node back when one of them was killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import eventually
from test_deploy_launch import alone, generate, incarnations, left_of, small, timelines_of_a_burst

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
