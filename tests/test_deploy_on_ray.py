"""`baton serve --config FILE` on a Ray that runs already: machines by custom resource, ports that were asked for."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, eventually

from deploy import on_ray
from deploy.processes import end_all, processes_of

pytestmark = pytest.mark.ray

BIN = Path(sys.executable).parent
MARK = "BATON_TEST_ON_RAY"
START_S = 90.0
NUM_METRICS_PORTS = 4  # a store, two nodes, a router
RESOURCES = {"baton-prefill": 1, "baton-decode": 1, "baton-router": 1}


@pytest.fixture
def folder() -> Iterator[Path]:
    """For Ray's session, whose sockets need a short path."""
    path = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    mark = secrets.token_hex(4)
    settings = {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    yield os.environ | settings | {MARK: mark, "RAY_memory_monitor_refresh_ms": "0"}
    assert end_all(processes_of(MARK, mark), wait_s=10.0) == []


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that the kernel gives to others meanwhile."""
    for _ in range(50):
        first = 20_000 + secrets.randbelow(12_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


def start_ray(folder: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    port = free_ports(1)
    head = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false", "--block"]
    options = ["--num-cpus=0", "--object-store-memory=100000000", "--disable-usage-stats"]
    options += [f"--resources={json.dumps(RESOURCES)}", f"--temp-dir={folder}/ray"]
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            [f"{BIN}/ray", "start", *head, *options], env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def is_up() -> bool:
        assert process.poll() is None, (folder / "ray.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    asyncio.run(eventually(is_up, timeout_s=START_S))
    return process, f"127.0.0.1:{port}"


def test_config_file_and_custom_resources(folder: Path, environment: dict[str, str], tiny_model_dir: Path) -> None:
    ray, address = start_ray(folder, environment)
    metrics_port, file, targets = free_ports(NUM_METRICS_PORTS), folder / "baton.yaml", folder / "targets.json"
    settings = {
        "model": str(tiny_model_dir),
        "ray_address": address,
        "prefill_hosts": ["baton-prefill"],
        "decode_hosts": ["baton-decode"],
        "router-hosts": ["baton-router"],
        "min_machines": 1,
        "kv_memory": "16M",
        "store_memory": "16M",
        "num_threads": 1,
        "metrics_port": metrics_port,
        "metrics_targets": str(targets),
        "state_dir": str(folder / "state"),
    }
    file.write_text(yaml.safe_dump(settings))
    with (folder / "serve.log").open("w") as log:
        serve = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "serve", "--config", str(file), "--cluster", "on-ray"],
            env=environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        assert serve.stdout is not None
        assert serve.stdout.readline().startswith("ready: "), (folder / "serve.log").read_text()
        is_told = lambda: targets.exists() and len(json.loads(targets.read_text())) == 4  # noqa: E731
        asyncio.run(eventually(is_told, timeout_s=START_S, what=(folder / "serve.log").read_text()))
        found = {one["labels"]["baton_name"]: one["targets"][0] for one in json.loads(targets.read_text())}
        ports = {name.split("-")[0]: int(target.rpartition(":")[2]) - metrics_port for name, target in found.items()}
        assert ports == {"store": 0, "prefill": 1, "decode": 2, "router": 3}
        for target in found.values():
            assert b"baton_" in urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read()
        serve.send_signal(signal.SIGTERM)
        assert serve.wait(60) == 0, (folder / "serve.log").read_text()
        assert json.loads(targets.read_text()) == []
    finally:
        for process in (serve, ray):
            process.terminate()
            process.wait(30)
        assert serve.stdout is not None
        serve.stdout.close()


@pytest.mark.parametrize("num_failures", [1, 2])
def test_an_own_ray_is_tried_twice(num_failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")  # `join` would leave one
    done: list[str] = []

    def init(**_options: object) -> None:
        done.append("init")
        if done.count("init") <= num_failures:
            raise RuntimeError("timed out during startup")

    monkeypatch.setattr(on_ray.ray, "init", init)
    monkeypatch.setattr(on_ray.ray, "shutdown", lambda: done.append("shutdown"))
    if num_failures == 1:
        on_ray.join("", tmp_path, "some")
    else:
        with pytest.raises(on_ray.StartFailed, match="no Ray here: timed out"):
            on_ray.join("", tmp_path, "some")
    assert done == ["init", "shutdown", "init"]
