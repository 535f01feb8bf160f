"""Every door of a cluster with locks on, without a key and with a wrong one: all sockets that its processes listen on.

Redis with a password, a store, a node and a router, each a process of its own. What is listened on is read from the
kernel, so a door that this test does not know fails it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil
import pytest
import redis
import zmq.asyncio
from certificates import Identity, credentials, make, needs_openssl
from conftest import POCKET, REPOSITORY
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from harness import block_bytes

from batonpb import admin_pb2, inference_pb2, inference_pb2_grpc, node_pb2
from deploy.keys import new_key, sha256_of
from deploy.redis import EmbeddedRedis
from kvstore.blocks import BlockHash
from kvstore.channel import Channel
from kvstore.curve import Curve, new_wire_key
from kvstore.errors import ArenaUnavailable
from kvstore.frames import Ask, Get, Verb
from node.gate import new_cluster_token

pytestmark = [needs_openssl, pytest.mark.cluster]

ENGINE = {"dtype": "float32", "num_blocks": 64, "num_threads": 1}
START_S = 90.0
OPEN_HTTP = {"/health", "/ready", "/version", "/openapi.json", "/metrics"}
OPEN_SERVICES = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
UNAUTHENTICATED, UNIMPLEMENTED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED


class Secrets(NamedTuple):
    """All that must show nowhere."""

    redis_password: str
    wire_key: str
    cluster_token: str
    api_key: str
    admin_key: str


class Locked:
    """The cluster. Its processes' words are kept in files, at the level debug."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        embedded = EmbeddedRedis(folder / "redis", "127.0.0.1")
        embedded.start()
        stack.callback(embedded.stop)
        self.redis_url = embedded.url
        self.redis_pid = embedded.pid
        password = redis.connection.parse_url(embedded.url)["password"]
        self.secrets = Secrets(password, new_wire_key(), new_cluster_token(), new_key(), new_key())
        self.router_tls, self.client_tls = (make(folder, name) for name in ("router", "client"))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def start(self) -> None:
        secrets = self.secrets
        tenants, admins = self.folder / "tenants.toml", self.folder / "admins"
        tenants.write_text(f'[[tenant]]\nname = "red"\nkey_sha256 = ["{sha256_of(secrets.api_key)}"]\n')
        admins.write_text(sha256_of(secrets.admin_key))
        store_dir = self.folder / "store"
        self._start("store", dir=str(store_dir), slot_bytes=block_bytes(POCKET, ENGINE), memory_bytes=8 << 20)
        self._wait_for("store")
        model = {"model_dir": str(POCKET), "model": "pocket"}
        self._start("node", node_id="both-0", engine=ENGINE, store_dir=str(store_dir), **model)
        self._wait_for("node")  # the router sees it at its first look
        self._start(
            "router",
            **model,
            metrics=True,
            tenants_file=str(tenants),
            tls_cert=str(self.router_tls.cert),
            tls_key=str(self.router_tls.key),
            tls_client_ca=str(self.client_tls.cert),
            admin_port=0,
            admin_key_file=str(admins),
        )
        self._wait_for("router")

    def _start(self, kind: str, **config: object) -> None:
        names = {"BATON_REDIS_URL": self.redis_url, "BATON_WIRE_KEY": self.secrets.wire_key}
        names |= {"BATON_CLUSTER_TOKEN": self.secrets.cluster_token}
        with (self.folder / f"{kind}.err").open("wb") as err, (self.folder / f"{kind}.out").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "deploy.process", kind, json.dumps(config), "--log-level", "debug"],
                env=os.environ | names,
                cwd=REPOSITORY,
                stdout=out,
                stderr=err,
            )
        self._stack.callback(_stop, process)
        self.processes[kind] = process

    def _wait_for(self, kind: str) -> None:
        process = self.processes[kind]
        deadline = time.monotonic() + START_S
        while not (said := (self.folder / f"{kind}.out").read_text()).endswith("\n"):
            assert process.poll() is None, (self.folder / f"{kind}.err").read_text()[-2000:]
            assert time.monotonic() < deadline, f"{kind} is not ready"
            time.sleep(0.05)
        self.records[kind] = json.loads(said.removeprefix("READY "))

    @property
    def doors(self) -> dict[str, set[str]]:
        """The addresses that each process tells of."""
        store, node, router = (self.records[kind] for kind in ("store", "node", "router"))
        doors = {
            "redis": {self.redis_url.rpartition("@")[2].removesuffix("/0")},
            "store": {store["address"].removeprefix("tcp://"), store["metrics_address"]},
            "node": {node["address"], node["metrics_address"]},
            "router": {router["address"], router["admin_address"], router["metrics_address"]},
        }
        if router.get("http_address"):
            doors["router"].add(router["http_address"])
        return doors

    @property
    def pids(self) -> dict[str, int]:
        return {"redis": self.redis_pid} | {kind: process.pid for kind, process in self.processes.items()}

    def channel(self, address: str, own: Identity | None = None) -> grpc.aio.Channel:
        """To the router's doors, as a client with the right certificate, which is not what is tried here."""
        return grpc.aio.secure_channel(address, credentials(self.router_tls, own or self.client_tls))


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Locked]:
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="baton-", dir="/dev/shm"))  # short, for the sockets in it
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        locked = Locked(folder, stack)
        locked.start()
        yield locked


async def knock(channel: grpc.aio.Channel, method: str, *keys: str) -> grpc.StatusCode:
    """How a call with an empty message ends."""
    metadata = [("authorization", f"Bearer {key}") for key in keys]
    call = channel.unary_stream(method)(b"", metadata=metadata, timeout=20)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def check_methods(channel: grpc.aio.Channel, file: FileDescriptor, key: str) -> None:
    """All methods refuse whoever has no key or another one, and let in who has it."""
    wrong = [(), ("",), (new_key(),), (key[:-1],), (key, key)]
    for service in file.services_by_name.values():
        for method in (f"/{service.full_name}/{method.name}" for method in service.methods):
            opened = await knock(channel, method, key)
            assert opened is not UNAUTHENTICATED
            if opened is not UNIMPLEMENTED:
                assert {await knock(channel, method, *keys) for keys in wrong} == {UNAUTHENTICATED}, method


async def services_of(channel: grpc.aio.Channel) -> set[str]:
    """What a server says that it serves."""
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    async for reply in stub.ServerReflectionInfo(iter(asked), timeout=20):
        return {service.name for service in reply.list_services_response.service}
    raise AssertionError("no answer")


# --- which doors there are ---


def test_the_cluster_listens_where_it_says_and_nowhere_else(cluster: Locked) -> None:
    for name, pid in cluster.pids.items():
        process = psutil.Process(pid)
        sockets = [one for each in (process, *process.children(recursive=True)) for one in each.net_connections("inet")]
        assert not [one for one in sockets if not one.status or one.status == psutil.CONN_NONE], f"{name} has UDP"
        listening = {
            f"{one.laddr.ip.removeprefix('::ffff:')}:{one.laddr.port}"
            for one in sockets
            if one.status == psutil.CONN_LISTEN
        }
        assert listening == cluster.doors[name], name
        assert all(address.startswith("127.0.0.1:") for address in listening)


def test_sockets_inside_the_machine_are_their_owners_alone(cluster: Locked) -> None:
    paths = [Path(line.split()[7]) for line in Path("/proc/net/unix").read_text().splitlines()[1:] if _is_path(line)]
    ours = [path for path in paths if cluster.folder in path.parents]
    assert ours, "the store's and Redis'"
    for path in ours:
        owner, folder = path.stat(), path.parent.stat()
        assert owner.st_uid == folder.st_uid == os.getuid()
        assert not stat.S_IMODE(owner.st_mode) & 0o077 or not stat.S_IMODE(folder.st_mode) & 0o077, path


def _is_path(line: str) -> bool:
    return len(line.split()) == 8 and line.split()[7].startswith("/")


# --- each of them ---


async def test_the_routers_grpc_door(cluster: Locked) -> None:
    async with cluster.channel(cluster.records["router"]["address"]) as channel:
        await check_methods(channel, inference_pb2.DESCRIPTOR, cluster.secrets.api_key)
        assert await services_of(channel) == {"baton.v1.Inference", *OPEN_SERVICES}
        for method in ("/baton.v1.Admin/ListNodes", "/baton.v1.NodeControl/Drain"):
            assert await knock(channel, method, cluster.secrets.admin_key) is UNIMPLEMENTED
        request = inference_pb2.GenerateRequest(text="Hello", sampling={"max_tokens": 4})
        call = inference_pb2_grpc.InferenceStub(channel).Generate(
            request, metadata=[("authorization", f"Bearer {cluster.secrets.api_key}")], timeout=60
        )
        assert [message async for message in call][-1].usage.output_tokens, "who has all keys is served"


async def test_the_admin_door(cluster: Locked) -> None:
    async with cluster.channel(cluster.records["router"]["admin_address"]) as channel:
        await check_methods(channel, admin_pb2.DESCRIPTOR, cluster.secrets.admin_key)
        assert await knock(channel, "/baton.v1.Admin/ListNodes", cluster.secrets.api_key) is UNAUTHENTICATED
        assert await knock(channel, "/baton.v1.Inference/GetModel", cluster.secrets.admin_key) is UNIMPLEMENTED


async def test_the_routers_doors_without_the_right_certificate(cluster: Locked) -> None:
    addresses = [cluster.records["router"][name] for name in ("address", "admin_address")]
    for address in addresses:
        for channel in (grpc.aio.insecure_channel(address), cluster.channel(address, own=cluster.router_tls)):
            async with channel:
                for method in ("/baton.v1.Inference/GetModel", "/grpc.health.v1.Health/Check"):
                    assert await knock(channel, method, cluster.secrets.api_key) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.skipif(importlib.util.find_spec("router.http_routes") is None, reason="there is no HTTP door")
def test_the_routers_http_door(cluster: Locked) -> None:
    from router.http_routes import Routes

    address = cluster.records["router"]["http_address"]
    context = ssl.create_default_context(cafile=cluster.router_tls.cert)
    with pytest.raises((ssl.SSLError, OSError)):
        urllib.request.urlopen(f"https://{address}/health", context=context, timeout=20)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{address}/health", timeout=20)
    context.load_cert_chain(cluster.client_tls.cert, cluster.client_tls.key)

    def status(method: str, path: str, key: str | None) -> int:
        headers = {"Content-Type": "application/json"}
        headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        body = b"{}" if method == "POST" else None
        request = urllib.request.Request(f"https://{address}{path}", body, headers, method=method)
        try:
            with urllib.request.urlopen(request, context=context, timeout=20) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    routes = {path: route.method for path, route in Routes(None, None)._routes.items()}  # type: ignore[arg-type]
    assert len(routes) > 5
    for path, method in {**routes, "/v1/models/pocket": "GET"}.items():
        if path in OPEN_HTTP:
            assert status(method, path, None) == 200, path
        else:
            assert [status(method, path, key) for key in (None, "", new_key())] == [401] * 3, path
            assert status(method, path, cluster.secrets.api_key) in (200, 400), path


async def test_the_nodes_door(cluster: Locked) -> None:
    async with grpc.aio.insecure_channel(cluster.records["node"]["address"]) as channel:
        await check_methods(channel, node_pb2.DESCRIPTOR, cluster.secrets.cluster_token)
        for key in (cluster.secrets.api_key, cluster.secrets.admin_key, cluster.secrets.wire_key):
            assert await knock(channel, "/baton.v1.NodeControl/GetLoad", key) is UNAUTHENTICATED
        served = {service.full_name for service in node_pb2.DESCRIPTOR.services_by_name.values()}
        assert await services_of(channel) == served | OPEN_SERVICES
        undo = node_pb2.DrainRequest(undo=True).SerializeToString()  # of what the right key has opened
        await channel.unary_unary("/baton.v1.NodeControl/Drain")(
            undo, metadata=[("authorization", f"Bearer {cluster.secrets.cluster_token}")], timeout=20
        )


async def test_the_stores_wire(cluster: Locked) -> None:
    context, record = zmq.asyncio.Context(), cluster.records["store"]

    async def ask(curve: Curve | None, is_operator: bool) -> str:
        channel = Channel(context, record["address"], record["slot_bytes"], curve)
        try:
            answer = await channel.request(
                lambda number: Ask(number, Verb.STATS) if is_operator else Get(number, [BlockHash(bytes(16))]), 10.0
            )
            return type(answer.message).__name__
        finally:
            channel.close()

    try:
        for is_operator in (False, True):
            assert await ask(Curve(cluster.secrets.wire_key), is_operator) in ("Got", "Told")
            for stranger in (None, Curve(new_wire_key())):
                with pytest.raises(ArenaUnavailable):
                    await ask(stranger, is_operator)
    finally:
        context.destroy(linger=0)


def test_redis(cluster: Locked) -> None:
    where = cluster.redis_url.rpartition("@")[2]
    for url in (f"redis://{where}", f"redis://:wrong@{where}"):
        with redis.Redis.from_url(url) as client, pytest.raises((redis.AuthenticationError, redis.ResponseError)):
            client.keys()
    with redis.Redis.from_url(cluster.redis_url) as client:
        assert client.keys()


@pytest.mark.parametrize("kind", ["store", "node", "router"])
def test_metrics_are_open_to_read_and_good_for_nothing_else(cluster: Locked, kind: str) -> None:
    where = f"http://{cluster.records[kind]['metrics_address']}"
    with urllib.request.urlopen(f"{where}/metrics", timeout=20) as response:
        shown = response.read().decode()
    assert shown and not any(secret in shown for secret in cluster.secrets)
    for path in ("/", "/debug", "/metrics/../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{where}{path}", timeout=20)


# --- secrets ---


def test_secrets_show_nowhere(cluster: Locked) -> None:
    """The last test: all others have given the processes something to say."""
    said = {path.name: path.read_bytes() for path in cluster.folder.glob("*.err")}
    said |= {path.name: path.read_bytes() for path in cluster.folder.glob("*.out")}
    said["redis.log"] = (cluster.folder / "redis" / "redis.log").read_bytes()
    said |= {f"{name}'s arguments": Path(f"/proc/{pid}/cmdline").read_bytes() for name, pid in cluster.pids.items()}
    with redis.Redis.from_url(cluster.redis_url) as client:
        for name in client.keys():
            kind = client.type(name)
            values = client.hgetall(name) if kind == b"hash" else client.smembers(name) if kind == b"set" else None
            said[f"Redis: {name!r}"] = repr(client.get(name) if values is None else values).encode()
    assert said["router.err"] and said["node.err"] and len(said) > 10
    for where, text in said.items():
        for name, secret in cluster.secrets._asdict().items():
            assert secret.encode() not in text, f"{name} shows in {where}"


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("router", {"redis_url": "redis://:sesame@127.0.0.1:1"}, "redis_url: .* BATON_REDIS_URL"),
        ("router", {"redis_url": "redis://127.0.0.1:1?password=sesame"}, "redis_url: .* BATON_REDIS_URL"),
        ("router", {"redis_url": "redis://127.0.0.1:1", "cluster_token": "sesame"}, "BATON_CLUSTER_TOKEN"),
        ("node", {"redis_url": "r", "node_id": "n", "model": "m", "cluster_token": "sesame"}, "BATON_CLUSTER_TOKEN"),
    ],
)
def test_secrets_in_arguments_are_refused(kind: str, config: dict[str, str], message: str) -> None:
    from deploy import process

    with pytest.raises(ValueError, match=message) as error:
        process.build(kind, json.dumps({"model_dir": "m"} | config))
    assert "sesame" not in str(error.value)


async def test_a_router_without_the_token_gets_nothing_from_nodes(cluster: Locked) -> None:
    """And says why."""
    from router.config import RouterConfig
    from router.server import RouterServer

    router = RouterServer(RouterConfig(str(POCKET), cluster.redis_url, max_attempts=2))
    record = await router.start()
    try:
        async with grpc.aio.insecure_channel(str(record["address"])) as channel:
            request = inference_pb2.GenerateRequest(text="Hello", sampling={"max_tokens": 4})
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await asyncio.wait_for(_last(inference_pb2_grpc.InferenceStub(channel).Generate(request)), 60)
    finally:
        await router.stop()
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "UNAUTHENTICATED: authorization: not this cluster's token" in error.value.details()


async def _last(call: Any) -> None:
    async for _ in call:
        pass
