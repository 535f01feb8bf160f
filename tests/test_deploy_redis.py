"""The embedded Redis: answers, comes back on the same address when it is killed, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import redis
from conftest import eventually

from deploy.redis import EmbeddedRedis, RedisFailed, check_given
from kvstore.directory import Directory, NodeRecord

HOSTS = ("", "127.0.0.1")


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=HOSTS, ids=("unix", "tcp"))
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    embedded = EmbeddedRedis(folder, request.param)
    embedded.start()
    yield embedded
    embedded.stop()


def answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url, socket_timeout=1.0) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_answers_and_stops(server: EmbeddedRedis) -> None:
    assert answers(server.url)
    pid = server.pid
    server.stop()
    server.stop()
    assert not answers(server.url)
    assert not is_running(pid)


async def test_is_back_on_the_same_address_after_a_kill(server: EmbeddedRedis) -> None:
    url = server.url
    for _ in range(2):
        pid = server.pid
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda old=pid: server.pid != old and answers(url), what="a new Redis")
    assert server.url == url


async def test_is_back_although_no_process_could_be_started_at_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedRedis(folder)
    server.start()
    original, failures = subprocess.Popen, [BlockingIOError(11, "fork")]

    def start(*args: object, **options: object) -> subprocess.Popen:
        if failures:
            raise failures.pop()
        return original(*args, **options)

    try:
        monkeypatch.setattr("deploy.redis.subprocess.Popen", start)
        os.kill(server.pid, signal.SIGKILL)
        await eventually(lambda: not failures and answers(server.url), 10, what="a new Redis")
    finally:
        server.stop()


async def test_one_that_dies_again_and_again_is_started_ever_more_slowly(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def wait(starts: Sequence[float], now: float) -> float:
        counts.append(len(starts))
        return 0.0

    def fail() -> None:
        raise RedisFailed("no memory")

    monkeypatch.setattr("deploy.redis.backoff_s", wait)
    monkeypatch.setattr(server, "_start_once", fail)
    os.kill(server.pid, signal.SIGKILL)
    await eventually(lambda: counts[:3] == [1, 2, 3], what="each start counts")


def test_keeps_nothing_on_disk(folder: Path) -> None:
    server = EmbeddedRedis(folder)
    server.start()
    with redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
    server.stop()
    assert {path.name for path in folder.iterdir()} <= {"redis.log"}


def test_tcp_asks_for_a_password(folder: Path) -> None:
    server = EmbeddedRedis(folder, "127.0.0.1")
    server.start()
    try:
        without = "redis://" + server.url.split("@")[1]
        assert answers(server.url)
        assert not answers(without)
        with open(f"/proc/{server.pid}/cmdline", "rb") as cmdline:
            assert server.url.split("@")[0].rsplit(":", 1)[1].encode() not in cmdline.read()
    finally:
        server.stop()


def test_failed_start_says_why_and_leaves_no_process(folder: Path) -> None:
    (folder / "redis.sock").mkdir()
    server = EmbeddedRedis(folder)
    with pytest.raises(RedisFailed, match="did not start"):
        server.start()
    assert not is_running(server.pid)


async def test_goes_with_a_killed_launcher(folder: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom deploy.redis import EmbeddedRedis\n"
        f"server = EmbeddedRedis(Path({str(folder)!r}))\nserver.start()\nprint(server.pid, flush=True)\ntime.sleep(600)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert is_running(pid)
    launcher.kill()
    launcher.wait()
    await eventually(lambda: not is_running(pid), what="the end of Redis")


def test_port_taken_in_between_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1]])
        original = sys.modules["deploy.redis"]._free_port
        monkeypatch.setattr("deploy.redis._free_port", lambda host: next(ports, None) or original(host))
        server = EmbeddedRedis(folder, "127.0.0.1")
        server.start()
        try:
            assert answers(server.url)
        finally:
            server.stop()


# --- a given Redis ---


def a_node() -> NodeRecord:
    texts = {field: "x" for field in ("incarnation", "role", "address", "model", "kv_root", "host")}
    numbers = {field: 1 for field in ("block_size", "block_bytes", "vocab_size", "max_model_len")}
    return NodeRecord(node_id="decode-7", **texts, **numbers)


async def test_given_redis_has_another_cluster_of_that_name(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.redis.STALE_S", 0.3)
    directory = Directory(redis_url, "taken")
    await directory.heartbeat_node(a_node(), ttl_s=60.0)
    await directory.close()
    with pytest.raises(RedisFailed, match=r"'taken' has nodes in this Redis \(decode-7\)"):
        await check_given(redis_url, "taken")
    await check_given(redis_url, "free")


async def test_given_redis_forgets_a_killed_cluster(redis_url: str) -> None:
    directory = Directory(redis_url, "killed")
    await directory.heartbeat_node(a_node(), ttl_s=0.5)
    await directory.close()
    await check_given(redis_url, "killed")
