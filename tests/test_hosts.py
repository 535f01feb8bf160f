"""Prefill, decode, router and stores on hosts of their own: limited links, hosts that vanish, come back, or join.

The hosts are network namespaces. The text is that of one engine alone, and afterwards all blocks are free. All tests
share one cluster, which is as each of them found it when it ends; `test_two_hosts.py` has one with Ray and a wire key.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from conftest import POCKET, eventually
from harness import Answer, reference
from hosts_harness import NETNS, HostsCluster

from benchmarks.lan import Lan
from deploy.redis import EmbeddedRedis

pytestmark = [*NETNS, pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

ROUTER = 2  # its host
TEXT = "".join(f"Section {n} of the library reference. " for n in range(80)).encode()
NUM_PROMPT_TOKENS = 2000
NUM_TOKENS = 24
PROMPTS = [[256, *f"Question {n}. ".encode(), *TEXT][:NUM_PROMPT_TOKENS] for n in range(6)]
OPTIONS = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
LATE_S = 60.0  # whoever answers later than this hangs


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return reference(POCKET, PROMPTS, NUM_TOKENS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[HostsCluster]:
    """Prefill on host 0, decode on host 1, the router on host 2, and another decode node that joins on host 3."""
    folder = Path(tempfile.mkdtemp(prefix="baton-", dir="/dev/shm"))
    with Lan(3) as lan:
        redis = EmbeddedRedis(folder / "redis", lan.address)
        redis.start()
        cluster = HostsCluster(lan, POCKET, redis.url, folder, ROUTER, max_num_batched_tokens=256)
        try:
            await asyncio.gather(cluster.start_store(0), cluster.start_store(1), cluster.start_router())
            await asyncio.gather(
                cluster.start_node("prefill-0", "prefill", store=0), cluster.start_node("decode-0", "decode", store=1)
            )
            await cluster.wait_for_nodes(2)
            yield cluster
        finally:
            await cluster.stop()
            redis.stop()
            shutil.rmtree(folder)


@pytest.mark.parametrize("bits_per_s", [1e9, 1e10], ids=["1 Gbit/s", "10 Gbit/s"])
async def test_prefill_and_decode_on_two_hosts(cluster: HostsCluster, bits_per_s: float) -> None:
    for host in cluster.lan.hosts:
        host.limit(bits_per_s)
    decode, tries = cluster.host_of("decode-0"), iter(range(1000))

    async def come() -> bool:
        """Whether blocks came over the link. Where a busy machine makes it slow, they are computed instead."""
        prompt = [256, *f"Try {next(tries)} at {bits_per_s}. ".encode(), *TEXT][:NUM_PROMPT_TOKENS]
        before, received_bytes = await cluster.came("decode-0"), decode.received_bytes()
        answer = await cluster.generate(prompt, **OPTIONS)
        assert [answer.token_ids] == reference(POCKET, [prompt], NUM_TOKENS)
        assert nodes_of([answer]) == {"prefill-0", "decode-0"}
        num_bytes = (await cluster.came("decode-0")).num_bytes - before.num_bytes
        assert num_bytes < decode.received_bytes() - received_bytes
        return num_bytes > 0 and answer.timeline is not None and answer.timeline.decode_store_hit_tokens > 0

    await eventually(come, LATE_S, "blocks come from the other host")
    await cluster.assert_quiet()


async def test_a_host_that_joins_is_used(cluster: HostsCluster, expected: list[list[int]]) -> None:
    cluster.lan.join().limit(1e9)
    await asyncio.gather(cluster.start_store(3), cluster.start_node("decode-1", "decode", store=3))
    await cluster.wait_for_nodes(3)
    assert cluster.host_of("decode-1") is cluster.lan.hosts[3]

    async def is_used() -> bool:
        answers = await asyncio.gather(*(cluster.generate(prompt, **OPTIONS) for prompt in PROMPTS[:3]))
        assert [answer.token_ids for answer in answers] == expected[:3]
        return "decode-1" in nodes_of(answers)

    await eventually(is_used, LATE_S, "the new host is used")
    await cluster.assert_quiet()


async def test_the_host_that_decodes_vanishes(cluster: HostsCluster, expected: list[list[int]]) -> None:
    victims: list[str] = []

    async def cut(answer: Answer) -> None:
        if len(answer.token_ids) >= 5 and not victims:
            victims.append(await running(cluster, "decode"))
            cluster.host_of(victims[0]).cut()

    answer = await asyncio.wait_for(cluster.generate(PROMPTS[3], cut, **OPTIONS), LATE_S)
    assert answer.token_ids == expected[3]
    assert answer.timeline is not None and answer.timeline.migrations >= 1
    await back_in_use(cluster, victims[0])


async def test_the_host_that_prefills_vanishes(cluster: HostsCluster, expected: list[list[int]]) -> None:
    asking = asyncio.create_task(cluster.generate(PROMPTS[4], **OPTIONS))
    victim = await running(cluster, "prefill")
    cluster.host_of(victim).cut()
    answer = await asyncio.wait_for(asking, LATE_S)
    assert answer.token_ids == expected[4]
    assert answer.timeline is not None and answer.timeline.migrations >= 1
    await back_in_use(cluster, victim)


async def test_a_host_vanishes_while_its_blocks_are_fetched(cluster: HostsCluster, expected: list[list[int]]) -> None:
    """Behind the first token: at 20 Mbit/s most blocks are still to come. What does not come is computed."""
    host = cluster.host_of("prefill-0")
    host.limit(2e7)

    async def cut(answer: Answer) -> None:
        if len(answer.token_ids) == 1:
            host.cut()

    answer = await asyncio.wait_for(cluster.generate(PROMPTS[5], cut, **OPTIONS), LATE_S)
    assert answer.token_ids == expected[5]
    assert answer.timeline is not None and answer.timeline.prefill_node == "prefill-0"
    host.limit(1e9)
    await back_in_use(cluster, "prefill-0")


async def running(cluster: HostsCluster, role: str) -> str:
    """The node of that role that runs a request now, or the next one that does."""
    names = [name for name in cluster.baseline if name.startswith(role)]
    while True:
        for name in names:
            if (await cluster.load(name)).num_running:
                return name
        await asyncio.sleep(0.005)


async def back_in_use(cluster: HostsCluster, name: str) -> None:
    """Mends the link of a node's host: the node is called again, and nothing leaked anywhere."""
    cluster.host_of(name).mend()
    rounds = iter(range(1, 1000))

    async def is_used() -> bool:
        start = next(rounds)  # another prompt each time: one that is known would need no prefill
        prompts = [[256, *f"{name} {start} {n}".encode(), *TEXT[:300]] for n in range(4)]
        answers = await asyncio.gather(*(cluster.generate(prompt, max_tokens=4) for prompt in prompts))
        return name in nodes_of(answers)

    await eventually(is_used, LATE_S, f"{name} is used again")
    await cluster.assert_quiet()


def nodes_of(answers: list[Answer]) -> set[str]:
    timelines = [answer.timeline for answer in answers if answer.timeline is not None]
    return {node for timeline in timelines for node in (timeline.prefill_node, timeline.decode_node)}
