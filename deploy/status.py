"""`baton status`: the routers, nodes and arenas of the running cluster."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from deploy.config import DeployError
from deploy.state import ServeState, StateDir, add_state_argument
from deploy.terminal import console, say
from kvstore.directory import ArenaRecord, Directory, NodeRecord
from kvstore.errors import DirectoryUnavailable


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    add_state_argument(parser)
    parser.add_argument("--json", action="store_true", help="print records as JSON")


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
    out = console()
    addresses = " ".join([*state.routers, *http_urls(state.router_http, state.has_tls)])
    out.print(f"{state.model} at {addresses} (pid {state.pid})")
    if any(state.router_metrics):
        out.print(f"metrics at {' '.join(filter(None, state.router_metrics))}")
    out.print(node_table(nodes))
    out.print(arena_table(arenas))
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


def http_urls(addresses: Sequence[str], has_tls: bool = False) -> list[str]:
    """The base URL for OpenAI's clients, of each router that has one."""
    scheme = "https" if has_tls else "http"
    return [f"{scheme}://{address}/v1" for address in addresses if address]


def _port(address: str) -> str:
    """`:9100` of "10.0.0.1:9100", as the host is in the row's own address. JSON has the whole address."""
    return f":{address.rpartition(':')[2]}" if address else "none"
