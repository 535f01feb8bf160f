"""Who is alive, and how loads are counted between two heartbeats. Records in a real Redis, time in the test's hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest
from conftest import RedisProcess, eventually
from router_fakes import CLUSTER, ROOT, FakeCluster, running, set_health

from batonpb import node_pb2
from kvstore.directory import Directory, NodeRecord
from router.cluster import Cluster
from router.errors import LegFailed
from router.legs import Burden, Work
from router.registry import Patience, Registry

PATIENCE = Patience(ttl_s=3.0, cool_down_s=2.0, probe_s=0.5)
RECORD = NodeRecord(
    node_id="n0",
    incarnation="i0",
    role="both",
    address="127.0.0.1:1",
    model="pocket",
    kv_root=ROOT.hex(),
    block_size=16,
    block_bytes=64,
    vocab_size=258,
    max_model_len=4096,
    num_running=3,
    queued_prefill_tokens=100,
    free_blocks=50,
    total_blocks=80,
    prefill_tokens_per_s=1000.0,
    decode_step_s=0.01,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    directory = Directory(redis_url, CLUSTER)
    yield directory
    await directory.close()


@pytest.fixture
async def registry(directory: Directory, clock: Clock) -> AsyncIterator[Registry]:
    """Polls when the test says so."""
    registry = Registry(directory, patience=PATIENCE, clock=clock)
    yield registry
    await registry.stop()


@dataclass(frozen=True)
class Row:
    """A node as a policy sees it."""

    node_id: str
    num_requests: int
    free_blocks: int
    free_at_s: float
    prefill_s: float  # of 600 tokens
    step_s: float  # of a single request


def rows(cluster: Cluster) -> list[Row]:
    found = [row for row in range(len(cluster.node_ids)) if cluster.is_there[row]]
    assert len(found) == len(cluster)
    return [
        Row(
            cluster.node_ids[row],
            *(int(column[row]) for column in (cluster.num_requests, cluster.free_blocks)),
            float(cluster.free_at_s[row]),
            float(cluster.prefill_base_s[row] + 600 * cluster.prefill_token_s[row]),
            float(cluster.step_base_s[row] + cluster.step_request_s[row]),
        )
        for row in found
    ]


async def poll(registry: Registry, clock: Clock, after_s: float = 0.25) -> list[Row]:
    clock.now_s += after_s
    await registry.refresh()
    return rows(registry.snapshot())


async def test_a_node_comes_and_goes(registry: Registry, directory: Directory, clock: Clock) -> None:
    assert await poll(registry, clock) == [] and registry.pool is None
    await directory.heartbeat_node(RECORD, 30.0)
    [view] = await poll(registry, clock)
    assert (view.node_id, view.num_requests, view.free_blocks) == ("n0", 3, 50)
    assert view.free_at_s == pytest.approx(clock.now_s + 0.1), "a hundred tokens are queued"
    assert view.step_s == pytest.approx(0.01 / 1.16), "of one request alone, from a step of three"
    await directory.remove_node("n0")
    assert await poll(registry, clock, 2.9), "an emptied Redis must not empty the cluster at once"
    assert await poll(registry, clock, 0.2) == []
    assert registry.pool is not None, "what was known of the model stays known"


async def test_a_draining_node_gets_nothing(registry: Registry, directory: Directory, clock: Clock) -> None:
    await directory.heartbeat_node(replace(RECORD, draining=True), 30.0)
    assert await poll(registry, clock) == []


async def test_records_that_make_no_sense_are_left_out(registry: Registry, directory: Directory, clock: Clock) -> None:
    for n, news in enumerate(({"kv_root": "xyz"}, {"kv_root": "00"}, {"block_size": 0}, {"role": "king"})):
        await directory.heartbeat_node(replace(RECORD, node_id=f"bad{n}", **news), 30.0)
    await directory.heartbeat_node(RECORD, 30.0)
    assert [view.node_id for view in await poll(registry, clock)] == ["n0"]


async def test_only_nodes_that_can_exchange_blocks_work_together(
    registry: Registry, directory: Directory, clock: Clock
) -> None:
    """While a new model is rolled out, requests go to whichever pool is larger."""
    for n, root in enumerate(("11" * 16, "22" * 16, "22" * 16)):
        await directory.heartbeat_node(replace(RECORD, node_id=f"n{n}", kv_root=root, max_model_len=100 + n), 30.0)
    assert {view.node_id for view in await poll(registry, clock)} == {"n1", "n2"}
    assert registry.pool is not None
    assert (registry.pool.root, registry.pool.max_model_len) == (b"\x22" * 16, 101)


async def test_nodes_that_take_no_work_have_no_say_in_what_is_served(
    registry: Registry, directory: Directory, clock: Clock
) -> None:
    """The end of a rollout: more of the old revision drain or have died than there are of the new one."""
    for n in range(3):
        await directory.heartbeat_node(replace(RECORD, node_id=f"old{n}", draining=n > 0), 30.0)
    await directory.heartbeat_node(replace(RECORD, node_id="new", kv_root="22" * 16, max_model_len=100), 30.0)
    await poll(registry, clock)
    registry.mark_down("old0", "i0", "test")
    assert [view.node_id for view in await poll(registry, clock)] == ["new"]
    assert registry.pool is not None and registry.pool.max_model_len == 100
    await directory.heartbeat_node(replace(RECORD, node_id="new", kv_root="22" * 16, draining=True), 30.0)
    assert await poll(registry, clock) == [] and registry.pool.root == ROOT, "nobody can work: all have a say"


async def test_a_served_model_can_be_asked_for_by_name(directory: Directory, clock: Clock) -> None:
    registry = Registry(directory, model="other", patience=PATIENCE, clock=clock)
    await directory.heartbeat_node(RECORD, 30.0)
    await directory.heartbeat_node(replace(RECORD, node_id="n1", model="other"), 30.0)
    assert [view.node_id for view in await poll(registry, clock)] == ["n1"]
    await registry.stop()


async def test_what_was_sent_counts_until_a_record_counts_it(
    registry: Registry, directory: Directory, clock: Clock
) -> None:
    await directory.heartbeat_node(RECORD, 30.0)
    await poll(registry, clock)

    def load() -> tuple[int, int, float]:
        """Requests, free blocks, queued seconds since the record."""
        [row] = rows(registry.snapshot())
        return row.num_requests, row.free_blocks, round(row.free_at_s - record_s, 6)

    record_s = clock.now_s
    with registry.prefill_leg("n0", Burden(compute_s=0.4, blocks=5)):
        assert load() == (4, 45, 0.5)
        with registry.decode_leg("n0", Burden(blocks=60)):
            assert load() == (5, 0, 0.5), "never less than no block"
        assert load() == (4, 45, 0.5), "a leg that is over counts no more"
        await poll(registry, clock)
        assert load() == (4, 45, 0.5), "the same record is no news"
        # A record that is new at this poll was written after the last poll, and so after the leg was sent.
        await directory.heartbeat_node(replace(RECORD, num_running=4), 30.0)
        await poll(registry, clock)
        record_s = clock.now_s
        assert load() == (4, 50, 0.1)
    assert load() == (4, 50, 0.1)


async def test_what_is_computed_is_queued_no_more(registry: Registry, directory: Directory, clock: Clock) -> None:
    await directory.heartbeat_node(RECORD, 30.0)
    await poll(registry, clock)
    with registry.prefill_leg("n0", Burden(compute_s=0.4)) as leg:
        clock.now_s += 1.0
        registry.computed(leg, Work(uncached_tokens=600, cached_tokens=0, seconds=0.3))
        [row] = rows(registry.snapshot())
        assert row.free_at_s == clock.now_s, "until now it was at work"
        assert 0.29 < row.prefill_s < 0.6, "on the way from what its record said to what it did"
    for seconds in (0.3, 0.3, 0.3, 0.3):
        with registry.prefill_leg("n0", Burden(compute_s=0.4)) as leg:
            registry.computed(leg, Work(600, 0, seconds))
    assert rows(registry.snapshot())[0].prefill_s == pytest.approx(0.3, rel=0.1)
    registry.computed(leg, Work(600, 0, 9.0))
    assert rows(registry.snapshot())[0].prefill_s < 1.0, "late news of a leg that is over"


async def test_new_and_rested_nodes_count_as_fast_as_their_peers(
    registry: Registry, directory: Directory, clock: Clock
) -> None:
    for n, (rate, step_s) in enumerate([(1000.0, 0.01), (1000.0, 0.01), (10.0, 1.0), (0.0, 0.0)]):
        record = replace(
            RECORD, node_id=f"n{n}", prefill_tokens_per_s=rate, decode_step_s=step_s, num_running=int(n != 2)
        )
        await directory.heartbeat_node(record, 60.0)
    await poll(registry, clock)
    assert [row.prefill_s for row in rows(registry.snapshot())] == pytest.approx([0.6, 0.6, 60.0, 0.6])
    for _ in range(5):
        await poll(registry, clock, 2.5)
    found = rows(registry.snapshot())
    assert [row.prefill_s for row in found] == pytest.approx([0.6] * 4), "the slow one has rested"
    assert [row.step_s for row in found] == pytest.approx([0.01] * 4)
    with registry.prefill_leg("n2", Burden()) as leg:
        for _ in range(8):
            registry.computed(leg, Work(100, 0, 10.0))
        assert rows(registry.snapshot())[2].prefill_s > 6.0, "measured again"


async def test_a_record_may_be_older_than_what_was_sent(registry: Registry, directory: Directory, clock: Clock) -> None:
    await directory.heartbeat_node(RECORD, 30.0)
    await poll(registry, clock)
    clock.now_s += 0.1
    with registry.prefill_leg("n0", Burden(compute_s=0.04)):
        await directory.heartbeat_node(replace(RECORD, num_running=0), 30.0)
        [view] = await poll(registry, clock, 0.1)
        assert view.num_requests == 1, "sent after the last poll: whether the record counts it, nobody knows"


async def test_a_node_that_is_down_gets_nothing_until_a_new_incarnation(
    registry: Registry, directory: Directory, clock: Clock
) -> None:
    await directory.heartbeat_node(RECORD, 30.0)
    await poll(registry, clock)
    registry.mark_down("n0", "an older one", "test")
    assert registry.snapshot(), "that was another process"
    registry.mark_down("n0", "i0", "test")
    assert len(registry.snapshot()) == 0
    assert await poll(registry, clock, 1.0) == []
    await directory.heartbeat_node(replace(RECORD, incarnation="i1"), 30.0)
    assert len(await poll(registry, clock)) == 1
    registry.mark_down("n0", "i0", "late news of the old one")
    assert len(registry.snapshot()) == 1
    with pytest.raises(LegFailed, match="is gone"):
        registry.decode_leg("nobody", Burden())


async def test_a_node_that_is_down_is_asked_after_a_while(redis_url: str, clock: Clock) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        node = await cluster.add("both0")
        directory = Directory(redis_url, CLUSTER)
        registry = Registry(directory, patience=PATIENCE, clock=clock)
        await registry.refresh()
        await set_health(node, is_well=False)
        registry.mark_down("both0", node.record.incarnation, "test")
        assert await poll(registry, clock, 1.9) == []
        assert await poll(registry, clock, 0.2) == []
        await asked(registry)
        assert await poll(registry, clock, 1.9) == [], "it is not well: the time counts anew"
        await set_health(node, is_well=True)
        await poll(registry, clock, 0.2)
        await eventually(lambda: registry.snapshot(), 5, "it is well and gets work again")
        await registry.stop()
        await directory.close()


async def test_an_answer_that_takes_too_long_puts_no_node_down(redis_url: str, clock: Clock) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        node = await cluster.add("both0")
        node.faults["prefill"] = lambda: asyncio.sleep(60)
        directory = Directory(redis_url, CLUSTER)
        registry = Registry(directory, patience=PATIENCE, clock=clock)
        await registry.refresh()
        with registry.prefill_leg("both0", Burden()) as leg:
            answering = asyncio.create_task(leg.run(node_pb2.NodeRequest(), None))
            await eventually(lambda: node.seen.active == 1, 5, "the node has it")
            await poll(registry, clock, 299.0)
            await asked(registry)
            assert not answering.done(), "it is well, and has a second left"
            await poll(registry, clock, 2.0)
            with pytest.raises(LegFailed, match="made no progress for 300") as caught:
                await answering
        assert not caught.value.is_down
        assert await poll(registry, clock), "it takes other requests"
        await registry.stop()
        await directory.close()


async def asked(registry: Registry) -> None:
    for node in registry._nodes.values():
        assert node.asking is not None
        await node.asking


async def test_nobody_is_forgotten_while_redis_is_away(redis_process: RedisProcess, clock: Clock) -> None:
    directory = Directory(redis_process.url, CLUSTER)
    registry = Registry(directory, patience=PATIENCE, clock=clock)
    await directory.heartbeat_node(RECORD, 30.0)
    assert len(await poll(registry, clock)) == 1
    redis_process.kill()
    assert len(await poll(registry, clock, 60.0)) == 1
    redis_process.start()

    async def is_back() -> bool:
        try:
            await directory.ping()
        except Exception:
            return False
        return True

    await eventually(is_back, 10, "Redis answers")
    assert len(await poll(registry, clock)) == 1, "back, and empty: the heartbeats need a moment"
    assert len(await poll(registry, clock, 2.9)) == 1
    assert await poll(registry, clock, 0.3) == []
    await registry.stop()
    await directory.close()
