"""The operator's door of a router: closed by default, its keys, the nodes it tells of, draining."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import POCKET, eventually
from router_fakes import FakeCluster, running

from batonpb import admin_pb2, admin_pb2_grpc
from deploy.cli import main
from deploy.keys import new_key, sha256_of
from router.admin_keys import read_admin_keys
from router.config import RouterConfig
from router.errors import UnusableKeys
from router.server import RouterServer

KEY = "admin-key"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
LIST = admin_pb2.ListNodesRequest()


async def call(cluster: FakeCluster, method: str, request: object, *keys: str) -> Any:
    metadata = [("authorization", f"Bearer {key}") for key in keys]
    async with grpc.aio.insecure_channel(cluster.admin_address) as channel:
        return await getattr(admin_pb2_grpc.AdminStub(channel), method)(request, metadata=metadata, timeout=20)


async def refusal(cluster: FakeCluster, method: str, request: object, *keys: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(cluster, method, request, *keys)
    return error.value


def drain(node_id: str, undo: bool = False) -> admin_pb2.DrainNodeRequest:
    return admin_pb2.DrainNodeRequest(node_id=node_id, undo=undo)


async def test_it_is_closed_unless_it_is_asked_for(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.open()
        assert cluster.admin_address == ""
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await cluster.channel.unary_unary("/baton.v1.Admin/ListNodes")(b"", timeout=20)
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_nodes_and_draining_one(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("both0", "both1"):
            await cluster.add(node_id)
        await cluster.open(admin_port=0)
        assert cluster.admin_address.startswith("127.0.0.1:")
        nodes = (await call(cluster, "ListNodes", LIST)).nodes
        told = [(node.node_id, node.role, node.draining, node.down, node.total_blocks) for node in nodes]
        assert told == [("both0", "both", False, False, 1000), ("both1", "both", False, False, 1000)]
        assert nodes[0].address == cluster.nodes["both0"].record.address

        drained = await call(cluster, "DrainNode", drain("both0"))
        assert drained.draining and drained.node_id == "both0"

        async def is_told() -> bool:
            return [node.draining for node in (await call(cluster, "ListNodes", LIST)).nodes] == [True, False]

        await eventually(is_told, 10, "its heartbeat says so")
        assert (await cluster.ask("x", max_tokens=1)).timeline.decode_node == "both1"
        assert not (await call(cluster, "DrainNode", drain("both0", undo=True))).draining

        error = await refusal(cluster, "DrainNode", drain("both7"))
        assert error.code() == grpc.StatusCode.NOT_FOUND and "both7" in error.details()
        await cluster.nodes["both1"].kill()
        error = await refusal(cluster, "DrainNode", drain("both1"))
        assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_with_a_key_file_nobody_else_gets_in(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "admins"
    file.write_text(f"# ours\n{'0' * 64}\n{DIGEST}  # new\n")
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.open(admin_port=0, admin_key_file=str(file))
        for keys in ((), ("wrong",), (DIGEST,), (KEY, KEY)):
            for method, request in (("ListNodes", LIST), ("DrainNode", drain("x"))):
                error = await refusal(cluster, method, request, *keys)
                assert error.code() == grpc.StatusCode.UNAUTHENTICATED
        assert not (await call(cluster, "ListNodes", LIST, KEY)).nodes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# nothing\n\n", "has no key"),
        (f"{DIGEST}\nsecret\n", "line 2: must be 64 hex digits, the SHA-256 of a key$"),
    ],
)
def test_a_bad_key_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "admins").write_text(text)
    with pytest.raises(UnusableKeys, match=message):
        read_admin_keys(tmp_path / "admins")
    with pytest.raises(UnusableKeys, match="No such file"):
        read_admin_keys(tmp_path / "nowhere")


async def test_beyond_loopback_it_needs_keys(redis_url: str) -> None:
    config = RouterConfig(str(POCKET), redis_url, admin_port=0, admin_host="0.0.0.0")
    with pytest.raises(ValueError, match=r"admin_host: 0\.0\.0\.0 needs an admin_key_file"):
        await RouterServer(config).start()


# --- the commands ---


async def test_the_commands(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0")
        await cluster.open(admin_port=0)

        async def said(*argv: str) -> tuple[int, str]:
            status = await asyncio.to_thread(main, [*argv, "--address", cluster.admin_address])
            captured = capsys.readouterr()
            return status, captured.out + captured.err

        assert "both0" in (await said("nodes"))[1]
        assert (await said("drain", "both0"))[1].startswith("both0 drains; ")
        assert (await said("drain", "both0", "--undo"))[1].startswith("both0 takes requests; ")
        status, words = await said("drain", "nobody")
        assert status == 1 and "NOT_FOUND" in words


def test_a_new_key_is_shown_with_its_hash(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "new"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert second == f'key_sha256 = "{sha256_of(first.split()[1])}"'
    assert new_key() != new_key() and new_key().isascii() and " " not in new_key()
