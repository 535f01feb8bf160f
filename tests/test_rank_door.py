"""The doors of a wide node's ranks: strangers get no further than the gate, and nothing that they send does harm."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psutil
import pytest
import pytest_asyncio
from conftest import RedisProcess, ServerProcess, free_port
from node_harness import node_request, prompt_of
from wide_nodes import ENGINE, WideCluster, running_cluster

from batonpb import common_pb2, rank_pb2, rank_pb2_grpc
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import SamplingParams
from node.gate import new_cluster_token

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

TOKEN, PORT = new_cluster_token(), free_port()
SERVICE = rank_pb2.DESCRIPTOR.services_by_name["Rank"]
METHODS = [f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods]
GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
SEEDS = itertools.count(1)
NAMES = [bytes(16)] * 2
ABSURD = [
    rank_pb2.FetchRequest(blocks=rank_pb2.Blocks(hashes=NAMES * 100_000, block_ids=[1] * 200_000)),
    rank_pb2.FetchRequest(blocks=rank_pb2.Blocks(hashes=[bytes(1 << 20)] * 2, block_ids=[1, 2])),
    rank_pb2.FetchRequest(blocks=rank_pb2.Blocks(hashes=NAMES, block_ids=[1, 2**32 - 1])),
    rank_pb2.FetchRequest(blocks=rank_pb2.Blocks(hashes=NAMES, block_ids=[1])),
    rank_pb2.FetchRequest(blocks=rank_pb2.Blocks(after_steps=2**64 - 1)),
    rank_pb2.FetchRequest(blocks=rank_pb2.Blocks(tenant=bytes(1 << 20))),
    rank_pb2.FetchRequest(limit_s=math.nan),
]
JUNK = [  # lengths come first in most protocols
    b"",
    b"\n",
    b"\xff" * 64,
    b"\xff" * (1 << 20),
    bytes(4096),
    struct.pack("<Q", 2**63 - 1) * 8,
    b"\x00" + struct.pack("<Q", 1 << 30) + b"x" * 4096,
    b"GET /metrics HTTP/1.1\r\n\r\n",
    os.urandom(1 << 16),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tiny_model_dir: Path) -> AsyncIterator[WideCluster]:
    """With stages and with ranks in each, so that all kinds of connections are there."""
    redis_process = RedisProcess()
    folder = Path(tempfile.mkdtemp(prefix="baton-", dir="/dev/shm"))
    try:
        async with running_cluster(tiny_model_dir, redis_process.url, folder, 2, 2) as cluster:
            cluster.token = TOKEN
            await asyncio.gather(cluster.start_node("tp2", tp=2, port=PORT), cluster.start_node("pp2", pp=2))
            yield cluster
    finally:
        redis_process.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> Engine:
    return Engine.from_pretrained(tiny_model_dir, EngineConfig(**ENGINE))


async def assert_well(cluster: WideCluster, alone: Engine) -> None:
    """Both nodes, the one reading what the other wrote, give the tokens of one engine."""
    for first, second in (("tp2", "pp2"), ("pp2", "tp2")):
        prompt = prompt_of(100, seed=next(SEEDS))
        request = node_request(prompt, sampling=common_pb2.SamplingParams(**GREEDY))
        answer = await cluster.prefill_and_publish(first, request, num_blocks=6)
        decoded = await cluster.nodes[second].decode(request, [answer.token.token_id], answer.coming_blocks)
        expected = alone.generate([prompt], SamplingParams(**GREEDY))[0]
        assert [answer.token.token_id, *decoded.token_ids] == expected
        assert decoded.store_hit_tokens == 96, "followers heard of it, too"
    for node in cluster.nodes.values():
        assert [rank.process.returncode for rank in node.ranks] == [None, None]


async def knock(channel: grpc.aio.Channel, method: str, body: bytes, *tokens: str) -> grpc.aio.AioRpcError | None:
    """The error that a call ends with, or None."""
    metadata = [("authorization", f"Bearer {token}") for token in tokens]
    try:
        await channel.unary_unary(method)(body, metadata=metadata, timeout=20)
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_a_port_that_is_given_is_the_leader_s(cluster: WideCluster) -> None:
    leader, follower = (rank.record["address"] for rank in cluster.nodes["tp2"].ranks)
    assert leader == f"127.0.0.1:{PORT}" != follower


async def test_a_rank_asks_for_the_token(cluster: WideCluster, alone: Engine) -> None:
    assert len(METHODS) == 3
    for node in cluster.nodes.values():
        async with grpc.aio.insecure_channel(node.ranks[1].record["address"]) as channel:
            for method in (*METHODS, f"/{SERVICE.full_name}/NoSuchMethod"):
                for tokens in ((), ("",), (new_cluster_token(),), (TOKEN[:-1],), (TOKEN, TOKEN)):
                    error = await knock(channel, method, b"", *tokens)
                    assert error is not None and error.code() is grpc.StatusCode.UNAUTHENTICATED, (method, tokens)
            assert [await knock(channel, method, b"", TOKEN) for method in METHODS] == [None] * len(METHODS)
    await assert_well(cluster, alone)


async def test_what_no_leader_would_ask_is_refused(cluster: WideCluster, alone: Engine) -> None:
    """Where the caller has the token, or none is asked for."""
    for node in cluster.nodes.values():
        async with grpc.aio.insecure_channel(node.ranks[1].record["address"]) as channel:
            for message in ABSURD:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await rank_pb2_grpc.RankStub(channel).Fetch(message, metadata=node.metadata, timeout=20)
                assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await assert_well(cluster, alone)


async def test_a_message_beyond_all_limits_is_not_read(cluster: WideCluster, alone: Engine) -> None:
    body = bytes(20 << 20)
    for node in cluster.nodes.values():
        async with grpc.aio.insecure_channel(node.ranks[1].record["address"]) as channel:
            for tokens in ((), (TOKEN,)):
                error = await knock(channel, METHODS[0], body, *tokens)
                assert error is not None
                assert error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    await assert_well(cluster, alone)


def ports(process: ServerProcess) -> set[int]:
    """All that a process listens on, as the kernel tells."""
    connections = psutil.Process(process.pid).net_connections(kind="tcp")
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


async def test_junk_at_any_port_of_a_rank_does_no_harm(cluster: WideCluster, alone: Engine) -> None:
    """Gloo's and those where ranks meet included, which ask nobody who he is."""
    found = [ports(rank) for node in cluster.nodes.values() for rank in node.ranks]
    assert all(len(of_rank) >= 2 for of_rank in found)
    for junk in JUNK:
        await asyncio.gather(*(asyncio.to_thread(throw, port, junk) for port in set().union(*found)))
    await assert_well(cluster, alone)


def throw(port: int, junk: bytes) -> None:
    """And hangs up without having read an answer; some it lets wait for more."""
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.settimeout(0.2)
        try:
            sock.sendall(junk)
            sock.recv(1)
        except OSError:
            pass  # it was cut off, or waits for more
