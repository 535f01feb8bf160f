"""The store beside its peers: blocks on the same machine, over the wire, and the look-up of where they are.

    benchmarks/install_peers.sh /somewhere mooncake lmcache
    python -m benchmarks.kvstore --peer-folder /somewhere --json docs/results/kvstore.jsonl

Every contender has its client, and whatever serves it, in processes of their own. All are started and filled once for
a table and then take turns at each row: one turn to warm up, then 7 that count. A turn's figure is the median of all
that fit into a quarter of a second. Blocks and memory are taken in random order out of 256 MiB each, so that nothing
is in a cache. What comes is checked once before the clock runs. `--peer none` leaves the peers out, `--quick` is a look
at 1 MiB blocks within a minute.

Same machine. "fetch" copies blocks whose place is known into scattered blocks of the engine: for Baton
`KVClient.fetch` and `KVCache.write`. "publish" brings them the other way, for Baton into an arena that is full, with
checksums, until they are committed; Redis is told behind that. Mooncake's evictions are left out. memcpy is numpy's
copy of the same blocks out of the same arena. "two clients" are two processes at once, and their sum; Mooncake's
`process` and LMCache then have two stores.

Over TCP, loopback. Baton's client has no arena, checks what comes, and gets "as received" memory of its own; "into the
engine" it receives there, as a node does, and marks it as come. "by ZeroMQ" is what stores are read over whose records
name no plain port; it copies into the engine. Mooncake and the bare socket receive straight into the engine's blocks in
both rows. Peers encrypt nothing: they stand beside Baton's other rows with the same figures.

Look-up. "locate" is `Directory.locate` over Redis, all blocks found, "count" `Directory.runs`, which is what a router
asks, "match" `KVClient.match_local`. Peers have one call for all: Mooncake's `batch_is_exist`, LMCache's look at its
own memory.

Clients' own memory asks for huge pages, but for Mooncake's `shm`, whose pool is shared memory. LMCache is its local
tier alone, without a connector to an engine, of which it has none for CPUs. Redis is asked through redis-py.

"nt" behind a peer's name: with glibc's threshold for non-temporal stores lowered as is best here, which no peer does
itself. Baton runs without.

The aims: fetch of 16 blocks >= 85 % of memcpy; one block p50 <= 150 us fetched and <= 300 us published; 16 blocks
over TCP >= 1.5x Mooncake and >= 90 % of pyzmq; publish >= 1.2x Mooncake; locate <= 200 us for 64 and <= 600 for 512.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.kvstore_tables import (
    ENVIRONMENTS,
    NON_TEMPORAL,
    PEERS,
    SIZES_KIB,
    Contender,
    Measurement,
    Table,
    Wanted,
    tables,
)
from benchmarks.kvstore_worker import Setting
from benchmarks.rows import Peer, Row, lines, print_table, tall_table
from benchmarks.worker_process import REPOSITORY, WorkerProcess

TURNS, QUICK_TURNS = 7, 3
TURN_S, QUICK_TURN_S = 0.25, 0.05


class Bench:
    """The clients of one table, in turns."""

    def __init__(self, table: Table, stack: ExitStack, turns: int, turn_s: float) -> None:
        self._table, self._stack, self._turns, self._turn_s = table, stack, turns, turn_s
        self._clients: dict[str, list[WorkerProcess]] = {}
        for contender in table.contenders:
            self._clients[contender.name] = self._start(contender)

    @property
    def versions(self) -> dict[str, str]:
        return {name: clients[0].greeting["version"] for name, clients in self._clients.items()}

    def measure(self, measurement: Measurement) -> tuple[list[Row], list[Peer]]:
        """The rows, and of each peer the figures for them."""
        jobs = {own.row: (own.contender, own.operation) for own in measurement.own}
        names = [one.name for one in self._table.contenders if not one.name.startswith("baton")]
        jobs |= {name: (name, measurement.operation) for name in names}
        values: dict[str, list[float]] = {name: [] for name in jobs}
        for turn in range(1 + self._turns):
            for name, (contender, operation) in jobs.items():
                clients = self._clients[contender][: measurement.num_clients]
                if operation in clients[0].greeting["operations"]:
                    figure = self._turn(clients, operation, measurement)
                    values[name] += [figure] if turn else []
        print({name: [f"{value:.4g}" for value in seen] for name, seen in values.items()}, file=sys.stderr)
        rows = [Row(own.row, measurement.unit, tuple(values[own.row])) for own in measurement.own]
        limits = {one.name: one.is_limit for one in self._table.contenders}
        return rows, [Peer(name, [values[name]] * len(rows), limits[name]) for name in names]

    def _turn(self, clients: Sequence[WorkerProcess], operation: str, measurement: Measurement) -> float:
        question = {"operation": operation, "num_blocks": measurement.num_blocks, "seconds": self._turn_s}
        for client in clients:
            client.send(question)
        return measurement.figure([client.receive() for client in clients], self._table.block_bytes)

    def _start(self, contender: Contender) -> list[WorkerProcess]:
        """Its clients; the first one starts the store."""
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-", dir="/dev/shm"))
        shared = self._clients[contender.joins][0].greeting["shared"] if contender.joins else None
        clients: list[WorkerProcess] = []
        for number in range(self._num_clients(contender)):
            setting = Setting(
                block_bytes=self._table.block_bytes,
                num_blocks=self._table.num_blocks,
                num_positions=self._table.num_positions,
                folder=folder,
                option=contender.option,
                client=number,
                shared=shared,
            )
            client = WorkerProcess(contender.python, contender.module, [json.dumps(asdict(setting))], contender.extra)
            self._stack.callback(client.stop)
            clients.append(client)
            shared = client.greeting["shared"] or None
        return clients

    def _num_clients(self, contender: Contender) -> int:
        is_peer = not contender.name.startswith("baton")
        return max(
            one.num_clients
            for one in self._table.measurements
            if is_peer or contender.name == "baton" or any(own.contender == contender.name for own in one.own)
        )


def run(table: Table, turns: int, turn_s: float) -> tuple[list[Row], list[Peer], dict[str, str]]:
    """A table's rows, its peers and everybody's versions."""
    rows: list[Row] = []
    values: dict[str, list[Sequence[float]]] = {}
    limits: dict[str, bool] = {}
    with ExitStack() as stack:
        bench = Bench(table, stack, turns, turn_s)
        for measurement in table.measurements:
            found, peers = bench.measure(measurement)
            rows += found
            for peer in peers:
                values.setdefault(peer.name, []).extend(peer.values)
                limits[peer.name] = peer.is_limit
        versions = bench.versions
    return rows, [Peer(name, seen, limits[name]) for name, seen in values.items()], versions


def about(versions: Mapping[str, str]) -> dict[str, Any]:
    """What the figures hang on besides the code."""
    processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    git = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor.split(":")[1].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": git.stdout.strip(),
        "versions": dict(versions),
        "nt": NON_TEMPORAL,
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help=f"none, or some of {','.join(PEERS)}; default: all that can be")
    parser.add_argument("--peer-folder", type=Path, help="the folder that install_peers.sh was given")
    parser.add_argument("--size-kib", type=int, nargs="+", choices=SIZES_KIB, help="of the blocks; default: all")
    parser.add_argument("--turns", type=int, help=f"that count, after one to warm up; default {TURNS}")
    parser.add_argument("--quick", action="store_true", help="1 MiB blocks, short turns, no two clients, no nt")
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="a regular expression: only such rows")
    parser.add_argument("--json", type=Path, help="append the lines to this file, behind one about the run")
    args = parser.parse_args(argv)
    away = [
        name
        for name in ENVIRONMENTS
        if not args.peer_folder or not (args.peer_folder / name / "bin" / "python").exists()
    ]
    can_be = [name for name in PEERS if name not in away]
    args.peer = [] if args.peer == "none" else args.peer.split(",") if args.peer else can_be
    if not set(PEERS).issuperset(args.peer):
        parser.error(f"--peer takes {', '.join(PEERS)}, separated by commas, or none")
    if not set(can_be).issuperset(args.peer):
        missing = ", ".join(name for name in args.peer if name not in can_be)
        parser.error(f"--peer {missing} needs the --peer-folder that install_peers.sh was given")
    args.size_kib = args.size_kib or ([1024] if args.quick else SIZES_KIB)
    args.turns = args.turns or (QUICK_TURNS if args.quick else TURNS)
    return args


def wanted(args: argparse.Namespace) -> Wanted:
    return Wanted(args.peer, args.peer_folder or Path(), args.size_kib, args.rows, args.quick)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all processes and folders go too
    said: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for table in tables(wanted(args)):
        rows, peers, seen = run(table, args.turns, QUICK_TURN_S if args.quick else TURN_S)
        print_table(tall_table(f"kvstore: {table.title}", rows, peers))
        versions |= seen
        said += lines("kvstore", rows, peers)
    said.insert(0, {"benchmark": "kvstore", "about": about(versions)})
    text = "\n".join(map(json.dumps, said))
    print(text)
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            print(text, file=file)


if __name__ == "__main__":
    main()
