"""Who is alive, and how loads are counted between two heartbeats. Records in a real Redis, time in the test's hands."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from conftest import RedisProcess, eventually
from router_fakes import CLUSTER, ROOT, FakeCluster, running, set_health

from kvstore.directory import Directory, NodeRecord
from router.errors import LegFailed
from router.legs import Burden
from router.policy import NodeView
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


async def poll(registry: Registry, clock: Clock, after_s: float = 0.25) -> list[NodeView]:
    clock.now_s += after_s
    await registry.refresh()
    return registry.snapshot()


async def test_a_node_comes_and_goes(registry: Registry, directory: Directory, clock: Clock) -> None:
    assert await poll(registry, clock) == [] and registry.pool is None
    await directory.heartbeat_node(RECORD, 30.0)
    [view] = await poll(registry, clock)
    assert (view.node_id, view.num_requests, view.queued_prefill_tokens, view.free_blocks) == ("n0", 3, 100, 50)
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

    def load() -> tuple[int, int, int]:
        [view] = registry.snapshot()
        return view.num_requests, view.queued_prefill_tokens, view.free_blocks

    with registry.prefill_leg("n0", Burden(prefill_tokens=40, blocks=5)):
        assert load() == (4, 140, 45)
        with registry.decode_leg("n0", Burden(blocks=60)):
            assert load() == (5, 140, 0), "never less than no block"
        assert load() == (4, 140, 45), "a leg that is over counts no more"
        await poll(registry, clock)
        assert load() == (4, 140, 45), "the same record is no news"
        # A record that is new at this poll was written after the last poll, and so after the leg was sent.
        await directory.heartbeat_node(replace(RECORD, num_running=4), 30.0)
        await poll(registry, clock)
        assert load() == (4, 100, 50)
    assert load() == (4, 100, 50)


async def test_a_record_may_be_older_than_what_was_sent(registry: Registry, directory: Directory, clock: Clock) -> None:
    await directory.heartbeat_node(RECORD, 30.0)
    await poll(registry, clock)
    clock.now_s += 0.1
    with registry.prefill_leg("n0", Burden(prefill_tokens=40)):
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
    assert registry.snapshot() == []
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


async def test_a_rested_node_says_so(registry: Registry, directory: Directory, clock: Clock) -> None:
    idle = replace(RECORD, num_running=0)
    await directory.heartbeat_node(idle, 30.0)
    await poll(registry, clock)
    [view] = await poll(registry, clock, 2.0)
    assert not view.is_rested
    for _ in range(5):
        [view] = await poll(registry, clock, 2.5)
    assert view.is_rested
    with registry.decode_leg("n0", Burden()):
        [view] = await poll(registry, clock, 2.5)
        assert not view.is_rested
