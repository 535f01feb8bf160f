"""The gate of a node: who has the cluster's token may call it, nobody else; without one it is for loopback alone."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from node_harness import Machine, running_machine

from batonpb import node_pb2
from deploy.node import NodeServer
from node.gate import check_lock, new_cluster_token

TOKEN = new_cluster_token()
METHODS = [
    f"/{service.full_name}/{method.name}"
    for service in node_pb2.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@dataclass
class Door:
    """A node's, with a token."""

    machine: Machine
    channel: grpc.aio.Channel

    async def knock(self, method: str, *authorizations: str) -> grpc.aio.AioRpcError | None:
        """The error that ends a call, or None; never a message that the call would wait for."""
        metadata = [("authorization", value) for value in authorizations]
        call = self.channel.unary_stream(method)(b"", metadata=metadata, timeout=20)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error
        return None


@pytest.fixture
async def door(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[Door]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        node = await machine.node(store_dir="", cluster_token=TOKEN)
        yield Door(machine, node.channel)


async def test_every_method_asks_for_the_token(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert len(METHODS) >= 4
    wrong = [
        (),
        ("Bearer ",),
        (f"Bearer {new_cluster_token()}",),
        (f"Bearer {TOKEN[:-1]}",),
        (TOKEN,),
        (f"Bearer {TOKEN}", f"Bearer {TOKEN}"),
    ]
    for method in (*METHODS, "/baton.v1.NodeControl/NoSuchMethod"):
        for authorizations in wrong:
            error = await door.knock(method, *authorizations)
            assert error is not None and error.code() == grpc.StatusCode.UNAUTHENTICATED, (method, authorizations)
            assert error.details() == "authorization: not this cluster's token"
    error = await door.knock("/baton.v1.Prefill/Prefill", f"Bearer {TOKEN}")
    assert error is not None and error.code() == grpc.StatusCode.INVALID_ARGUMENT, "an empty request gets further"
    assert await door.knock("/baton.v1.NodeControl/GetLoad", f"Bearer {TOKEN}") is None
    assert TOKEN not in caplog.text
    assert 1 <= caplog.text.count("event=refused_callers") < 10, "strangers do not fill the log"


async def test_who_sends_nothing_is_refused_all_the_same(door: Door) -> None:
    call = door.channel.stream_stream("/baton.v1.Prefill/Prefill")(timeout=20)  # and keeps its stream open
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_health_is_open(door: Door) -> None:
    answer = await health_pb2_grpc.HealthStub(door.channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "10.0.0.1", "node-1.example"])
async def test_beyond_loopback_a_node_needs_a_token(
    tiny_model_dir: Path, redis_url: str, short_dir: Path, host: str
) -> None:
    machine = Machine(tiny_model_dir, redis_url, short_dir)
    with pytest.raises(ValueError, match="cluster_token: needed to listen on"):
        await NodeServer(machine.node_config(bind_host=host)).start()
    await machine.close()
    check_lock("", host, trusts_network=True)
    check_lock(TOKEN, host, trusts_network=False)


def test_on_loopback_it_says_that_it_has_none(caplog: pytest.LogCaptureFixture) -> None:
    check_lock("", "127.0.0.1", trusts_network=False)
    assert "event=no_cluster_token" in caplog.text


@pytest.mark.parametrize("token", ["short", "x" * 31, "x" * 40 + " y", "ä" * 40, "x" * 40 + "\n"])
def test_a_bad_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="cluster_token: must be 32 printable") as error:
        check_lock(token, "127.0.0.1", trusts_network=False)
    assert token not in str(error.value)
