"""`baton explain`: why a request went where it went, as the router that had it tells."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import grpc
from google.protobuf.json_format import MessageToJson
from rich.box import SIMPLE_HEAD
from rich.table import Table

from batonpb import inference_pb2
from deploy.channel import tls_from
from deploy.client import Client, RequestFailed, add_router_arguments, address_from, api_key_from
from deploy.config import DeployError
from deploy.state import StateDir
from deploy.terminal import console

PREFILL_TERMS = ("queue_s", "room_s", "fetch_s", "compute_s", "stall_s", "cost_s")
DECODE_TERMS = ("step_s", "steps_s", "pressure_s", "cost_s")


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID", help="of one of the last 1,000 requests of a router")
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    add_router_arguments(parser)


def explain(args: argparse.Namespace) -> int:
    answer = _ask(_addresses(args), args)
    if args.json:
        print(MessageToJson(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return 0
    out = console()
    for number, decision in enumerate(answer.decisions, 1):
        out.print(f"decision {number} of {len(answer.decisions)}, by {decision.policy}: {verdict(decision)}")
        out.print(prefill_table(decision))
        out.print(decode_table(decision))
    if answer.ttft_s >= 0.0:
        out.print(f"TTFT was {answer.ttft_s:.3f} s, TPOT {1000 * answer.tpot_s:.1f} ms")
    return 0


def verdict(decision: inference_pb2.Decision) -> str:
    """What was decided, in one line."""
    size = f"{decision.num_tokens} tokens, {decision.num_hit_blocks} blocks cached, {decision.num_nodes} nodes"
    if decision.reason:
        return f"{size}; rejected, {decision.reason}"
    nodes = " then ".join(filter(None, (decision.prefill_node, decision.decode_node)))
    seconds = f"TTFT {decision.predicted_ttft_s:.3f} s, hand-off {decision.handoff_s:.3f} s"
    return f"{size}; {nodes}; predicted {seconds}, TPOT {1000 * decision.predicted_tpot_s:.1f} ms"


def prefill_table(decision: inference_pb2.Decision) -> Table:
    table = _table("first leg, seconds", (*PREFILL_TERMS, "hit blocks"))
    for node in decision.prefill:
        is_chosen = node.node_id == (decision.prefill_node or decision.decode_node)
        _add(table, node.node_id, is_chosen, [getattr(node, name) for name in PREFILL_TERMS], str(node.num_hit_blocks))
    return table


def decode_table(decision: inference_pb2.Decision) -> Table:
    table = _table("second leg, seconds", DECODE_TERMS)
    for node in decision.decode:
        is_chosen = node.node_id == decision.decode_node
        _add(table, node.node_id, is_chosen, [getattr(node, name) for name in DECODE_TERMS])
    return table


def _addresses(args: argparse.Namespace) -> Sequence[str]:
    """The router that was named, or all of the cluster that is up."""
    first = address_from(args)
    return [first] if args.address else StateDir(args.state_dir).running().routers


def _ask(addresses: Sequence[str], args: argparse.Namespace) -> inference_pb2.ExplainResponse:
    """The answer of whichever router had the request; another one may be away. Raises `DeployError`."""
    problem = DeployError(f"no router keeps a decision on request {args.request_id!r}")
    for address in addresses:
        with Client(address, api_key_from(args), tls_from(args)) as client:
            try:
                return client.explain(args.request_id)
            except RequestFailed as error:
                if error.code is not grpc.StatusCode.NOT_FOUND:
                    problem = error
    raise problem


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table("node", title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name.removesuffix("_s"), justify="right")
    return table


def _add(table: Table, node_id: str, is_chosen: bool, seconds: Sequence[float], *more: str) -> None:
    table.add_row(f"{'> ' if is_chosen else '  '}{node_id}", *(f"{value:.4f}" for value in seconds), *more)
