"""`baton serve` and `baton down`: a cluster in the foreground, and its end."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping

from deploy import logs
from deploy.config import ClusterConfig, DeployError, temp_base
from deploy.metrics_targets import TargetsFile
from deploy.scale import Mailbox, Request
from deploy.serve_arguments import config_from
from deploy.start_bar import StartBar
from deploy.state import ServeState, StateDir, start_ticks
from deploy.status import http_urls
from deploy.terminal import say, show
from kvstore.directory import Directory
from kvstore.errors import DirectoryUnavailable

WATCH_S = 1.0
POLL_S = 0.1
DOWN_TIMEOUT_S = 60.0


def serve(args: argparse.Namespace) -> int:
    """Runs a cluster until SIGINT, SIGTERM or SIGHUP, which nohup spares it."""
    begin = time.monotonic()
    config, interrupt = config_from(args), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: interrupt.set())
    if config.log_format == "json":
        sys.stderr = logs.JsonLines(sys.stderr)  # what Ray forwards and what is said comes there, too
    logs.configure(config.log_level, config.log_format)
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
    mailbox.clear()
    state = ServeState(
        pid=os.getpid(),
        start_ticks=start_ticks(os.getpid()),
        cluster=config.cluster,
        cluster_id=cluster.cluster_id,
        model=config.model_name,
        redis_url="",
        bases=(str(temp_base()), str(config.store_base)),
        has_tls=config.locks.tls_cert is not None,
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
        addresses = " ".join([*cluster.routers, *http_urls(cluster.router_http, state.has_tls)])
        show(f"ready: {config.model_name} at {addresses} ({nodes}) after {time.monotonic() - begin:.1f} s")
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
    """Tells of nodes that come and go until someone interrupts. Beside that, on a thread, as a drain takes minutes,
    `work` is done again and again; it is over when this returns."""
    directory = Directory(redis_url, cluster)
    working = asyncio.create_task(_keep_working(work, interrupt))
    try:
        await _tell(directory, interrupt, targets)
    finally:
        interrupt.set()  # to `work`, where it was a failure that ended this
        await working
        await directory.close()


async def _keep_working(work: Callable[[], None], interrupt: threading.Event) -> None:
    try:
        while not interrupt.is_set():
            await asyncio.to_thread(work)
            await asyncio.sleep(POLL_S)
    finally:
        interrupt.set()  # a failure ends the watch: half of it would go unseen


async def _tell(directory: Directory, interrupt: threading.Event, targets: TargetsFile) -> None:
    known: dict[str, str] = {}
    due, is_heard = 0.0, True
    while not interrupt.is_set():
        if time.monotonic() >= due:
            due = time.monotonic() + WATCH_S
            try:
                known = await _look(directory, targets, known)
            except DirectoryUnavailable:  # the nodes go on without it, and so does the watch
                if is_heard:
                    say("Redis does not answer: requests go on, but nobody hears of blocks and nodes that are new")
                is_heard = False
            else:
                if not is_heard:
                    say("Redis answers again")
                is_heard = True
        await asyncio.sleep(POLL_S)


async def _look(directory: Directory, targets: TargetsFile, known: Mapping[str, str]) -> dict[str, str]:
    """Tells of what has changed since `known`, and returns what is known now; as in `changes`."""
    nodes = await directory.nodes()
    targets.update(nodes, await directory.arenas() if targets.is_kept else ())
    now = {node.node_id: node.incarnation for node in nodes}
    for line in changes(known, now):
        say(line)
    return dict.fromkeys(known, "") | now


def changes(known: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What happened to nodes, in words; both map node ids to incarnations, "" for a node that is away."""
    gone = [f"{node_id} is gone" for node_id, incarnation in known.items() if incarnation and node_id not in now]
    back = [f"{node_id} is back" for node_id in now if node_id in known and known[node_id] != now[node_id]]
    return gone + back


def down(args: argparse.Namespace) -> int:
    state_dir = StateDir(args.state_dir)
    if state_dir.read() is not None and not state_dir.alive():
        gone = state_dir.sweep()
        say(f"no cluster is up; removed what a killed one had left: {', '.join(map(str, gone)) or 'nothing'}")
        return 0
    state_dir.ask_to_stop(DOWN_TIMEOUT_S)
    say("down")
    return 0
