"""`baton serve` as people run it: one ready line, found by the other commands, gone without a trace."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import REPOSITORY, eventually

from deploy.processes import CLUSTER_VARIABLE, command, processes_of

pytestmark = pytest.mark.ray

OUTLIVES_RAY = ("ray::DashboardA", "ray::RuntimeEnv")  # Ray's own helpers, where Ray was killed
KEY = "key-of-ours"
TENANTS = f"""
[[tenant]]
name = "ours"
key_sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"
kv_memory = "1M"
"""
LEFT = json.dumps({"request_id": "0", "both": 2})  # by a `baton scale` that was killed
SMALL = ["--both", "1", "--kv-memory", "16M", "--store-memory", "16M", "--num-threads", "1"]


class Serve:
    """A `baton serve` with a tenant, in a process group of its own, as a shell makes one."""

    def __init__(self, model_dir: Path, state_dir: Path, sizes: Sequence[str] = SMALL) -> None:
        self.state_dir = state_dir
        tenants = state_dir.with_suffix(".toml")
        tenants.write_text(TENANTS)
        options = [*sizes, "--tenants", str(tenants), "--state-dir", str(state_dir)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "serve", str(model_dir), *options],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ready_line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready: "), self.process.communicate()
        return line

    @property
    def cluster_id(self) -> str:
        return str(json.loads((self.state_dir / "serve.json").read_text())["cluster_id"])

    def baton(self, *argv: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.cli", *argv, "--state-dir", str(self.state_dir)]
        env = os.environ | {"BATON_API_KEY": key}
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=90, check=False)


@pytest.fixture
def serve(tiny_model_dir: Path, tmp_path: Path) -> Iterator[Serve]:
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    (state_dir / "scale.json").write_text(LEFT)
    serve = Serve(tiny_model_dir, state_dir)
    yield serve
    if serve.process.poll() is None:
        serve.process.terminate()
    serve.process.communicate(timeout=60)


def left_of(cluster_id: str) -> list[str]:
    folders = [path for base in ("/dev/shm", tempfile.gettempdir()) for path in Path(base).glob(f"baton-{cluster_id}*")]
    return [str(pid) for pid in processes_of(CLUSTER_VARIABLE, cluster_id)] + [str(folder) for folder in folders]


def test_served_asked_and_taken_down(serve: Serve, tiny_model_dir: Path) -> None:
    ready = serve.ready_line()
    cluster_id = serve.cluster_id

    members = json.loads(serve.baton("status", "--json").stdout)
    assert members["routers"][0] in ready and f"http://{members['router_http'][0]}/v1" in ready
    assert members["router_http"][0] in serve.baton("status").stdout
    assert [(node["role"], node["node_id"]) for node in members["nodes"]] == [("both", "both-0")]
    assert members["nodes"][0]["arena_id"] == members["arenas"][0]["arena_id"]
    assert "both-0" in serve.baton("status").stdout
    assert all(one["metrics_address"] for one in members["nodes"] + members["arenas"])
    assert "wire_key" in (serve.state_dir / "serve.json").read_text()
    (store,) = json.loads(serve.baton("kv", "stats", "--json").stdout)["arenas"]
    assert store["arena_id"] == members["arenas"][0]["arena_id"] and not store["draining"]

    answer = json.loads(serve.baton("generate", "Hello", "--max-tokens", "3", "--ignore-eos", "--json").stdout)
    assert len(answer["token_ids"]) == 3
    bench = serve.baton(
        "bench", "--num-prompts", "2", "--input-len", "40", "--output-len", "2", "--max-client-lag-ms", "0"
    )
    assert bench.returncode == 0 and "Successful requests:                     2 " in bench.stdout
    stranger = serve.baton("generate", "Hello", key="another")
    assert stranger.returncode == 1 and "UNAUTHENTICATED" in stranger.stderr and "another" not in stranger.stderr

    second = serve.baton("serve", str(tiny_model_dir))
    assert second.returncode == 1
    assert "already served" in second.stderr

    assert serve.baton("down").returncode == 0
    _, errors = serve.process.communicate(timeout=5)
    assert serve.process.returncode == 0
    assert "both-0 is up" in errors and "both-1" not in errors, "nobody asks for it any more"
    assert left_of(cluster_id) == []
    assert not (serve.state_dir / "serve.json").exists()


def test_interrupt_at_the_terminal(serve: Serve) -> None:
    """Ctrl-C goes to the whole process group; the launcher still stops everything in order."""
    serve.ready_line()
    cluster_id = serve.cluster_id
    os.killpg(serve.process.pid, signal.SIGINT)
    _, errors = serve.process.communicate(timeout=60)
    assert serve.process.returncode == 0, errors
    assert "nothing left behind" in errors
    assert left_of(cluster_id) == []


@pytest.mark.parametrize("moment", ["ray", "servers"])
async def test_interrupt_during_the_start(serve: Serve, moment: str) -> None:
    """Ctrl-C while Ray comes up, and while it starts servers: the start ends in an error, long before it times out."""
    await eventually((serve.state_dir / "serve.json").exists, 60, "the launcher")
    cluster_id = serve.cluster_id

    def has_begun() -> bool:
        assert serve.process.poll() is None
        there = processes_of(CLUSTER_VARIABLE, cluster_id)
        return any(moment == "ray" or command(pid).startswith("ray::ServerA") for pid in there)

    await eventually(has_begun, 60, moment)
    os.killpg(serve.process.pid, signal.SIGINT)
    output, errors = await asyncio.to_thread(serve.process.communicate, timeout=60)
    assert (serve.process.returncode, output) == (1, ""), errors
    assert "baton: error: stopped while it was starting" in errors and "Traceback" not in errors
    assert left_of(cluster_id) == []
    assert not (serve.state_dir / "serve.json").exists()


async def test_killed_launcher_takes_its_processes_along(serve: Serve) -> None:
    serve.ready_line()
    cluster_id = serve.cluster_id
    assert left_of(cluster_id)
    serve.process.kill()
    serve.process.wait()

    def are_gone() -> bool:
        return {command(pid) for pid in processes_of(CLUSTER_VARIABLE, cluster_id)} <= {*OUTLIVES_RAY, "ended"}

    await eventually(are_gone, 30, "the end of all servers")
    swept = serve.baton("down")
    assert swept.returncode == 0
    assert f"baton-{cluster_id}" in swept.stderr
    assert left_of(cluster_id) == []
