"""A rank killed with -9 takes its node down whole, requests go on elsewhere, and the node comes back when its ranks do.

One cluster of real processes: a prefill node of two tensor-parallel ranks, a decode node of two stages, and one of a
single rank for both legs. The test is their supervisor.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from conftest import POCKET, RedisProcess, eventually
from harness import Answer, ProcessCluster, reference

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

LONG = [256, *("".join(f"Section {n} of the library reference. " for n in range(30)).encode())]
PROMPTS = [[*LONG[: 300 + 97 * n], *f"Question {n}.\n".encode()] for n in range(4)]
NUM_TOKENS = 32
SILENCE_S = 10.0  # after which a rank is gone
WIDE = {
    "prefill-0": {"role": "prefill", "tp": 2, "rank_timeout_s": SILENCE_S},
    "decode-0": {"role": "decode", "pp": 2, "rank_timeout_s": SILENCE_S},
}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return reference(POCKET, PROMPTS, NUM_TOKENS, ignore_eos=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[ProcessCluster]:
    redis_process = RedisProcess()
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/dev/shm") as folder:
        pieces = {"kv_layer_pieces": 2, "kv_head_pieces": 2}
        cluster = ProcessCluster(POCKET, redis_process.url, Path(folder), max_num_batched_tokens=64, **pieces)
        cluster.router_options = {"progress_timeout_s": 5.0}
        try:
            await cluster.start(prefill=0, decode=0, both=1)
            await asyncio.gather(*(cluster.start_node(name, **options) for name, options in WIDE.items()))
            await cluster.wait_for_nodes(3)
            yield cluster
        finally:
            await cluster.stop()
            redis_process.close()


async def ask_all(cluster: ProcessCluster, on_message=None) -> list[Answer]:
    options = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    return await asyncio.gather(*(cluster.generate(prompt, on_message, **options) for prompt in PROMPTS))


async def come_back(cluster: ProcessCluster, name: str) -> None:
    """Every rank has ended by itself; all are started again, and the node is there, with nothing of its former life."""
    for rank in (name, f"{name}.1"):
        await asyncio.wait_for(cluster.processes[rank].process.wait(), 20)
    await cluster.start_node(name, **WIDE[name])
    await cluster.wait_for_nodes(3)


def files(cluster: ProcessCluster) -> set[str]:
    """All that the cluster has in shared memory, without what belongs to one process: locks of those that write."""
    return {str(file.relative_to(cluster.folder)) for file in cluster.folder.rglob("*") if file.suffix != ".lock"}


def locks(cluster: ProcessCluster) -> int:
    return len([*cluster.folder.rglob("writers/*.lock")])


@pytest.mark.parametrize(
    ("name", "rank", "num_tokens"),
    [("prefill-0", ".1", 0), ("prefill-0", "", 0), ("decode-0", ".1", 5), ("decode-0", "", 20)],
)
async def test_a_killed_rank_takes_its_node_down_and_no_request(
    cluster: ProcessCluster, expected: list[list[int]], name: str, rank: str, num_tokens: int
) -> None:
    """Killed while prompts are computed, or with so many tokens of the first stream out."""
    is_killed = False

    def kill_in_time(answer: Answer) -> None:
        nonlocal is_killed
        if not is_killed and len(answer.token_ids) >= num_tokens > 0:
            is_killed = True
            cluster.kill(name + rank)

    asking = asyncio.create_task(ask_all(cluster, kill_in_time))
    if not num_tokens:
        await asyncio.sleep(0.1)
        cluster.kill(name + rank)
    assert [answer.token_ids for answer in await asking] == expected
    assert [answer.token_ids for answer in await ask_all(cluster)] == expected  # without it
    await come_back(cluster, name)
    assert [answer.token_ids for answer in await ask_all(cluster)] == expected
    await cluster.assert_quiet()


@pytest.mark.parametrize("rank", [".1", ""])
async def test_an_idle_node_notices_that_a_rank_is_gone(cluster: ProcessCluster, rank: str) -> None:
    """And nothing of it stays in shared memory."""
    await ask_all(cluster)
    before, num_locks = files(cluster), locks(cluster)
    cluster.kill(f"decode-0{rank}")
    await come_back(cluster, "decode-0")
    await ask_all(cluster)
    await eventually(lambda: files(cluster) == before and locks(cluster) == num_locks, what="what the killed rank had")
    await cluster.assert_quiet()


async def test_a_rank_that_is_stopped_is_as_good_as_gone(cluster: ProcessCluster, expected: list[list[int]]) -> None:
    """A leader of one node and a follower of another one stop, their connections alive. Neither node hangs for ever."""
    asking = asyncio.create_task(ask_all(cluster))
    await asyncio.sleep(0.1)
    stopped = ("prefill-0", "decode-0.1")
    for rank in stopped:
        cluster.signal(rank, signal.SIGSTOP)
    assert [answer.token_ids for answer in await asking] == expected
    for rank in ("prefill-0.1", "decode-0"):
        await asyncio.wait_for(cluster.processes[rank].process.wait(), 4 * SILENCE_S)
    for rank in stopped:
        assert cluster.processes[rank].process.returncode is None
        cluster.signal(rank, signal.SIGCONT)
    await asyncio.gather(*(come_back(cluster, name) for name in WIDE))
    assert [answer.token_ids for answer in await ask_all(cluster)] == expected
    await cluster.assert_quiet()


async def test_blocks_pass_from_one_cut_to_the_other(cluster: ProcessCluster) -> None:
    """The prefill node is cut by heads, the decode node by layers. Which way requests take is the router's choice."""
    ways: list[tuple[str, str, bool]] = []
    for turn in range(10):
        prompts = [[256, *f"{turn} {n} ".encode(), *LONG[:500]] for n in range(6)]
        answers = await asyncio.gather(*(cluster.generate(prompt, max_tokens=8) for prompt in prompts))
        assert [answer.token_ids for answer in answers] == reference(POCKET, prompts, 8)
        lines = [answer.timeline for answer in answers]
        ways += [(line.prefill_node, line.decode_node, line.decode_store_hit_tokens > 0) for line in lines]
        if ("prefill-0", "decode-0", True) in ways:
            break
    else:
        raise AssertionError(ways)
    await cluster.assert_quiet()


async def test_a_rank_that_comes_late_is_waited_for(cluster: ProcessCluster, expected: list[list[int]]) -> None:
    """A leader alone is no node; a rank that ended before the others came is one that never came."""
    cluster.kill("decode-0.1")
    for rank in ("decode-0", "decode-0.1"):
        await asyncio.wait_for(cluster.processes[rank].process.wait(), 20)
    starting = asyncio.create_task(cluster.start_node("decode-0", **WIDE["decode-0"]))
    await asyncio.sleep(0.5)
    assert [answer.token_ids for answer in await ask_all(cluster)] == expected
    await starting
    await cluster.wait_for_nodes(3)
    await eventually(lambda: cluster.processes["decode-0"].process.returncode is None)
    await cluster.assert_quiet()
