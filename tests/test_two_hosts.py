"""Two hosts, made of two network namespaces: prefill on one, decode on the other, and the KV between them on the wire.

Ray runs in both, as processes of its own; `baton serve` joins it on the first host and starts its Redis there.
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
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import POCKET, REPOSITORY

from deploy import oracle
from deploy.processes import end_all, processes_of
from engine.config import EngineConfig, ModelConfig, kv_layout
from router.tokenizer import Tokenizer

BIN = Path(sys.executable).parent
ADDRESSES = ("10.77.0.1", "10.77.0.2")
RAY_PORT = 6380  # each namespace has all its ports to itself
MARK = "BATON_TEST_TWO_HOSTS"
START_S = 90.0
PROMPT = "The functions in this module are safe to call from more than one thread at a time. " * 6
MAX_TOKENS = 24


def reason_to_skip() -> str:
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs the command `ip` (iproute2)"
    probe = f"baton-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"cannot make a network namespace: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


SKIP = reason_to_skip()
pytestmark = [pytest.mark.netns, pytest.mark.ray, pytest.mark.skipif(bool(SKIP), reason=SKIP)]


@dataclass
class Host:
    """A network namespace with an address and a link to the other one."""

    name: str
    address: str
    link: str
    environment: dict[str, str]

    def command(self, *argv: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *argv]

    def run(self, *argv: str) -> str:
        result = subprocess.run(
            self.command(*argv), env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=START_S
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def start(self, stack: ExitStack, log: Path, *argv: str) -> subprocess.Popen[str]:
        with log.open("w") as errors:
            process = subprocess.Popen(
                self.command(*argv),
                env=self.environment,
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        stack.callback(stop, process)
        return process

    def received_bytes(self) -> int:
        return int(self.run("cat", f"/sys/class/net/{self.link}/statistics/rx_bytes"))


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
    mark = secrets.token_hex(4)
    environment = os.environ | {MARK: mark, "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_memory_monitor_refresh_ms": "0"}
    both = tuple(Host(f"bt-{mark}-{n}", ADDRESSES[n], f"bt{mark[:6]}{n}", environment) for n in range(2))
    try:
        for host in both:
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
        first, second = both
        ip("-n", first.name, "link", "add", first.link, "type", "veth", "peer", second.link, "netns", second.name)
        for host in both:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.link)
            ip("-n", host.name, "link", "set", host.link, "up")
        yield first, second
    finally:
        assert end_all(processes_of(MARK, mark), wait_s=10.0) == []
        for host in both:
            subprocess.run(["ip", "netns", "del", host.name], check=False)


def ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.2)


def start_ray(first: Host, second: Host, stack: ExitStack, folder: Path) -> None:
    """A head on the first host and a worker on the second, each a process in the foreground."""
    options = ["--num-cpus=0", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    head = ["--head", f"--node-ip-address={first.address}", f"--port={RAY_PORT}", "--include-dashboard=false"]
    first.start(stack, folder / "head.log", f"{BIN}/ray", "start", *head, f"--temp-dir={folder}/ray", *options)
    probe = f"import socket; socket.create_connection(('{first.address}', {RAY_PORT}), 1)"

    def is_up() -> bool:
        return subprocess.run(second.command(sys.executable, "-c", probe), capture_output=True).returncode == 0

    wait_for(is_up, "the head of Ray")
    join = [f"--address={first.address}:{RAY_PORT}", f"--node-ip-address={second.address}"]
    second.start(stack, folder / "worker.log", f"{BIN}/ray", "start", *join, *options)
    listing = f"import ray; ray.init('{first.address}:{RAY_PORT}', logging_level='ERROR'); print(len(ray.nodes()))"
    wait_for(lambda: first.run(sys.executable, "-c", listing).strip() == "2", "two machines in Ray")


def test_prefill_and_decode_on_two_hosts(hosts: tuple[Host, Host], folder: Path, model: Path) -> None:
    first, second = hosts
    state = ("--state-dir", str(folder / "state"))
    with ExitStack() as stack:
        start_ray(first, second, stack, folder)
        pins = ["--prefill-hosts", first.address, "--decode-hosts", second.address]
        where = ["--ray-address", f"{first.address}:{RAY_PORT}", "--num-threads", "1", "--store-memory", "64M"]
        serve = first.start(stack, folder / "serve.log", f"{BIN}/baton", "serve", str(model), *pins, *where, *state)
        assert serve.stdout is not None
        ready = serve.stdout.readline()
        assert ready.startswith("ready: "), (folder / "serve.log").read_text()

        members = json.loads(first.run(f"{BIN}/baton", "status", "--json", *state))
        addresses = {node["role"]: node["address"].rsplit(":", 1)[0] for node in members["nodes"]}
        assert addresses == {"prefill": first.address, "decode": second.address}
        assert len({arena["host"] for arena in members["arenas"]}) == 2
        folders = list(Path("/dev/shm").glob(f"baton-{cluster_id(folder)}-*"))
        assert len(folders) == 2

        before = second.received_bytes()
        sampling = ["--temperature", "0", "--max-tokens", str(MAX_TOKENS)]
        answer = json.loads(first.run(f"{BIN}/baton", "generate", PROMPT, "--json", *sampling, *state))
        fetched = answer["timeline"]["decode_store_hit_tokens"]
        assert (answer["timeline"]["prefill_node"], answer["timeline"]["decode_node"]) == ("prefill-0", "decode-0")
        assert fetched > 0
        layout = kv_layout(ModelConfig.from_pretrained(model), EngineConfig())
        assert second.received_bytes() - before >= fetched // layout.block_size * layout.block_bytes

        token_ids = Tokenizer(model).encode(PROMPT)
        [alone] = oracle.ask(model, [oracle.Question(token_ids, {"temperature": 0.0, "max_tokens": MAX_TOKENS})])
        assert answer["token_ids"] == alone

        first.run(f"{BIN}/baton", "down", *state)
        assert serve.wait(10) == 0
        assert not [path for path in folders if path.exists()]


def cluster_id(folder: Path) -> str:
    return str(json.loads((folder / "state" / "serve.json").read_text())["cluster_id"])
