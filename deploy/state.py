"""How `baton status` and `baton down` find a running `baton serve`: a state file and a lock beside it.

The lock is the kernel's: it is held exactly as long as the serving process lives, so a file that a killed process
left behind is never taken for a cluster, and a process that got its pid later is never signalled.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from deploy.config import DeployError
from deploy.processes import CLUSTER_VARIABLE, end_all, processes_of

CLAIM_ATTEMPTS = 5
SWEEP_WAIT_S = 2.0
CLUSTER_ID = r"[0-9a-f]{8}"


class AlreadyServing(DeployError):
    """Another process serves from this state folder."""


@dataclass(frozen=True)
class ServeState:
    """What others need to know of a running cluster. Its folders on this machine lie in `bases`."""

    pid: int
    start_ticks: int  # of that pid: with it, a pid names one process for ever
    cluster: str
    cluster_id: str
    model: str
    redis_url: str = field(repr=False)
    routers: tuple[str, ...] = ()  # empty until it is ready
    bases: tuple[str, ...] = ()
    wire_key: str = field(default="", repr=False)  # of its stores; "" too where the file is not its owner's alone
    router_metrics: tuple[str, ...] = ()  # "ip:port" of each one's /metrics; "" is none
    router_http: tuple[str, ...] = ()  # "ip:port" of each one's HTTP API; "" is none
    router_admins: tuple[str, ...] = ()  # and of its operator's door
    has_tls: bool = False  # all of these doors of the routers


def default_state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "baton"


def add_state_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=default_state_dir(),
        metavar="DIR",
        help="where `baton serve` leaves word for the other commands (default %(default)s)",
    )


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is no such process. Source: proc(5), stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text[text.rindex(")") + 2 :].split()[19])


class StateDir:
    """One cluster's state: `serve.json` (readable by its owner alone: it holds the wire key, and the Redis URL may hold
    a password) and a lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "serve.json"
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Makes this process the one that serves from here. Raises `AlreadyServing`, or `DeployError`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise DeployError(f"--state-dir {self.folder}: cannot be used: {error.strerror}") from None
        for attempt in range(CLAIM_ATTEMPTS):  # `alive` of another process holds the lock for an instant
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt + 1 == CLAIM_ATTEMPTS:
                    lock.close()
                    raise AlreadyServing(
                        f"a cluster is already served from {self.folder}: "
                        "stop it with `baton down`, or use another --state-dir"
                    ) from None
                time.sleep(0.05)
        self._lock = lock
        self.sweep()

    def write(self, state: ServeState) -> None:
        """Raises `DeployError`, of a full disk for one."""
        part = self._file.with_suffix(".part")
        try:
            part.unlink(missing_ok=True)  # of a process that was killed: its mode may be any
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                is_private = stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600  # some file systems know no modes
                kept = state if is_private else dataclasses.replace(state, wire_key="")
                file.write(json.dumps(dataclasses.asdict(kept)))
            part.replace(self._file)
        except OSError as error:
            raise DeployError(f"--state-dir {self.folder}: cannot be written to: {error.strerror}") from None

    def read(self) -> ServeState | None:
        try:
            fields = json.loads(self._file.read_text())
            lists = {key: tuple(fields[key]) for key in ("routers", "bases")}
            more = ("router_metrics", "router_http", "router_admins")
            lists |= {key: tuple(fields.get(key, ())) for key in more}
            return ServeState(**fields | lists)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def wire_key(self) -> str:
        """The stores' key, or "". Raises `DeployError` when the file is not its owner's alone (any more)."""
        state = self.running()
        mode = stat.S_IMODE(self._file.stat().st_mode)
        if state.wire_key and mode != 0o600:
            raise DeployError(f"{self._file} has mode {mode:o} and a wire key that others may have read: not used")
        return state.wire_key

    def alive(self) -> bool:
        """Whether a process holds the lock."""
        try:
            with (self.folder / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def running(self) -> ServeState:
        """The state of the cluster that is up. Raises `DeployError` where none is."""
        state = self.read()
        if state is None or not self.alive():
            raise DeployError(f"no cluster is up (looked in {self.folder}); start one with `baton serve MODEL`")
        return state

    def ask_to_stop(self, timeout_s: float) -> None:
        """Sends SIGTERM to the serving process and waits for its end. Raises `DeployError` when it does not come."""
        state = self.running()
        if start_ticks(state.pid) != state.start_ticks:
            raise DeployError(f"pid {state.pid} is not the process that wrote {self._file}; nothing was signalled")
        os.kill(state.pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while self.alive():
            if time.monotonic() > deadline:
                raise DeployError(f"the cluster (pid {state.pid}) did not stop within {timeout_s:.0f} s")
            time.sleep(0.05)

    def sweep(self) -> list[Path]:
        """Removes what a serving process that was killed could not: its state, its folders, and those of Ray's helpers
        that outlive it. Returns the folders. Call it only while no process serves from here.
        """
        state = self.read()
        if state is not None and re.fullmatch(CLUSTER_ID, state.cluster_id):
            end_all(processes_of(CLUSTER_VARIABLE, state.cluster_id), SWEEP_WAIT_S)
        gone = [folder for base in state.bases for folder in folders_of(state.cluster_id, Path(base))] if state else []
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)
        self._file.unlink(missing_ok=True)
        return gone

    def release(self) -> None:
        """Idempotent: forgets the state, then gives the lock back."""
        if self._lock is not None:
            self._file.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def folders_of(cluster_id: str, base: Path) -> list[Path]:
    """The folders that a cluster made in `base`; none where the id is not one that a cluster can have."""
    if re.fullmatch(CLUSTER_ID, cluster_id) is None:
        return []
    found = [*base.glob(f"baton-{cluster_id}"), *base.glob(f"baton-{cluster_id}-*")]
    return [folder for folder in found if folder.is_dir() and not folder.is_symlink()]
