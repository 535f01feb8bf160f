"""A cluster on a real Ray: whatever is killed comes back by itself, and a stop leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
import redis
import zmq.asyncio
from conftest import REPOSITORY, eventually
from scraping import http

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc
from deploy import launch, on_ray, oracle
from deploy.config import ClusterConfig, ConfigError
from deploy.launch import Cluster, Interrupted, StartFailed
from deploy.processes import CLUSTER_VARIABLE, is_running, processes_of
from kvstore.blocks import BlockHash
from kvstore.channel import Channel
from kvstore.curve import Curve, new_wire_key
from kvstore.directory import Directory
from kvstore.errors import ArenaUnavailable
from kvstore.frames import Get

pytestmark = pytest.mark.ray

PROMPT = [(7 * n) % 250 for n in range(100)]
MAX_TOKENS = 12
ROOT = BlockHash(bytes(16))
SAMPLING = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}


def small(model_dir: Path, **options: Any) -> ClusterConfig:
    sizes = {"kv_bytes": 16 << 20, "store_bytes": 16 << 20, "num_threads": 1}
    return ClusterConfig(model_dir=model_dir, **(sizes | options))


def left_of(cluster: Cluster) -> list[str]:
    """Processes and folders of a cluster, looked for without its help."""
    folders = [
        *Path("/dev/shm").glob(f"baton-{cluster.cluster_id}*"),
        *Path("/tmp").glob(f"baton-{cluster.cluster_id}*"),
    ]
    return [str(pid) for pid in processes_of(CLUSTER_VARIABLE, cluster.cluster_id)] + [str(path) for path in folders]


# --- starts that fail; one process has one Ray at a time, so these come before the cluster that the rest share ---


def test_launcher_needs_no_torch() -> None:
    code = "import sys, deploy.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"store_bytes": 1 << 60}, StartFailed, "--store-dir /dev/shm: .* free there, and --store-memory takes"),
        ({"decode_hosts": ("elsewhere",)}, ConfigError, "no Ray machine elsewhere"),
    ],
)
def test_failed_start_names_its_cause_and_leaves_nothing(
    tiny_model_dir: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    cluster = Cluster(small(tiny_model_dir, **options))
    with pytest.raises(error, match=message):
        cluster.start()
    assert left_of(cluster) == []


def test_a_store_that_cannot_start_names_its_cause(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine, whose folder the launcher cannot look at before."""
    monkeypatch.setattr(launch, "unusable", lambda *_: "")
    cluster = Cluster(small(tiny_model_dir, store_bytes=1 << 60))
    with pytest.raises(StartFailed, match=r"store-127\.0\.0\.1: .*memory"):
        cluster.start()
    assert left_of(cluster) == []


def test_node_that_cannot_load_its_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    model_dir = Path(shutil.copytree(tiny_model_dir, tmp_path / "broken"))
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    cluster = Cluster(small(model_dir))
    with pytest.raises(StartFailed, match=r"(prefill|decode)-0: .*layers\.2"):
        cluster.start()
    assert left_of(cluster) == []


def test_interrupted_start_leaves_nothing(tiny_model_dir: Path) -> None:
    interrupt = threading.Event()
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        interrupt.set()

    cluster = Cluster(small(tiny_model_dir), report, interrupt)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        cluster.start()
    assert lines
    assert left_of(cluster) == []
    assert signal.getsignal(signal.SIGTERM) == handler


def test_what_a_failed_growth_started_is_gone(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the folder of a store on a machine that is new: nobody would come there again."""
    done: list[tuple[str, list[str]]] = []
    cluster, added = Cluster(small(tiny_model_dir)), [SimpleNamespace(kind="store"), SimpleNamespace(kind="node")]

    def kinds(members: Any) -> list[str]:
        return [member.kind for member in members]

    def fail(members: Any) -> None:
        raise StartFailed("not up")

    cluster._specs = cast(Any, SimpleNamespace(stores=lambda machines: [], nodes=lambda placements: []))
    monkeypatch.setattr(cluster, "_add", lambda placed: added)
    monkeypatch.setattr(cluster, "_wait_until_started", fail)
    monkeypatch.setattr(on_ray, "call", lambda method, members, _timeout_s: done.append((method, kinds(members))))
    monkeypatch.setattr(cluster, "_remove", lambda members: done.append(("remove", kinds(members))))
    with pytest.raises(StartFailed, match="not up"):
        cluster._grow([])
    assert done == [("remove_folder", ["store"]), ("remove", ["store", "node"])]


# --- one cluster for the rest ---


@pytest.fixture(scope="module")
def cluster(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model_dir = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("launch") / "model")
    parts: dict[str, list[float]] = {}
    cluster = Cluster(small(Path(model_dir)), on_part=lambda name, part: parts.setdefault(name, []).append(part))
    cluster.start()
    assert {name: told[-1] for name, told in parts.items()} == {"prefill-0": 1.0, "decode-0": 1.0}
    assert all(told == sorted(told) for told in parts.values())
    pids = cluster.pids
    yield cluster
    assert cluster.stop() == []
    assert cluster.stop() == []
    assert left_of(cluster) == []
    assert not [name for name, pid in pids.items() if is_running(pid)]


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> list[int]:
    return oracle.ask(tiny_model_dir, [oracle.Question(PROMPT, SAMPLING)])[0]


async def generate(cluster: Cluster, prompt: list[int] = PROMPT) -> tuple[list[int], inference_pb2.GenerateResponse]:
    request = inference_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(**SAMPLING))
    request.tokens.token_ids.extend(prompt)
    token_ids: list[int] = []
    async with grpc.aio.insecure_channel(cluster.routers[0]) as channel:
        async for response in inference_pb2_grpc.InferenceStub(channel).Generate(
            request, timeout=60, wait_for_ready=True
        ):
            token_ids += [token.token_id for token in response.tokens]
    return token_ids, response


async def timelines_of_a_burst(cluster: Cluster) -> list[inference_pb2.Timeline]:
    """Of prompts that are new to everyone, and too many at once for a decode node to run their first legs itself."""
    prompts = [[secrets.randbelow(250) for _ in range(600)] for _ in range(8)]
    answers = await asyncio.gather(*(generate(cluster, prompt) for prompt in prompts))
    return [last.timeline for _, last in answers]


async def incarnations(cluster: Cluster) -> dict[str, str]:
    directory = Directory(cluster.redis_url, cluster.config.cluster)
    try:
        return {node.node_id: node.incarnation for node in await directory.nodes()}
    finally:
        await directory.close()


async def arena_ids(cluster: Cluster) -> set[str]:
    directory = Directory(cluster.redis_url, cluster.config.cluster)
    try:
        return {arena.arena_id for arena in await directory.arenas()}
    finally:
        await directory.close()


async def test_text_is_what_one_engine_gives(cluster: Cluster, alone: list[int]) -> None:
    token_ids, last = await generate(cluster)
    assert token_ids == alone
    assert last.timeline.decode_node == "decode-0"


async def test_prefill_reaches_decode_through_the_store(cluster: Cluster) -> None:
    timelines = await timelines_of_a_burst(cluster)
    assert any(timeline.prefill_node == "prefill-0" and timeline.decode_store_hit_tokens for timeline in timelines)


@pytest.mark.parametrize("node_id", ["prefill-0", "decode-0"])
async def test_killed_node_comes_back(cluster: Cluster, alone: list[int], node_id: str) -> None:
    before = await incarnations(cluster)
    os.kill(cluster.pids[node_id], signal.SIGKILL)
    assert (await generate(cluster))[0] == alone

    async def is_back() -> bool:
        now = await incarnations(cluster)
        return now.keys() == before.keys() and now[node_id] != before[node_id]

    await eventually(is_back, 60, f"a new {node_id}")
    assert (await generate(cluster))[0] == alone

    async def works_again() -> bool:
        timelines = await timelines_of_a_burst(cluster)
        return any(node_id in (timeline.prefill_node, timeline.decode_node) for timeline in timelines)

    await eventually(works_again, 30, f"{node_id} takes work again")


async def test_node_that_fails_to_restart_tries_again_and_again(cluster: Cluster, alone: list[int]) -> None:
    before = await incarnations(cluster)
    (starts,) = cluster.folders[1].glob("prefill-0.*.starts")
    num_starts = len(starts.read_text().splitlines())
    config = cluster.config.model_dir / "config.json"
    pid = cluster.pids["prefill-0"]
    hidden = config.rename(config.with_suffix(".hidden"))
    try:
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: len(starts.read_text().splitlines()) >= num_starts + 2, 60, "failing restarts")
        assert (await generate(cluster))[0] == alone
    finally:
        hidden.rename(config)

    async def is_back() -> bool:
        now = await incarnations(cluster)
        return now.keys() == before.keys() and now["prefill-0"] != before["prefill-0"]

    await eventually(is_back, 60, "a new prefill-0")


async def test_killed_router_comes_back_on_its_ports(cluster: Cluster, alone: list[int]) -> None:
    (http_address,) = cluster.router_http
    os.kill(cluster.pids["router-0"], signal.SIGKILL)

    async def answers() -> bool:
        try:
            return (await generate(cluster))[0] == alone
        except grpc.aio.AioRpcError:
            return False

    await eventually(answers, 30, "the router at its old address")
    status, _ = await http(http_address, b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert status == b"HTTP/1.1 200 OK"


async def test_killed_store_comes_back_empty_and_is_used_again(cluster: Cluster) -> None:
    before = await arena_ids(cluster)
    os.kill(cluster.pids["store-127.0.0.1"], signal.SIGKILL)

    async def is_new() -> bool:
        return bool(await arena_ids(cluster) - before)

    await eventually(is_new, 30, "a new arena")

    async def is_used() -> bool:
        return any(timeline.decode_store_hit_tokens for timeline in await timelines_of_a_burst(cluster))

    await eventually(is_used, 30, "a block through the new arena")


async def test_killed_redis_comes_back_and_is_filled_again(cluster: Cluster, alone: list[int]) -> None:
    before = await incarnations(cluster)
    with redis.Redis.from_url(cluster.redis_url) as client:
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
    assert (await generate(cluster))[0] == alone

    async def is_filled() -> bool:
        try:
            return await incarnations(cluster) == before
        except Exception:
            return False

    await eventually(is_filled, 30, "the registry")


async def test_secrets_are_with_those_who_need_them_and_show_nowhere(cluster: Cluster) -> None:
    configs = [member.placed.spec.config for member in cluster._members]
    [wire_key] = {config.wire_key for config in configs if hasattr(config, "wire_key")}
    [token] = {config.cluster_token for config in configs if hasattr(config, "cluster_token")}
    shown = [Path(f"/proc/{pid}/{name}") for pid in cluster.pids.values() for name in ("cmdline", "environ")]
    logs = [path for path in (cluster.folders[0] / "ray").rglob("*") if path.is_file() and not path.is_symlink()]
    assert logs
    for secret in (wire_key.encode(), token.encode()):
        assert secret and not [path for path in shown + logs if secret in path.read_bytes()]
    context = zmq.asyncio.Context()
    directory = Directory(cluster.redis_url, cluster.config.cluster)
    await eventually(directory.arenas, what="the store's record")  # Redis may have lost it in the test before
    [arena] = await directory.arenas()
    await directory.close()

    async def ask(curve: Curve | None) -> str:
        channel = Channel(context, arena.address, arena.slot_bytes, curve)
        try:
            answer = await channel.request(lambda request_id: Get(request_id, [ROOT]), 10.0)
            return type(answer.message).__name__
        finally:
            channel.close()

    assert await ask(Curve(wire_key)) == "Got"
    for stranger in (None, Curve(new_wire_key())):
        with pytest.raises(ArenaUnavailable):
            await ask(stranger)
    context.destroy(linger=0)


async def test_nodes_answer_the_routers_of_their_cluster_alone(cluster: Cluster) -> None:
    directory = Directory(cluster.redis_url, cluster.config.cluster)
    await eventually(directory.nodes, what="the nodes' records")
    nodes = await directory.nodes()
    await directory.close()
    for node in nodes:
        async with grpc.aio.insecure_channel(node.address) as channel:
            for metadata in ((), (("authorization", "Bearer wrong"),)):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await channel.unary_unary("/baton.v1.NodeControl/Drain")(b"", metadata=metadata, timeout=20)
                assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_pids_are_those_of_running_processes(cluster: Cluster) -> None:
    assert set(cluster.pids) == {"store-127.0.0.1", "prefill-0", "decode-0", "router-0"}
    assert all(is_running(pid) for pid in cluster.pids.values())
