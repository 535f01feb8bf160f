"""The store beside its peers: blocks on the same machine, over the wire, and the look-up of where they are.

    benchmarks/install_peers.sh /somewhere mooncake lmcache
    python -m benchmarks.kvstore --peers /somewhere --json docs/results/kvstore.jsonl

Every contender has its client, and whatever serves it, in processes of their own. All are started and filled once for
a table and then take turns at each row: one turn to warm up, then 7 that count. A turn's figure is the median of all
that fit into a quarter of a second. Blocks and memory are taken in random order out of 256 MiB each, so that nothing
is in a cache. What comes is checked once before the clock runs. `--peer none` leaves the peers out, `--quick` is a look
at 1 MiB blocks within a minute.

Same machine. "fetch" copies blocks whose place is known into scattered blocks of the engine: for Baton
`KVClient.fetch` and `KVCache.write`. "publish" brings them the other way, for Baton into an arena that is full, with
checksums, committed and announced to Redis; Mooncake's evictions are left out. memcpy is numpy's copy of the same
blocks out of the same arena. "two clients" are two processes at once, and their sum; Mooncake's `process` and LMCache
then have two stores.

Over TCP, loopback. Baton's client has no arena, checks what comes, and gets "as received" memory of its own;
Mooncake and the bare socket receive straight into the engine's blocks in both rows. Peers encrypt nothing: they stand
beside Baton's encrypted rows with the figures of the plain ones.

Look-up. "locate" is `Directory.locate` over Redis, all blocks found, "match" `KVClient.match_local`. Peers have one
call for both: Mooncake's `batch_is_exist`, LMCache's look at its own memory.

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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kvstore_worker import Setting
from benchmarks.rows import Peer, Row, lines, print_table, tall_table
from benchmarks.worker_process import REPOSITORY, WorkerProcess

TURNS, QUICK_TURNS = 7, 3
TURN_S, QUICK_TURN_S = 0.25, 0.05
POOL_BYTES = 256 << 20  # of a store's blocks, and of each client's own
SIZES_KIB = (256, 1024, 4096)
LOOKED_UP_BLOCKS, LOOKED_UP_BYTES = 8192, 4096
ENCRYPTED = "baton, encrypted"
NON_TEMPORAL = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x40000"}
PEERS = ("mooncake", "lmcache", "memcpy", "redis", "pyzmq", "tcp")
LIMITS = ("memcpy", "pyzmq", "tcp")  # what Baton is to come near to, rather than to beat


@dataclass(frozen=True)
class Contender:
    """Who takes part in a table, and how its clients are started."""

    name: str
    module: str
    option: str = ""
    python: str = sys.executable
    extra: Mapping[str, str] = field(default_factory=dict)
    joins: str = ""  # whose store it reads; "": its own

    @property
    def is_limit(self) -> bool:
        return self.name.split(",")[0] in LIMITS

    def non_temporal(self) -> Contender:
        extra = {**self.extra, **NON_TEMPORAL}
        return Contender(f"{self.name}, nt", self.module, self.option, self.python, extra, self.joins)


@dataclass(frozen=True)
class Own:
    """A row, and what Baton does for it."""

    row: str
    operation: str
    contender: str = "baton"


@dataclass(frozen=True)
class Measurement:
    """One thing that all do in turns, and the rows that come of it."""

    unit: str  # "GB/s" of all clients together, or "us" of one
    num_blocks: int
    operation: str  # of the peers
    own: tuple[Own, ...]
    num_clients: int = 1

    def figure(self, seconds: Sequence[Sequence[float]], block_bytes: int) -> float:
        """Of one turn; `seconds` has for each client what each of its repeats took."""
        medians = [statistics.median(one) for one in seconds]
        if self.unit == "us":
            return 1e6 * statistics.fmean(medians)
        return sum(self.num_blocks * block_bytes / 1e9 / median for median in medians)


@dataclass(frozen=True)
class Table:
    """Contenders that take turns, blocks of one size, and the rows."""

    title: str
    block_bytes: int
    num_blocks: int
    num_positions: int
    contenders: Sequence[Contender]
    measurements: Sequence[Measurement]


def name_of(block_bytes: int) -> str:
    return f"{block_bytes >> 20} MiB" if block_bytes >= 1 << 20 else f"{block_bytes >> 10} KiB"


def here_measurements(size: str) -> list[Measurement]:
    """Rows of the same machine. What is published pushes out what could be fetched, so it comes last."""

    def row(unit: str, num_blocks: int, operation: str, num_clients: int = 1) -> Measurement:
        what = f"{size}: {operation} {num_blocks} block" + ("s" if num_blocks > 1 else ", p50")
        what += ", two clients" if num_clients > 1 else ""
        return Measurement(unit, num_blocks, operation, (Own(what, operation),), num_clients)

    fetches = [row("GB/s", 16, "fetch"), row("GB/s", 16, "fetch", 2), row("us", 1, "fetch")]
    return [*fetches, row("us", 1, "publish"), row("GB/s", 16, "publish"), row("GB/s", 16, "publish", 2)]


def wire_measurements(size: str) -> list[Measurement]:
    rows = []
    for operation, how in (("receive", "as received"), ("copy", "into the engine")):
        what = f"{size}: 16 blocks over TCP, {how}"
        own = (Own(what, operation), Own(f"{what}, encrypted", operation, ENCRYPTED))
        rows.append(Measurement("GB/s", 16, operation, own))
    both = Own(f"{size}: 16 blocks over TCP, into the engine, two clients", "copy")
    return [*rows, Measurement("GB/s", 16, "copy", (both,), 2)]


def look_up_measurements() -> list[Measurement]:
    return [
        Measurement("us", n, "exist", (Own(f"locate {n} blocks", "locate"), Own(f"match {n} blocks", "match")))
        for n in (64, 512)
    ]


def tables(args: argparse.Namespace) -> list[Table]:
    found = []
    for kib in args.size_kib:
        size, num_blocks = name_of(kib << 10), POOL_BYTES // (kib << 10)
        pool = (kib << 10, num_blocks, num_blocks)
        here, wire = here_contenders(args), wire_contenders(args)
        found.append(Table(f"same machine, {size} blocks", *pool, here, here_measurements(size)))
        found.append(Table(f"over TCP, {size} blocks", *pool, wire, wire_measurements(size)))
    contenders = look_up_contenders(args)
    looked_up = (LOOKED_UP_BYTES, LOOKED_UP_BLOCKS, 64)
    found.append(Table(f"look-up in {LOOKED_UP_BLOCKS} blocks", *looked_up, contenders, look_up_measurements()))
    return [chosen for table in found if (chosen := choose(table, args.rows, args.quick)).measurements]


def choose(table: Table, pattern: re.Pattern[str], is_quick: bool) -> Table:
    """With those rows alone whose names have the pattern."""
    measurements = []
    for one in table.measurements:
        own = tuple(own for own in one.own if pattern.search(own.row))
        if own and not (is_quick and one.num_clients > 1):
            measurements.append(Measurement(one.unit, one.num_blocks, one.operation, own, one.num_clients))
    used = {own.contender for one in measurements for own in one.own} | {"baton"}
    contenders = [one for one in table.contenders if one.name in used or not one.name.startswith("baton")]
    return Table(table.title, table.block_bytes, table.num_blocks, table.num_positions, contenders, measurements)


def here_contenders(args: argparse.Namespace) -> list[Contender]:
    options = ("process", "shm")
    peers = [mooncake(args, option) for option in options] if "mooncake" in args.peer else []
    peers += [lmcache(args)] if "lmcache" in args.peer else []
    if "memcpy" in args.peer:
        peers.append(Contender("memcpy", "benchmarks.kvstore_memcpy", joins="baton"))
    return [baton(), *both_ways(peers, args.quick)]


def wire_contenders(args: argparse.Namespace) -> list[Contender]:
    peers = [mooncake(args, "tcp")] if "mooncake" in args.peer else []
    wires = [name for name in ("redis", "pyzmq", "tcp") if name in args.peer]
    peers += [Contender(name, "benchmarks.kvstore_wires", name) for name in wires]
    return [baton(), Contender(ENCRYPTED, "benchmarks.kvstore_baton", "encrypted"), *both_ways(peers, args.quick)]


def look_up_contenders(args: argparse.Namespace) -> list[Contender]:
    peers = [mooncake(args, "tcp")] if "mooncake" in args.peer else []
    return [baton(), *peers, *([lmcache(args)] if "lmcache" in args.peer else [])]


def baton() -> Contender:
    return Contender("baton", "benchmarks.kvstore_baton")


def mooncake(args: argparse.Namespace, option: str) -> Contender:
    """Its package asks for libraries that install_peers.sh has put beside it."""
    folder = args.peers.absolute()
    libraries = [*folder.glob("debian/**/x86_64-linux-gnu"), *folder.glob("mooncake/lib/*/site-packages/nvidia/*/lib")]
    extra = {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "MC_TCP_BIND_ADDRESS": "127.0.0.1"}
    python = str(folder / "mooncake/bin/python")
    return Contender(f"mooncake, {option}", "benchmarks.kvstore_mooncake", option, python, extra)


def lmcache(args: argparse.Namespace) -> Contender:
    """One thread a client, as all others; it would say at length that it evicts."""
    python = str(args.peers.absolute() / "lmcache/bin/python")
    extra = {"OMP_NUM_THREADS": "1", "LMCACHE_LOG_LEVEL": "ERROR"}
    return Contender("lmcache", "benchmarks.kvstore_lmcache", "", python, extra)


def both_ways(peers: Iterable[Contender], is_quick: bool) -> list[Contender]:
    """Each as it is, and with non-temporal stores; of a bare socket all copies are the kernel's."""
    found = []
    for peer in peers:
        found += [peer] if is_quick or peer.name == "tcp" else [peer, peer.non_temporal()]
    return found


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
    parser.add_argument("--peers", type=Path, help="the folder that install_peers.sh was given")
    parser.add_argument("--size-kib", type=int, nargs="+", choices=SIZES_KIB, help="of the blocks; default: all")
    parser.add_argument("--turns", type=int, help=f"that count, after one to warm up; default {TURNS}")
    parser.add_argument("--quick", action="store_true", help="1 MiB blocks, short turns, no two clients, no nt")
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="a regular expression: only such rows")
    parser.add_argument("--json", type=Path, help="append the lines to this file, behind one about the run")
    args = parser.parse_args(argv)
    environments = [name for name in PEERS[:2] if args.peers and (args.peers / name / "bin" / "python").exists()]
    can_be = [*environments, *PEERS[2:]]
    args.peer = [] if args.peer == "none" else args.peer.split(",") if args.peer else can_be
    if not set(PEERS).issuperset(args.peer):
        parser.error(f"--peer takes {', '.join(PEERS)}, separated by commas, or none")
    if not set(can_be).issuperset(args.peer):
        missing = ", ".join(name for name in args.peer if name not in can_be)
        parser.error(f"--peer {missing} needs the --peers folder that install_peers.sh was given")
    args.size_kib = args.size_kib or ([1024] if args.quick else SIZES_KIB)
    args.turns = args.turns or (QUICK_TURNS if args.quick else TURNS)
    return args


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all processes and folders go too
    said: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    for table in tables(args):
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
