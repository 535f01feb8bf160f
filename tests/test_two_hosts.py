"""Two hosts, made of network namespaces: prefill on one, decode on the other, and the KV between them on the wire.

Ray runs in both, as processes of its own; `baton serve` joins it on the first host and starts its Redis there. The link
is one of 1 Gbit/s. `test_hosts.py` does more, without Ray.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import POCKET, REPOSITORY
from hosts_harness import NETNS

from benchmarks.lan import Host, Lan
from deploy import oracle
from deploy.processes import end_all, processes_of
from engine.config import EngineConfig, ModelConfig, kv_layout
from router.tokenizer import Tokenizer

BIN = Path(sys.executable).parent
RAY_PORT = 6380  # each namespace has all its ports to itself
MARK = "BATON_TEST_TWO_HOSTS"
ENVIRONMENT = os.environ | {
    MARK: secrets.token_hex(4),
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}
START_S = 90.0
PROMPT = "The functions in this module are safe to call from more than one thread at a time. " * 6
MAX_TOKENS = 24


pytestmark = [*NETNS, pytest.mark.ray]


def run(host: Host, *argv: str) -> str:
    result = subprocess.run(
        host.command(*argv), env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True, timeout=START_S
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def start(host: Host, stack: ExitStack, log: Path, *argv: str) -> subprocess.Popen[str]:
    with log.open("w") as errors:
        process = subprocess.Popen(
            host.command(*argv),
            env=ENVIRONMENT,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    stack.callback(stop, process)
    return process


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """For logs and for Ray's session, whose sockets need a short path."""
    path = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def model(folder: Path) -> Path:
    """A copy, so that all processes see the same weights whatever happens to the original meanwhile."""
    return Path(shutil.copytree(POCKET, folder / "pocket"))


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with Lan(2) as lan:
        try:
            yield lan.hosts[0], lan.hosts[1]
        finally:
            assert end_all(processes_of(MARK, ENVIRONMENT[MARK]), wait_s=10.0) == []


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.2)


def start_ray(first: Host, second: Host, stack: ExitStack, folder: Path) -> None:
    """A head on the first host and a worker on the second, each a process in the foreground."""
    options = ["--num-cpus=0", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    head = ["--head", f"--node-ip-address={first.address}", f"--port={RAY_PORT}", "--include-dashboard=false"]
    start(first, stack, folder / "head.log", f"{BIN}/ray", "start", *head, f"--temp-dir={folder}/ray", *options)
    probe = f"import socket; socket.create_connection(('{first.address}', {RAY_PORT}), 1)"

    def is_up() -> bool:
        return subprocess.run(second.command(sys.executable, "-c", probe), capture_output=True).returncode == 0

    wait_for(is_up, "the head of Ray")
    join = [f"--address={first.address}:{RAY_PORT}", f"--node-ip-address={second.address}"]
    start(second, stack, folder / "worker.log", f"{BIN}/ray", "start", *join, *options)
    listing = f"import ray; ray.init('{first.address}:{RAY_PORT}', logging_level='ERROR'); print(len(ray.nodes()))"
    wait_for(lambda: run(first, sys.executable, "-c", listing).strip() == "2", "two machines in Ray")


def test_prefill_and_decode_on_two_hosts(hosts: tuple[Host, Host], folder: Path, model: Path) -> None:
    first, second = hosts
    state = ("--state-dir", str(folder / "state"))
    with ExitStack() as stack:
        start_ray(first, second, stack, folder)
        pins = ["--prefill-hosts", first.address, "--decode-hosts", second.address]
        where = ["--ray-address", f"{first.address}:{RAY_PORT}", "--num-threads", "1", "--store-memory", "64M"]
        serve = start(first, stack, folder / "serve.log", f"{BIN}/baton", "serve", str(model), *pins, *where, *state)
        assert serve.stdout is not None
        ready = serve.stdout.readline()
        assert ready.startswith("ready: "), (folder / "serve.log").read_text()

        members = json.loads(run(first, f"{BIN}/baton", "status", "--json", *state))
        addresses = {node["role"]: node["address"].rsplit(":", 1)[0] for node in members["nodes"]}
        assert addresses == {"prefill": first.address, "decode": second.address}
        assert len({arena["host"] for arena in members["arenas"]}) == 2
        folders = list(Path("/dev/shm").glob(f"baton-{cluster_id(folder)}-*"))
        assert len(folders) == 2

        for host in hosts:
            host.limit(1e9)
        check_hand_off(first, second, model, state)

        run(first, f"{BIN}/baton", "down", *state)
        assert serve.wait(10) == 0
        assert not [path for path in folders if path.exists()]


def check_hand_off(first: Host, second: Host, model: Path, state: tuple[str, str]) -> None:
    """The text is right, and the decode node has blocks of the other host's: encrypted, as nobody said otherwise."""
    before_bytes = second.received_bytes()
    sampling = ["--temperature", "0", "--max-tokens", str(MAX_TOKENS)]
    answer = json.loads(run(first, f"{BIN}/baton", "generate", PROMPT, "--json", *sampling, *state))
    fetched = answer["timeline"]["decode_store_hit_tokens"]
    assert (answer["timeline"]["prefill_node"], answer["timeline"]["decode_node"]) == ("prefill-0", "decode-0")
    assert fetched > 0
    layout = kv_layout(ModelConfig.from_pretrained(model), EngineConfig())
    assert second.received_bytes() - before_bytes >= fetched // layout.block_size * layout.block_bytes
    token_ids = Tokenizer(model).encode(PROMPT)
    [alone] = oracle.ask(model, [oracle.Question(token_ids, {"temperature": 0.0, "max_tokens": MAX_TOKENS})])
    assert answer["token_ids"] == alone


def cluster_id(folder: Path) -> str:
    return str(json.loads((folder / "state" / "serve.json").read_text())["cluster_id"])
