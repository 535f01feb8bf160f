"""`baton plan`: how many of N GPUs should prefill and how many decode, for a trace and its limits.

Splits are simulated; the best has the highest goodput, and among equals the least mean TTFT. Colocated nodes are
a row of their own, and the answer if they are better.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loadtest.simulate import (
    SimulateError,
    add_trace_arguments,
    check_choice,
    config_from,
    described,
    number,
    print_table,
    requests_from,
    write_json,
)
from loadtest.trace import BadTrace

if TYPE_CHECKING:
    from loadtest.sim_config import SimConfig

GPUS_A_NODE = 8
MAX_SPLITS = 16  # that are simulated; of more, evenly spaced ones and then those beside the best
_OK, _NOT_RUN = 0, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `baton plan`."""
    add_trace_arguments(parser)
    add = parser.add_argument
    add("--gpus", type=number(int, 1), required=True, metavar="N", help="in all; 8 make a node")
    add("--scale", type=number(float, 1e-6), default=1.0, metavar="X", help="speed of the trace (default 1)")
    add("--policy", default="predict", metavar="NAME", help="of the router (default predict)")


def run(args: argparse.Namespace) -> int:
    """Prints all splits, the best one last. 0: done; 2: it could not be run."""
    try:
        return _run(args)
    except (SimulateError, BadTrace, OSError) as error:
        print(f"baton plan: {error}", file=sys.stderr)
        return _NOT_RUN


def _run(args: argparse.Namespace) -> int:
    from loadtest import sim_report
    from loadtest.simulator import Simulator
    from router.policy import POLICIES

    check_choice("--policy", [args.policy], POLICIES)
    num_nodes = args.gpus // GPUS_A_NODE
    if num_nodes < 2 or args.gpus % GPUS_A_NODE:
        raise SimulateError(f"--gpus must be a multiple of {GPUS_A_NODE} and make two nodes or more, got {args.gpus}")
    requests, found = requests_from(args, args.scale), dict[str, dict[str, Any]]()
    base = replace(config_from(args), policy=args.policy)

    def simulate(config: SimConfig) -> dict[str, Any]:
        name = split_name(config)
        if name not in found:
            jobs = Simulator(config).run(requests)
            found[name] = {"name": name, **sim_report.figures(jobs, config.ttft_limit_s, config.tpot_limit_s)}
        return found[name]

    def split(prefill: int) -> dict[str, Any]:
        return simulate(replace(base, prefill=prefill, decode=num_nodes - prefill))

    search(num_nodes, lambda prefill: merit(split(prefill)))
    simulate(replace(base, both=num_nodes))
    title = f"{args.gpus} GPUs as {args.machine}, {len(requests)} requests at {args.scale:g}x"
    print_table(sim_report.table(title, list(found.values())))
    chosen = max(found.values(), key=merit)
    print(f"best: {chosen['name']}: {chosen['goodput_rps']:.2f} of {chosen['offered_rps']:.2f} requests/s in time")
    write_json(args, {"cluster": described(args), "best": chosen["name"], "runs": list(found.values())})
    return _OK


def search(num_nodes: int, merit_of: Callable[[int], tuple[float, float]]) -> int:
    """How many nodes should prefill: tries all splits, or, if many, evenly spaced ones and then those near the best."""
    low, high = 1, num_nodes - 1
    while True:
        step = max(1, -(-(high - low + 1) // MAX_SPLITS))
        tried = sorted({*range(low, high + 1, step), high})
        best: int = max(tried, key=merit_of)
        if step == 1:
            return best
        low, high = max(1, best - step + 1), min(num_nodes - 1, best + step - 1)


def merit(figures: dict[str, Any]) -> tuple[float, float]:
    """The key by which splits are compared; larger is better."""
    return figures["goodput_rps"], -figures["ttft_s"]["mean"]


def split_name(config: SimConfig) -> str:
    """3P5D, or 8 colocated."""
    return f"{config.both} colocated" if config.both else f"{config.prefill}P{config.decode}D"
