"""What benchmarks/kvstore.py measures: its tables, the rows of each, and who takes part. Pure."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

POOL_BYTES = 256 << 20  # of a store's blocks, and of each client's own
SIZES_KIB = (256, 1024, 4096)
LOOKED_UP_BLOCKS, LOOKED_UP_BYTES = 8192, 4096
ENCRYPTED = "baton, encrypted"
ZEROMQ = "baton, ZeroMQ"
NON_TEMPORAL = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x40000"}
ENVIRONMENTS = ("mooncake", "lmcache")  # peers that install_peers.sh sets up
PEERS = (*ENVIRONMENTS, "memcpy", "redis", "pyzmq", "tcp")
LIMITS = ("memcpy", "pyzmq", "tcp")  # what Baton is to come near to, rather than to beat


@dataclass(frozen=True)
class Wanted:
    """What of it a run is to measure."""

    peers: Sequence[str]
    folder: Path  # of the peers' environments
    sizes_kib: Sequence[int] = SIZES_KIB
    rows: re.Pattern[str] = re.compile("")
    is_quick: bool = False


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
        return replace(self, name=f"{self.name}, nt", extra={**self.extra, **NON_TEMPORAL})


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
        own = (
            Own(what, operation),
            Own(f"{what}, by ZeroMQ", operation, ZEROMQ),
            Own(f"{what}, encrypted", operation, ENCRYPTED),
        )
        rows.append(Measurement("GB/s", 16, operation, own))
    both = Own(f"{size}: 16 blocks over TCP, into the engine, two clients", "copy")
    what = f"{size}: 1 block over TCP, as received, p50"
    one = (Own(what, "receive"), Own(f"{what}, by ZeroMQ", "receive", ZEROMQ))
    return [*rows, Measurement("GB/s", 16, "copy", (both,), 2), Measurement("us", 1, "receive", one)]


def look_up_measurements() -> list[Measurement]:
    own = ("locate", "count", "match")
    return [Measurement("us", n, "exist", tuple(Own(f"{one} {n} blocks", one) for one in own)) for n in (64, 512)]


def tables(wanted: Wanted) -> list[Table]:
    found = []
    for kib in wanted.sizes_kib:
        size, num_blocks = name_of(kib << 10), POOL_BYTES // (kib << 10)
        pool = (kib << 10, num_blocks, num_blocks)
        here, wire = here_contenders(wanted), wire_contenders(wanted)
        found.append(Table(f"same machine, {size} blocks", *pool, here, here_measurements(size)))
        found.append(Table(f"over TCP, {size} blocks", *pool, wire, wire_measurements(size)))
    contenders = look_up_contenders(wanted)
    looked_up = (LOOKED_UP_BYTES, LOOKED_UP_BLOCKS, 64)
    found.append(Table(f"look-up in {LOOKED_UP_BLOCKS} blocks", *looked_up, contenders, look_up_measurements()))
    return [chosen for table in found if (chosen := choose(table, wanted.rows, wanted.is_quick)).measurements]


def choose(table: Table, pattern: re.Pattern[str], is_quick: bool) -> Table:
    """With those rows alone whose names have the pattern."""
    measurements = []
    for one in table.measurements:
        own = tuple(own for own in one.own if pattern.search(own.row))
        if own and not (is_quick and one.num_clients > 1):
            measurements.append(replace(one, own=own))
    used = {own.contender for one in measurements for own in one.own} | {"baton"}
    contenders = [one for one in table.contenders if one.name in used or not one.name.startswith("baton")]
    return replace(table, contenders=contenders, measurements=measurements)


def here_contenders(wanted: Wanted) -> list[Contender]:
    options = ("process", "shm")
    peers = [mooncake(wanted, option) for option in options] if "mooncake" in wanted.peers else []
    peers += [lmcache(wanted)] if "lmcache" in wanted.peers else []
    if "memcpy" in wanted.peers:
        peers.append(Contender("memcpy", "benchmarks.kvstore_memcpy", joins="baton"))
    return [baton(), *both_ways(peers, wanted.is_quick)]


def wire_contenders(wanted: Wanted) -> list[Contender]:
    peers = [mooncake(wanted, "tcp")] if "mooncake" in wanted.peers else []
    wires = [name for name in ("redis", "pyzmq", "tcp") if name in wanted.peers]
    peers += [Contender(name, "benchmarks.kvstore_wires", name) for name in wires]
    others = [Contender(ZEROMQ, "benchmarks.kvstore_baton", "zeromq", joins="baton")]
    others.append(Contender(ENCRYPTED, "benchmarks.kvstore_baton", "encrypted"))
    return [baton(), *others, *both_ways(peers, wanted.is_quick)]


def look_up_contenders(wanted: Wanted) -> list[Contender]:
    peers = [mooncake(wanted, "tcp")] if "mooncake" in wanted.peers else []
    return [baton(), *peers, *([lmcache(wanted)] if "lmcache" in wanted.peers else [])]


def baton() -> Contender:
    return Contender("baton", "benchmarks.kvstore_baton")


def mooncake(wanted: Wanted, option: str) -> Contender:
    """Its package asks for libraries that install_peers.sh has put beside it."""
    folder = wanted.folder.absolute()
    libraries = [*folder.glob("debian/**/x86_64-linux-gnu"), *folder.glob("mooncake/lib/*/site-packages/nvidia/*/lib")]
    extra = {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "MC_TCP_BIND_ADDRESS": "127.0.0.1"}
    python = str(folder / "mooncake/bin/python")
    return Contender(f"mooncake, {option}", "benchmarks.kvstore_mooncake", option, python, extra)


def lmcache(wanted: Wanted) -> Contender:
    """One thread a client, as all others; it would say at length that it evicts."""
    python = str(wanted.folder.absolute() / "lmcache/bin/python")
    extra = {"OMP_NUM_THREADS": "1", "LMCACHE_LOG_LEVEL": "ERROR"}
    return Contender("lmcache", "benchmarks.kvstore_lmcache", "", python, extra)


def both_ways(peers: Iterable[Contender], is_quick: bool) -> list[Contender]:
    """Each as it is, and with non-temporal stores; of a bare socket all copies are the kernel's."""
    found = []
    for peer in peers:
        found += [peer] if is_quick or peer.name == "tcp" else [peer, peer.non_temporal()]
    return found
