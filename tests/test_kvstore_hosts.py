"""Blocks of a store on another host, over links that are slow, shared or cut: never a wrong byte, never a hang."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ServerProcess, eventually
from hosts_harness import NETNS
from kvstore_support import SLOT_BYTES, chain, content, take, writer_of

from benchmarks.lan import Host, Lan
from deploy.process import SECRETS
from deploy.redis import EmbeddedRedis
from kvstore.client import KVClient
from kvstore.curve import new_wire_key
from kvstore.directory import Directory

pytestmark = NETNS

HASHES = chain(0, 100)  # 10 MB
SLOW = 80e6  # bit/s: a second for all of them
TIMEOUT_S = 0.5


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan(1) as lan:
        yield lan


@dataclass
class Reader:
    """On this process's host; the blocks are on another one."""

    client: KVClient
    host: Host

    async def fetch(self, limit_s: float = 30.0) -> int:
        """How many of HASHES came; all of them are right."""
        match = await self.client.match(HASHES)
        taken = take(await asyncio.wait_for(self.client.fetch(match, limit_s), 60))
        assert taken == [content(block_hash) for block_hash in HASHES[: len(taken)]]
        return len(taken)

    async def all_come(self) -> bool:
        return await self.fetch() == len(HASHES)


@pytest.fixture(params=["tcp", "curve"])
async def reader(request: pytest.FixtureRequest, lan: Lan, short_dir: Path) -> AsyncIterator[Reader]:
    wire_key = new_wire_key() if request.param == "curve" else ""
    [host] = lan.hosts
    async with AsyncExitStack() as stack:
        redis = EmbeddedRedis(short_dir / "redis", lan.address)
        stack.callback(redis.stop)
        redis.start()
        config = {
            "dir": str(short_dir / "store"),
            "redis_url": redis.url,
            "slot_bytes": SLOT_BYTES,
            "memory_bytes": 2 * len(HASHES) * SLOT_BYTES,
            "advertise_host": host.address,
            "host": "there",
            "trusts_network": True,
        }
        environment = {SECRETS["wire_key"]: wire_key}
        store = await ServerProcess.start("store", config, prefix=host.command(), extra=environment)
        stack.push_async_callback(store.stop)
        directory = Directory(redis.url)
        stack.push_async_callback(directory.close)
        # It writes through shared memory, which has no hosts.
        writer = KVClient(directory, SLOT_BYTES, Path(config["dir"]))
        stack.push_async_callback(writer.close)
        assert await writer.publish(HASHES, writer_of(HASHES)) == len(HASHES)
        client = KVClient(directory, SLOT_BYTES, None, TIMEOUT_S, wire_key)
        stack.push_async_callback(client.close)
        reader = Reader(client, host)
        await eventually(reader.all_come, what="the directory knows the blocks")
        yield reader
        assert client.links.stretches([(store.record["arena_id"], 0)])[0].in_flight_bytes == 0


async def test_blocks_come_over_limited_links(reader: Reader) -> None:
    for bits_per_s in (1e9, 1e10):
        reader.host.limit(bits_per_s)
        before = reader.client.links.remote.num_bytes
        assert await reader.fetch() == len(HASHES)
        assert reader.client.links.remote.num_bytes - before == len(HASHES) * SLOT_BYTES


async def test_a_slow_link_takes_the_time_that_it_takes(reader: Reader) -> None:
    """All in all longer than the patience; and one transfer waits for others."""
    reader.host.limit(SLOW)
    assert await asyncio.gather(*(reader.fetch() for _ in range(3))) == [len(HASHES)] * 3


async def test_what_takes_too_long_is_cut_short_and_its_arena_is_read_from_again(reader: Reader) -> None:
    reader.host.limit(SLOW)
    assert 0 < await reader.fetch(limit_s=0.4) < len(HASHES)
    reader.host.limit(0.0)
    assert await reader.fetch() == len(HASHES), "it was slow, not gone"


async def test_a_host_that_vanishes_in_the_middle(reader: Reader) -> None:
    reader.host.limit(SLOW)
    fetching = asyncio.create_task(reader.fetch())
    await asyncio.sleep(0.3)
    reader.host.cut()
    assert await fetching < len(HASHES)
    reader.host.mend()
    reader.host.limit(0.0)
    await eventually(reader.all_come, 30, "it came back")


def test_nothing_is_left_of_a_process_that_was_killed() -> None:
    """The next network takes it away."""
    script = "from benchmarks.lan import Lan\nwith Lan(1) as lan:\n print(lan.hosts[0].namespace, flush=True)\n input()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    namespace = process.stdout.readline().strip()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    assert namespace in namespaces()
    with Lan(1):
        assert namespace not in namespaces()
    links = subprocess.run(["ip", "-j", "link"], check=True, capture_output=True, text=True).stdout
    assert not [link for link in json.loads(links) if link["ifname"].startswith(f"bt{process.pid}-")]


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
