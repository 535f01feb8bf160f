"""`baton serve`, `baton status` and `baton down`: a cluster in the foreground, and how others find it."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deploy.config import ClusterConfig, ConfigError, DeployError, parse_bytes, temp_base
from deploy.config_file import add_config_argument
from deploy.locks import add_lock_arguments, locks_from
from deploy.metrics_targets import TargetsFile
from deploy.redis_url import redis_url_from
from deploy.scale import Mailbox, Request
from deploy.start_bar import StartBar
from deploy.state import ServeState, StateDir, default_state_dir, start_ticks
from kvstore.directory import ArenaRecord, Directory, NodeRecord
from kvstore.errors import DirectoryUnavailable
from kvstore.eviction import ADMISSIONS, POLICIES
from router.policy import DEFAULT as DEFAULT_ROUTING
from router.policy import POLICIES as ROUTING

WATCH_S = 1.0
PARALLEL_SIZES = tuple(
    f"{role}{kind}_parallel_size" for kind in ("tensor", "pipeline") for role in ("", "prefill_", "decode_")
)
DOWN_TIMEOUT_S = 60.0
WIDTH = 120  # characters, where standard output is no terminal


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="a Hugging Face model folder")
    add_config_argument(parser)
    add = parser.add_argument_group("nodes").add_argument
    add("--prefill", type=int, metavar="N", help="prefill nodes (default 1, or 0 with --both)")
    add("--decode", type=int, metavar="N", help="decode nodes (default 1, or 0 with --both)")
    add("--both", type=int, default=0, metavar="N", help="nodes for both legs")
    for option, letter, what in (("tensor", "TP", "ranks, on one machine"), ("pipeline", "PP", "stages")):
        add(f"--{option}-parallel-size", type=int, default=1, metavar=letter, help=f"{what}, of each node (default 1)")
        for role in ("prefill", "decode"):
            name = f"--{role}-{option}-parallel-size"
            add(name, type=int, default=0, metavar=letter, help=f"likewise, of {role} nodes where theirs differ")
    add("--dtype", default="auto", help="float32, bfloat16 or float16; default: float32 on CPUs, else the model's")
    add("--block-size", type=int, default=16, metavar="TOKENS")
    add("--kv-memory", type=_bytes, default="256M", metavar="BYTES", help="KV cache of each rank (default 256M)")
    add("--store-memory", type=_bytes, default="256M", metavar="BYTES", help="arena of each machine (default 256M)")
    add("--store-dir", type=Path, default=Path("/dev/shm"), metavar="DIR", help="where arenas lie (default /dev/shm)")
    add(
        "--store-encryption",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="stores answer this cluster's nodes alone, and blocks go encrypted between machines (default); without,"
        " whoever reaches a store's port reads blocks",
    )
    add(
        "--store-tcp",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --no-store-encryption, blocks go over plain TCP (default), which is faster than ZeroMQ",
    )
    add("--store-eviction", choices=sorted(POLICIES), default="s3fifo", help="of arenas (default %(default)s)")
    add(
        "--store-disk-bytes", type=_bytes, default="0", metavar="BYTES", help="disk behind each arena (default 0: none)"
    )
    add(
        "--store-disk-admission",
        choices=sorted(ADMISSIONS),
        default="all",
        help="blocks that go to disk when they are evicted: all (default), or those that were asked for again after a"
        " while, which spares the disk and hits less",
    )
    add("--store-disk-dir", type=Path, metavar="DIR", help="where blocks on disk lie, also after the cluster stops")
    add("--max-model-len", type=int, default=0, metavar="TOKENS", help="default: the model's")
    add("--max-batched-tokens", type=int, default=512, metavar="TOKENS", help="in one step of a node (default 512)")
    add("--max-requests", type=int, default=64, metavar="N", help="at a time on one node (default 64)")
    add("--num-threads", type=int, default=0, metavar="N", help="of each node; default: cores / nodes of its machine")
    add(
        "--pin-cores",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each node computes on cores of its own (default, where a machine has a core for each thread)",
    )
    add("--served-model-name", default="", metavar="NAME", help="default: the folder's name")
    add = parser.add_argument_group("addresses").add_argument
    add("--host", default="127.0.0.1", help="that the router listens on (default 127.0.0.1)")
    add("--port", type=int, default=0, help="that the router listens on (default: the kernel chooses)")
    add(
        "--http",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="routers speak OpenAI's HTTP API, too (default), at a port of its own",
    )
    add("--http-port", type=int, default=0, metavar="PORT", help="of that API (default: the kernel chooses)")
    add(
        "--tenants",
        type=Path,
        metavar="FILE",
        help="TOML: who may use the router, by which key, and how much of each arena they get; without, everybody"
        " may, and all share one cache",
    )
    add(
        "--policy",
        choices=sorted(ROUTING),
        default=DEFAULT_ROUTING,
        help="how routers choose nodes (default %(default)s, by predicted seconds; the others are to compare with)",
    )
    add("--routers", type=int, default=1, metavar="N", help="the first one takes the ports given, the next one more")
    add("--redis-url", default="", metavar="URL", help="default: BATON_REDIS_URL, or an embedded Redis")
    add("--cluster", default="default", metavar="NAME", help="keeps clusters in one Redis apart")
    add("--ray-address", default="", metavar="HOST:PORT", help="a Ray that runs already; default: an own one")
    words = "Ray machines for prefill nodes, each by its address, name or custom resource; default: all"
    add("--prefill-hosts", type=_names, default=(), metavar="A,B", help=words)
    add("--decode-hosts", type=_names, default=(), metavar="A,B", help="Ray machines for decode nodes; default: all")
    add_lock_arguments(parser)
    add("--router-hosts", type=_names, default=(), metavar="A,B", help="Ray machines for routers; default: this one")
    add("--min-machines", type=int, default=0, metavar="N", help="wait at the start until so many may be used")
    add = parser.add_argument_group("running").add_argument
    add(
        "--metrics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each store, node and router shows /metrics to Prometheus at a port of its own (default; see `baton"
        " status`)",
    )
    add(
        "--metrics-port",
        type=int,
        default=0,
        metavar="PORT",
        help="of each machine's first server, its next ones take the next ports (default: the kernel chooses)",
    )
    add(
        "--metrics-targets",
        type=Path,
        metavar="FILE",
        help="kept up to date with all these addresses, for Prometheus' file_sd_configs",
    )
    add("--start-timeout", type=float, default=300.0, metavar="SECONDS")
    add("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    add_state_argument(parser)


def add_state_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=default_state_dir(),
        metavar="DIR",
        help="where `baton serve` leaves word for the other commands (default %(default)s)",
    )


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    add_state_argument(parser)
    parser.add_argument("--json", action="store_true", help="print records as JSON")


def config_from(args: argparse.Namespace) -> ClusterConfig:
    """Raises `ConfigError`."""
    if args.model is None:
        raise ConfigError("no MODEL: name its folder on the command line, or as `model` in the --config file")
    default = 0 if args.both else 1
    return ClusterConfig(
        model_dir=args.model,
        prefill=default if args.prefill is None else args.prefill,
        decode=default if args.decode is None else args.decode,
        both=args.both,
        **{name: getattr(args, name) for name in PARALLEL_SIZES},
        routers=args.routers,
        policy=args.policy,
        host=args.host,
        port=args.port,
        http=args.http,
        http_port=args.http_port,
        cluster=args.cluster,
        redis_url=_redis_url(args),
        ray_address=args.ray_address,
        served_model_name=args.served_model_name,
        tenants_file=args.tenants,
        locks=locks_from(args),
        dtype=args.dtype,
        block_size=args.block_size,
        kv_bytes=args.kv_memory,
        store_bytes=args.store_memory,
        store_base=args.store_dir,
        store_encryption=args.store_encryption,
        store_tcp=args.store_tcp,
        store_eviction=args.store_eviction,
        store_disk_bytes=args.store_disk_bytes,
        store_disk_admission=args.store_disk_admission,
        store_disk_dir=args.store_disk_dir,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_batched_tokens,
        max_num_requests=args.max_requests,
        num_threads=args.num_threads,
        pin_cores=args.pin_cores,
        metrics=args.metrics,
        metrics_port=args.metrics_port,
        prefill_hosts=args.prefill_hosts,
        decode_hosts=args.decode_hosts,
        router_hosts=args.router_hosts,
        min_machines=args.min_machines,
        start_timeout_s=args.start_timeout,
        log_level=args.log_level,
    )


def serve(args: argparse.Namespace) -> int:
    """Runs a cluster until SIGINT, SIGTERM or SIGHUP."""
    begin = time.monotonic()
    config, interrupt = config_from(args), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: interrupt.set())
    logging.basicConfig(stream=sys.stderr, level=config.log_level.upper(), format="%(levelname)s %(message)s")
    state_dir = StateDir(args.state_dir)
    state_dir.claim()
    try:
        targets = TargetsFile(args.metrics_targets, config.cluster)
        return _serve(config, interrupt, state_dir, begin, targets)
    finally:
        state_dir.release()


def _serve(
    config: ClusterConfig, interrupt: threading.Event, state_dir: StateDir, begin: float, targets: TargetsFile
) -> int:
    from deploy.launch import Cluster  # ray, which no other command needs

    bar, mailbox = StartBar(len(config.roles)), Mailbox(state_dir.folder)
    cluster = Cluster(config, say, interrupt, bar.show)
    state = ServeState(
        pid=os.getpid(),
        start_ticks=start_ticks(os.getpid()),
        cluster=config.cluster,
        cluster_id=cluster.cluster_id,
        model=config.model_name,
        redis_url="",
        bases=(str(temp_base()), str(config.store_base)),
    )
    state_dir.write(state)
    with bar:
        cluster.start()
    try:
        state = dataclasses.replace(state, redis_url=cluster.redis_url, wire_key=cluster.wire_key)
        state = dataclasses.replace(state, router_metrics=cluster.router_metrics, router_http=cluster.router_http)
        state = dataclasses.replace(state, routers=cluster.routers, router_admins=cluster.router_admins)
        state_dir.write(state)
        nodes = f"{config.prefill} prefill, {config.decode} decode, {config.both} both"
        addresses = " ".join([*cluster.routers, *http_urls(cluster.router_http)])
        print(f"ready: {config.model_name} at {addresses} ({nodes}) after {time.monotonic() - begin:.1f} s", flush=True)
        targets.routers = cluster.router_metrics

        def scale(request: Request) -> list[str]:
            return cluster.scale(request.apply(cluster.config))

        asyncio.run(_watch(cluster.redis_url, config.cluster, interrupt, targets, lambda: mailbox.serve(scale)))
    finally:
        say("stopping")
        targets.clear()
        left = cluster.stop()
    if left:
        raise DeployError("could not remove: " + ", ".join(left))
    say("stopped, nothing left behind")
    return 0


async def _watch(
    redis_url: str, cluster: str, interrupt: threading.Event, targets: TargetsFile, work: Callable[[], None]
) -> None:
    """Tells of nodes that come and go, and does `work` now and then, until someone interrupts."""
    directory = Directory(redis_url, cluster)
    known: dict[str, str] = {}
    due = 0.0
    while not interrupt.is_set():
        work()
        if time.monotonic() >= due:
            due = time.monotonic() + WATCH_S
            try:
                nodes = await directory.nodes()
                now = {node.node_id: node.incarnation for node in nodes}
                targets.update(nodes, await directory.arenas() if targets.is_kept else ())
            except DirectoryUnavailable:
                continue  # the nodes go on without Redis, and so does the watch
            for line in changes(known, now):
                say(line)
            known |= now
            known |= {node_id: "" for node_id in known if node_id not in now}
        await asyncio.sleep(0.1)
    await directory.close()


def changes(known: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What happened to nodes, in words; both map node ids to incarnations, "" for a node that is away."""
    gone = [f"{node_id} is gone" for node_id, incarnation in known.items() if incarnation and node_id not in now]
    back = [f"{node_id} is back" for node_id in now if node_id in known and known[node_id] != now[node_id]]
    return gone + back


def status(args: argparse.Namespace) -> int:
    state = StateDir(args.state_dir).running()
    if not state.routers:
        say(f"pid {state.pid} is starting {state.model}")
        return 0
    nodes, arenas = asyncio.run(_members(state))
    if args.json:
        members = {"nodes": [*map(dataclasses.asdict, nodes)], "arenas": [*map(dataclasses.asdict, arenas)]}
        routers = {"routers": state.routers, "router_http": state.router_http, "router_metrics": state.router_metrics}
        print(json.dumps({"pid": state.pid, "model": state.model} | routers | members))
        return 0
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    addresses = " ".join([*state.routers, *http_urls(state.router_http)])
    console.print(f"{state.model} at {addresses} (pid {state.pid})", highlight=False)
    if any(state.router_metrics):
        console.print(f"metrics at {' '.join(filter(None, state.router_metrics))}", highlight=False)
    console.print(node_table(nodes))
    console.print(arena_table(arenas))
    return 0


def down(args: argparse.Namespace) -> int:
    state_dir = StateDir(args.state_dir)
    if state_dir.read() is not None and not state_dir.alive():
        gone = state_dir.sweep()
        say(f"no cluster is up; removed what a killed one had left: {', '.join(map(str, gone)) or 'nothing'}")
        return 0
    state_dir.ask_to_stop(DOWN_TIMEOUT_S)
    say("down")
    return 0


async def _members(state: ServeState) -> tuple[list[NodeRecord], list[ArenaRecord]]:
    directory = Directory(state.redis_url, state.cluster)
    try:
        return await directory.nodes(), await directory.arenas()
    except DirectoryUnavailable as error:
        raise DeployError(f"the cluster's Redis does not answer: {error}") from None
    finally:
        await directory.close()


def node_table(nodes: Sequence[NodeRecord]) -> Table:
    table = Table(title="nodes", title_justify="left", box=SIMPLE_HEAD)
    for name in ("node", "role", "address", "incarnation"):
        table.add_column(name, no_wrap=True)
    for name in ("running", "waiting", "queued\ntokens", "free\nblocks", "arena", "metrics"):
        table.add_column(name, justify="right")
    for node in sorted(nodes, key=lambda node: node.node_id):
        table.add_row(
            node.node_id + (" (draining)" if node.draining else ""),
            node.role,
            node.address,
            node.incarnation[:8],
            str(node.num_running),
            str(node.num_waiting),
            str(node.queued_prefill_tokens),
            f"{node.free_blocks}/{node.total_blocks}",
            node.arena_id[:8] or "none",
            _port(node.metrics_address),
        )
    return table


def arena_table(arenas: Sequence[ArenaRecord]) -> Table:
    table = Table("arena", "machine", "address", title="arenas", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("used slots", justify="right")
    table.add_column("size", justify="right")
    table.add_column("metrics", justify="right")
    for arena in sorted(arenas, key=lambda arena: arena.host):
        used = f"{arena.num_slots - arena.free_slots}/{arena.num_slots}"
        size = f"{arena.num_slots * arena.slot_bytes / 2**20:.0f} MiB"
        name = arena.arena_id[:8] + (" (draining)" if arena.draining else "")
        table.add_row(name, arena.host, arena.address, used, size, _port(arena.metrics_address))
    return table


def http_urls(addresses: Sequence[str]) -> list[str]:
    """What OpenAI's clients call their base URL, of each router that has one."""
    return [f"http://{address}/v1" for address in addresses if address]


def _port(address: str) -> str:
    """`:9100` of "10.0.0.1:9100": the host is that of the row's own address. JSON has the whole."""
    return f":{address.rpartition(':')[2]}" if address else "none"


def say(line: str) -> None:
    """A progress line. Standard output is kept for answers."""
    print(f"baton: {line}", file=sys.stderr, flush=True)


def _redis_url(args: argparse.Namespace) -> str:
    """Raises `ConfigError`."""
    try:
        return redis_url_from(args.redis_url, "--redis-url")
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except DeployError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
