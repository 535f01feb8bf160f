"""Finds and ends the processes of one cluster, by a variable that all of them inherited. Linux: reads /proc."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
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
    """Waits for processes that are on their way out, then kills the rest. Returns those that are there even so."""
    left = _wait(pids, wait_s)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return [f"{pid} ({command(pid)})" for pid in _wait(left, wait_s)]


def is_running(pid: int) -> bool:
    """Whether a process lives; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "ended"


def _wait(pids: Sequence[int], wait_s: float) -> list[int]:
    deadline = time.monotonic() + wait_s
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left
