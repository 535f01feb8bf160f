"""`baton simulate`: a trace through a simulated cluster. Arguments and printing around the pure parts."""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from loadtest.trace import GRAIN_S, BadTrace, TracedRequest, make_trace, read_trace

if TYPE_CHECKING:
    from loadtest.sim_config import SimConfig

_OK, _NOT_RUN = 0, 2


class SimulateError(Exception):
    """The run cannot be made; the message says why."""


def number(kind: type[int] | type[float], low: float) -> Any:
    """An argparse type: a number of at least `low`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= 1e9:
            raise argparse.ArgumentTypeError(f"must be {low:g} to 1e9, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments shared by `simulate` and `plan`: requests, machine, limits."""
    count, natural, positive = number(int, 1), number(int, 0), number(float, 1e-6)
    add = parser.add_argument
    add("trace", nargs="?", metavar="TRACE", help="a file in Mooncake's format, a JSON object a line")
    add("--generate", type=count, metavar="N", help="in place of a file: N requests of the same shape")
    add("--limit", type=count, metavar="N", help="only the first N requests")
    add("--machine", default="8xA100", metavar="NAME", help="8xA100, 8xH100 or a .json file of measurements")
    add("--arena-blocks", type=count, default=5860, metavar="N", help="of each node, 512 tokens each (default 5860)")
    add("--eviction", default="lru", metavar="NAME", help="lru or s3fifo (default lru)")
    add("--ttft-slo-s", type=positive, metavar="S", help="reject what would come later; no limit by default")
    add("--tpot-slo-ms", type=positive, metavar="MS", help="and what would come more slowly")
    add(
        "--queue",
        default="shortest",
        metavar="NAME",
        help="order of a node's prompts: shortest or fcfs (default shortest)",
    )
    add("--chunk-tokens", type=count, default=512, metavar="N", help="of a colocated node's step (default 512)")
    add("--seed", type=natural, default=0, metavar="S", help="of jitter, generator and policy (default 0)")
    add("--json", metavar="FILE", help="also write all figures there")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `baton simulate`."""
    natural, positive = number(int, 0), number(float, 1e-6)
    add_trace_arguments(parser)
    add = parser.add_argument
    add("--policy", nargs="+", default=["predict"], metavar="NAME", help="one or several, or all (default predict)")
    add("--prefill", type=natural, default=8, metavar="N", help="prefill nodes (default 8)")
    add("--decode", type=natural, default=8, metavar="N", help="decode nodes (default 8)")
    add("--both", type=natural, default=0, metavar="N", help="colocated nodes: prompts in chunks (default 0)")
    add("--scale", type=positive, nargs="+", default=[1.0], metavar="X", help="speed of the trace: one or several")
    add(
        "--fault",
        action="append",
        default=[],
        metavar="F",
        help="kill:NODE@S, drain:NODE@S, join:ROLE@S, slow:NODE*X@S",
    )
    add("--plots", metavar="FOLDER", help="also draw there; needs the extra `plots`")


def run(args: argparse.Namespace) -> int:
    """Runs each policy at each scale. 0: done; 2: it could not be run."""
    try:
        return _run(args)
    except (SimulateError, BadTrace, OSError) as error:
        print(f"baton simulate: {error}", file=sys.stderr)
        return _NOT_RUN


def _run(args: argparse.Namespace) -> int:
    from loadtest import sim_plots, sim_report
    from loadtest.sim_faults import BadFault
    from loadtest.simulator import Simulator
    from router.policy import POLICIES

    policies = list(POLICIES) if args.policy == ["all"] else args.policy
    check_choice("--policy", policies, [*POLICIES, "all"])
    if not (args.both or (args.prefill and args.decode)):
        raise SimulateError("--prefill and --decode must be at least 1 each, or --both")
    config, runs = config_from(args), []
    for scale in args.scale:
        requests = requests_from(args, scale)
        for policy in policies:
            name = policy if len(args.scale) == 1 else f"{policy} x{scale:g}"
            try:
                jobs = Simulator(replace(config, policy=policy)).run(requests)
            except BadFault as error:
                raise SimulateError(str(error)) from error
            found = sim_report.figures(jobs, config.ttft_limit_s, config.tpot_limit_s)
            runs.append({"name": name, "policy": policy, "scale": scale, **found})
    print_table(sim_report.table(f"{len(requests)} requests, {describe(args)}", runs))
    write_json(args, {"cluster": described(args), "runs": runs})
    if args.plots:
        try:
            for path in sim_plots.draw(runs, Path(args.plots)):
                print(path)
        except sim_plots.NoPlots as error:
            raise SimulateError(str(error)) from error
    return _OK


def requests_from(args: argparse.Namespace, scale: float = 1.0) -> list[TracedRequest]:
    """The trace given by the arguments, sped up. Raises `SimulateError`, `BadTrace`, OSError."""
    if bool(args.trace) == bool(args.generate):
        raise SimulateError("name a TRACE, or how many requests to make with --generate N")
    rng = random.Random(args.seed)
    if args.generate:
        requests = [request.faster(scale) for request in make_trace(args.generate, rng)]
    else:
        requests = read_trace(Path(args.trace), rng, GRAIN_S, scale)
    if not requests:
        raise SimulateError(f"{args.trace}: no requests in it")
    return requests[: args.limit]


def config_from(args: argparse.Namespace) -> SimConfig:
    """The cluster that the arguments describe. Raises `SimulateError`."""
    from kvstore.eviction import POLICIES as EVICTION
    from loadtest.machines import BadMachine, find_machine
    from loadtest.sim_config import SimConfig
    from loadtest.sim_faults import BadFault, Fault
    from loadtest.sim_nodes import QUEUES

    check_choice("--eviction", [args.eviction], EVICTION)
    check_choice("--queue", [args.queue], QUEUES)
    try:
        machine = find_machine(args.machine)
        faults = tuple(Fault.parse(text) for text in getattr(args, "fault", []))
    except (BadMachine, BadFault) as error:
        raise SimulateError(str(error)) from error
    return SimConfig(
        machine=machine,
        prefill=getattr(args, "prefill", 0),
        decode=getattr(args, "decode", 0),
        both=getattr(args, "both", 0),
        arena_blocks=args.arena_blocks,
        eviction=args.eviction,
        queue=args.queue,
        chunk_tokens=args.chunk_tokens,
        ttft_limit_s=args.ttft_slo_s,
        tpot_limit_s=None if args.tpot_slo_ms is None else args.tpot_slo_ms / 1e3,
        faults=faults,
        seed=args.seed,
    )


def check_choice(option: str, chosen: list[str], known: Any) -> None:
    for name in chosen:
        if name not in known:
            raise SimulateError(f"{option} must be one of {', '.join(known)}, got {name!r}")


def described(args: argparse.Namespace) -> dict[str, Any]:
    """All arguments that change a figure."""
    left_out = {"command", "parser", "json", "plots", "policy", "scale"}
    return {name: value for name, value in sorted(vars(args).items()) if name not in left_out}


def describe(args: argparse.Namespace) -> str:
    parts = [f"{getattr(args, role)} {role}" for role in ("prefill", "decode", "both") if getattr(args, role, 0)]
    return f"{' + '.join(parts)} nodes of {args.machine}, {args.eviction} of {args.arena_blocks} blocks"


def print_table(grid: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 150).print(grid)


def write_json(args: argparse.Namespace, data: dict[str, Any]) -> None:
    if args.json:
        Path(args.json).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
