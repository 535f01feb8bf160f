"""How long `baton serve models/pocket` takes to its first token, and what the cluster then holds of memory, idle.

Repeat it with `python -m benchmarks.start` from the repository's root (`--quick` starts the cluster once instead of 5
times). Each repeat is a fresh `baton serve` with its defaults and an empty state folder; the file system's cache is
warm from the second on. The clock starts before the command and stops at the first token of a text prompt over gRPC.

Memory is PSS (memory shared by n processes counts 1/n in each), read a while after that request, summed by role. A
process has the role of the registry's record whose port it listens on; the rest is Ray, Redis and the launcher. An
arena counts as far as its pages have been touched.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from batonpb import common_pb2, inference_pb2
from benchmarks.rows import Row, print_rows
from deploy.state import ServeState, StateDir
from kvstore.directory import Directory
from loadtest.exchange import Clock, Shot, Target, exchange
from loadtest.grpc_client import GrpcClient

MODEL = Path(__file__).resolve().parent.parent / "models" / "pocket"
PROMPT = "The main function reads its arguments and "
SETTLE_S = 5.0
START_LIMIT_S, STOP_LIMIT_S = 300.0, 60.0


@dataclass(frozen=True)
class Start:
    """One start of a cluster. Seconds since the command; bytes of PSS by role, summed over its processes."""

    ready_s: float
    first_token_s: float
    pss_bytes: Counter[str]


def start_once() -> Start:
    """Starts a cluster, asks it for one short answer, looks at its memory and stops it."""
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        clock = Clock()
        command = [sys.executable, "-m", "deploy.cli", "serve", str(MODEL), "--state-dir", folder]
        process = subprocess.Popen(command, stdout=sys.stderr)
        try:
            state = _wait_until_ready(process, StateDir(Path(folder)))
            ready_s = clock()
            first_token_s = asyncio.run(_first_token(state.routers[0], clock))
            time.sleep(SETTLE_S)
            pss_bytes = asyncio.run(_memory(state))
        finally:
            process.terminate()
            process.wait(STOP_LIMIT_S)
    return Start(ready_s, first_token_s, pss_bytes)


def _wait_until_ready(process: subprocess.Popen[bytes], folder: StateDir) -> ServeState:
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s:
        state = folder.read()
        if state is not None and state.routers:
            return state
        if process.poll() is not None:
            raise RuntimeError(f"`baton serve` ended with {process.returncode} before it was ready")
        time.sleep(0.01)
    raise RuntimeError(f"`baton serve` was not ready within {START_LIMIT_S} s")


async def _first_token(address: str, clock: Clock) -> float:
    sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    async with GrpcClient(Target(address, timeout_s=60.0)) as client:
        await client.get_model()
        request = inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling)
        record, _ = await exchange(client, Shot(0, 0.0, request), clock)
    if record.error:
        raise RuntimeError(f"the first request failed: {record.error}")
    return record.token_times_s[0]


async def _memory(state: ServeState) -> Counter[str]:
    roles = await _roles_by_port(state)
    pss_bytes: Counter[str] = Counter()
    for process in _processes(state):
        role = "launcher" if process.pid == state.pid else _role(process, roles)
        pss_bytes[role] += _pss_bytes(process.pid)
    return pss_bytes


async def _roles_by_port(state: ServeState) -> dict[int, str]:
    directory = Directory(state.redis_url, state.cluster)
    nodes, arenas = await directory.nodes(), await directory.arenas()
    await directory.close()
    roles = {_port(node.address): f"{node.role} node" for node in nodes}
    roles |= {_port(arena.address): "store" for arena in arenas}
    return roles | {_port(address): "router" for address in state.routers}


def _port(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def _processes(state: ServeState) -> Iterable[psutil.Process]:
    launcher = psutil.Process(state.pid)
    return [launcher, *launcher.children(recursive=True)]


def _role(process: psutil.Process, roles: dict[int, str]) -> str:
    for connection in process.net_connections(kind="inet"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in roles:
            return roles[connection.laddr.port]
    return "redis" if "redis" in process.name() else "ray"


def _pss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def rows_of(starts: list[Start]) -> list[Row]:
    """The figures of all starts, one row for each."""
    rows = [
        Row("from `baton serve` to ready", "s", tuple(start.ready_s for start in starts)),
        Row("from `baton serve` to the first token", "s", tuple(start.first_token_s for start in starts)),
    ]
    for role in sorted({role for start in starts for role in start.pss_bytes}):
        rows.append(Row(f"idle memory: {role}", "MiB", tuple(start.pss_bytes[role] / 2**20 for start in starts)))
    rows.append(Row("idle memory: all", "MiB", tuple(start.pss_bytes.total() / 2**20 for start in starts)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one start instead of 5")
    args = parser.parse_args()
    print_rows("start", rows_of([start_once() for _ in range(1 if args.quick else 5)]))


if __name__ == "__main__":
    main()
