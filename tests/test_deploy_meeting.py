"""How the ranks of a node find each other: late, early, twice, and behind a leader that has died. On a real Redis."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from conftest import eventually, free_port

from deploy import meeting
from deploy.interfaces import interface_of, talk_through
from deploy.meeting import NobodyMet, join
from deploy.node_config import NodeConfig
from engine.shard import Shard

KEY = "baton:default:meeting:decode-0"


class Group:
    """In place of a RankGroup, of which a process can have but one."""

    def __init__(self, shard: Shard, store: Any, device: Any, timeout_s: float) -> None:
        self.shard, self.store = shard, store


@pytest.fixture(autouse=True)
def _groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "RankGroup", Group)
    monkeypatch.setattr(meeting, "POLL_S", 0.01)
    monkeypatch.setattr(meeting, "ANSWER_S", 0.2)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")


def config(redis_url: str, rank: int, tp: int = 3) -> NodeConfig:
    return NodeConfig("decode-0", str(Path()), "m", redis_url, tensor_parallel_size=tp, rank=rank)


async def test_a_node_of_one_rank_meets_nobody() -> None:
    assert await join(config("redis://nowhere", 0, tp=1)) is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
async def test_all_meet_in_whatever_order_they_come(redis_url: str, order: tuple[int, ...]) -> None:
    joining = []
    for rank in order:
        joining.append(asyncio.create_task(join(config(redis_url, rank))))
        await asyncio.sleep(0.05)
    groups = await asyncio.gather(*joining)
    assert [group.shard.rank for group in groups] == list(order)
    groups[0].store.set("word", "heard")
    assert all(group.store.get("word") == b"heard" for group in groups)
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        assert await client.get(KEY) is None, "a rank that comes back is not to call there"


async def test_the_address_of_a_dead_leader_is_passed_over(redis_url: str) -> None:
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        await client.set(KEY, f"127.0.0.1:{free_port()}")
    follower = asyncio.create_task(join(config(redis_url, 1, tp=2)))
    await asyncio.sleep(0.1)
    assert not follower.done()
    leader = await join(config(redis_url, 0, tp=2))
    assert leader is not None
    assert await follower is not None


@pytest.mark.parametrize(
    "answer", [b"another 1\n", b"former x\n", b"former\n", b"\xff" * 1000 + b"\n", b"x" * 10**6, b""]
)
async def test_a_port_that_is_somebody_else_s_now_is_passed_over(redis_url: str, answer: bytes) -> None:
    """The kernel gave it away again: ranks of another node may meet there, and nobody is to take their places."""
    calls = 0

    async def say(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.write(answer)  # and keeps the line

    stranger = await asyncio.start_server(say, "127.0.0.1", 0)
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        await client.set(KEY, f"127.0.0.1:{stranger.sockets[0].getsockname()[1]} former")
    follower = asyncio.create_task(join(config(redis_url, 1, tp=2)))
    await eventually(lambda: calls)
    assert await join(config(redis_url, 0, tp=2)) is not None
    assert await asyncio.wait_for(follower, 30) is not None
    stranger.close()


@pytest.mark.parametrize("rank", [0, 1])
async def test_nobody_waits_for_ever(redis_url: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "JOIN_S", 0.3)
    with pytest.raises(NobodyMet, match=f"rank {rank} of 2: nobody came"):
        await asyncio.wait_for(join(config(redis_url, rank, tp=2)), 30)
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        assert await client.get(KEY) is None


def test_a_rank_that_came_and_died_is_not_waited_for_for_ever() -> None:
    """The others have met by then, and look for each other."""
    port = free_port()
    code = (
        "import torch; from engine import parallel; from engine.shard import Shard;"
        f"parallel.FORM_S = 1.0; meeting = parallel.open_meeting('127.0.0.1:{port}', True);"
        "parallel.RankGroup(Shard(tp_size=2), meeting, torch.device('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "Error" in done.stderr


async def test_a_rank_that_comes_twice_makes_all_begin_again(redis_url: str) -> None:
    """Its first process has died since it came, and the others would wait for it."""
    leader = asyncio.create_task(join(config(redis_url, 0)))
    await join(config(redis_url, 1))
    with pytest.raises(NobodyMet, match="this rank ended"):
        await join(config(redis_url, 1))
    with pytest.raises(NobodyMet, match="a rank ended"):
        await leader


def test_an_address_names_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") == ""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "given")
    talk_through("127.0.0.1")
    import os

    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "given")
