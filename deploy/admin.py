"""`baton nodes` and `baton drain`: what a router's operator sees and does, through its admin port."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import grpc
from rich.box import SIMPLE_HEAD
from rich.table import Table

from batonpb import admin_pb2, admin_pb2_grpc
from deploy.channel import add_tls_arguments, open_channel, tls_from
from deploy.client import NEEDS_TLS, checked_key
from deploy.config import DeployError
from deploy.state import StateDir, add_state_argument
from deploy.terminal import console

ADMIN_KEY_VARIABLE = "BATON_ADMIN_KEY"
TIMEOUT_S = 10.0


def add_nodes_arguments(parser: argparse.ArgumentParser) -> None:
    _add_door_arguments(parser)


def add_drain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("node_id", metavar="NODE", help="as `baton nodes` names it")
    parser.add_argument("--undo", action="store_true", help="it is to take requests again")
    _add_door_arguments(parser)


def nodes(args: argparse.Namespace) -> int:
    answer: admin_pb2.ListNodesResponse = _call(args, "ListNodes", admin_pb2.ListNodesRequest())
    console().print(node_table(answer.nodes))
    return 0


def drain(args: argparse.Namespace) -> int:
    status: admin_pb2.NodeStatus = _call(
        args, "DrainNode", admin_pb2.DrainNodeRequest(node_id=args.node_id, undo=args.undo)
    )
    state = "drains" if status.draining else "takes requests"
    print(f"{status.node_id} {state}; {status.num_running} running, {status.num_waiting} waiting at its last heartbeat")
    return 0


def node_table(nodes: Sequence[admin_pb2.NodeStatus]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in ("node", "role", "address", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("running", "waiting", "queued\ntokens", "free\nblocks", "legs of\nthis router"):
        table.add_column(name, justify="right")
    for node in nodes:
        state = "down" if node.down else "draining" if node.draining else "up"
        blocks = f"{node.free_blocks}/{node.total_blocks}"
        counts = (node.num_running, node.num_waiting, node.queued_prefill_tokens, blocks, node.num_legs)
        table.add_row(node.node_id, node.role, node.address, state, *map(str, counts))
    return table


def _add_door_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default="",
        metavar="HOST:PORT",
        help="of an admin port; default: that of the cluster that is up",
    )
    parser.add_argument(
        "--admin-key",
        default="",
        metavar="KEY",
        help=f"where one is asked for; default: {ADMIN_KEY_VARIABLE}",
    )
    add_tls_arguments(parser)
    add_state_argument(parser)


def _call(args: argparse.Namespace, method: str, request: Any) -> Any:
    """Raises `DeployError`."""
    key = checked_key(args.admin_key or os.environ.get(ADMIN_KEY_VARIABLE, ""))
    metadata = (("authorization", f"Bearer {key}"),) if key else None
    with open_channel(_address(args), tls_from(args)) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        try:
            return getattr(stub, method)(request, timeout=TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            raise DeployError(f"{error.code().name}: {error.details()}") from None


def _address(args: argparse.Namespace) -> str:
    if args.address:
        return str(args.address)
    state = StateDir(args.state_dir).running()
    if not state.routers:
        raise DeployError("the cluster is still starting")
    if state.has_tls and tls_from(args) is None:
        raise DeployError(NEEDS_TLS)
    addresses = [address for address in state.router_admins if address]
    if not addresses:
        raise DeployError("the cluster has no admin port: `baton serve --admin-port`")
    return addresses[0]
