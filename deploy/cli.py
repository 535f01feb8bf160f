"""The `baton` command. Each subcommand is a function in a module of its own; here are only names, help and errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from deploy import client, explain, kv, scale, serve
from deploy.config import DeployError
from loadtest import bench, plan, simulate

Command = Callable[[argparse.Namespace], int]

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. What goes wrong is one line on standard error."""
    args = _parser().parse_args(argv)
    command: Command = args.command
    try:
        return command(args)
    except DeployError as error:
        print(f"baton: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _bench(args: argparse.Namespace) -> int:
    args.address = client.address_from(args)
    args.api_key = client.api_key_from(args)
    return bench.run(args)


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    bench.add_arguments(parser)
    serve.add_state_argument(parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton", description="Disaggregated prefill/decode serving")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, arguments: Callable[[argparse.ArgumentParser], None], words: str) -> None:
        sub = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
        arguments(sub)
        sub.set_defaults(command=command)

    add("serve", serve.serve, serve.add_serve_arguments, "start a cluster and run it in the foreground")
    add("status", serve.status, serve.add_status_arguments, "show the nodes and arenas of the cluster that is up")
    add("kv", kv.run, kv.add_arguments, "show and change what the stores hold: stats, ls, inspect, evict, drain")
    add("scale", scale.run, scale.add_arguments, "add nodes to the cluster that is up, or drain and remove some")
    add("down", serve.down, serve.add_state_argument, "stop the cluster that is up")
    add("generate", client.generate, client.add_generate_arguments, "send one prompt and stream the answer")
    add("chat", client.chat, client.add_chat_arguments, "talk to the model, turn by turn")
    add("explain", explain.explain, explain.add_explain_arguments, "show why a request went where it went")
    add("bench", _bench, _add_bench_arguments, "measure a router under load")
    add("simulate", simulate.run, simulate.add_arguments, "run a trace through a cluster under a virtual clock")
    add("plan", plan.run, plan.add_arguments, "find how many of N GPUs should prefill and how many decode")
    return parser


if __name__ == "__main__":
    sys.exit(main())
