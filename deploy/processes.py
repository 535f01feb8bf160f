"""Finds and ends the processes of one cluster, by a variable that all of them inherited. Linux: reads /proc.

Also sets variables for child processes, and keeps signal handlers, while another library starts them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

CLUSTER_VARIABLE = "BATON_CLUSTER_ID"  # in the environment of every process of a cluster that has its own Ray
POLL_S = 0.05


def processes_of(variable: str, value: str) -> list[int]:
    """Pids of this user's processes that were started with `variable=value` in their environment, without this one."""
    wanted = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue  # ended in between, or someone else's
            if wanted in environment.split(b"\0"):
                found.append(int(folder.name))
    return found


def end_all(pids: Sequence[int], wait_s: float) -> list[str]:
    """Waits for processes that are ending, then kills the rest. Returns those that remain even so."""
    left = _wait(pids, wait_s)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return [f"{pid} ({command(pid)})" for pid in _wait(left, wait_s)]


def is_running(pid: int) -> bool:
    """Whether a process is alive; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "ended"


@contextmanager
def signals_kept() -> Iterator[None]:
    """Restores our SIGTERM handler afterwards, which `ray.init` replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for processes started inside the context."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _wait(pids: Sequence[int], wait_s: float) -> list[int]:
    deadline = time.monotonic() + wait_s
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left
