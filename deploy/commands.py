"""The subcommands of `baton`. Each is a function in a module of its own; here are only names and help."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable

from deploy import admin, client, config_cli, explain, keys, kv, scale, serve, serve_arguments, size, status
from deploy.state import add_state_argument
from loadtest import bench, compare, flags, plan, simulate

Command = Callable[[argparse.Namespace], int]


def _bench(args: argparse.Namespace) -> int:
    if args.backend == "grpc":  # over HTTP the server may be anybody's: it must be named
        args.address = client.address_from(args)
    args.api_key = client.api_key_from(args)
    return bench.run(args)


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_arguments(parser)
    add_state_argument(parser)
    further = parser.add_subparsers(metavar="report", title="results that are there")
    words = "lay results of runs side by side, in one page"
    report = further.add_parser("report", help=words, description=words[0].upper() + words[1:] + ".")
    compare.add_arguments(report)
    report.set_defaults(command=compare.run)


def _version() -> str:
    try:
        return importlib.metadata.version("baton")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "unknown"


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="baton",
        description="Disaggregated prefill/decode serving of large language models.",
        epilog="First `baton serve MODEL`, then, from another terminal, `baton chat`. Of each: baton COMMAND --help.",
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, arguments: Callable[[argparse.ArgumentParser], None], words: str) -> None:
        sub = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
        arguments(sub)
        sub.set_defaults(command=command, parser=sub)

    add("serve", serve.serve, serve_arguments.add_serve_arguments, "start a cluster and run it in the foreground")
    add("config", config_cli.check, config_cli.add_arguments, "check or show a file for `baton serve --config`")
    add("status", status.status, status.add_status_arguments, "show the nodes and arenas of the cluster that is up")
    add("kv", kv.run, kv.add_arguments, "show and change what the stores hold: stats, ls, inspect, evict, drain")
    add("nodes", admin.nodes, admin.add_nodes_arguments, "show the nodes as a router sees them")
    add("drain", admin.drain, admin.add_drain_arguments, "make a node refuse new requests, or take them again")
    add("key", keys.key, keys.add_key_arguments, "make an API key or an admin key")
    add("scale", scale.run, scale.add_arguments, "add nodes to the cluster that is up, or drain and remove some")
    add("down", serve.down, add_state_argument, "stop the cluster that is up")
    add("generate", client.generate, client.add_generate_arguments, "send one prompt and stream the answer")
    add("chat", client.chat, client.add_chat_arguments, "talk to the model, turn by turn")
    add("explain", explain.explain, explain.add_explain_arguments, "show why a request went where it went")
    add("bench", _bench, _add_bench_arguments, "measure a router under load")
    add("simulate", simulate.run, simulate.add_arguments, "run a trace through a cluster under a virtual clock")
    add("plan", plan.run, plan.add_arguments, "find how many of N GPUs should prefill and how many decode")
    add("size", size.size, size.add_arguments, "count what a model takes of a GPU's memory, and its KV of the network")
    return whole
