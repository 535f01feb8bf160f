"""Serving, end to end: Baton's clusters beside vLLM on the CPU, on the same two cores, by the same client over HTTP.

    benchmarks/install_peers.sh /somewhere vllm mooncake sglang-router nixl
    python -m benchmarks.serving --peer-folder /somewhere --json docs/results/serving.jsonl
    python -m benchmarks.serving --peer none --quick        # Baton alone, a look

SmolLM-135M's shape with random bf16 weights. Set-ups, each with two computing cores and 2 GiB for KV:
  baton-1p1d          a prefill node and a decode node, one core each, a store (1 GiB of the 2), a router
  baton-2both         two nodes that do both legs, one core each, likewise
  baton-1p1d-held, baton-2both-256, not by default: router, store and Redis on the prefill node's core; steps of 256
                      tokens instead of 512
  vllm-2cores         vLLM, 2 threads
  vllm-2replicas      two of them with a thread each; the client sends to one and the other in turns
  vllm-sglang-router  the same two behind sglang-router (cache_aware)
  vllm-pd-mooncake    vLLM's prefill and decode over Mooncake Store (1 GiB more for each one's segment)
  vllm-pd-nixl        likewise over NIXL; frozen while others have their turn, for these servers spin while they wait
vLLM runs with its defaults (prefix caching, chunked prefill; `--vllm-options` adds some) and with the libraries that
its authors advise to preload. Routers, stores and the client itself go on the same two cores, wherever there is room.

Workloads, in turns: each set-up runs one after the other, after a pause that outlasts vLLM's spinning threads, then all
again. (a), (b) and (c) are open loads of `--seconds`, (b) with prefixes that every server has seen; (d) is half without
and half with prompts that arrive; (e) asks one at a time. Goodput counts requests within `--goodput`. `--sweep` looks
for the highest rate at which 90 % of the requests of an open load are: coarsely (within 25 %), and it takes minutes for
each set-up.
All set-ups of a run stay up: a vLLM server takes about 3.5 GB, one of Baton's set-ups about 4, so 24 GB are enough for
four set-ups. vLLM compiles its model for each server when it starts (a minute); --cache spares a later run that.
Temperature 0, end tokens ignored, fresh random prompts in each turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engine_shapes import SHAPES
from benchmarks.rows import Peer, Row, lines, print_table, tall_table
from benchmarks.serving_aims import aims
from benchmarks.serving_model import write_model
from benchmarks.serving_setups import BATON, PEERS, Fleet, MakeClient, NotStarted
from benchmarks.serving_workloads import (
    INTERFERENCE,
    LONE,
    OPEN_LOADS,
    Figures,
    OpenLoad,
    interference,
    lone,
    open_figures,
    run_open,
    warm_prefixes,
)
from benchmarks.worker_process import REPOSITORY
from loadtest.exchange import SendError
from loadtest.report import Report
from loadtest.slo import Slo
from loadtest.sweep import Search
from loadtest.workload import Dice

DEFAULT_BATON = ("baton-1p1d", "baton-2both")
TITLE = "serving, SmolLM-135M's shape, bf16, 2 cores"
PAUSE_S = 1.5  # until the last one's idle threads no longer spin
WARM_UP_S = 4.0
SWEEP_SHARE, SWEEP_PRECISION = 0.9, 0.25
_RATES = " ".join(f"{key}={load.rate_per_s:g}" for key, load in OPEN_LOADS.items())
VOCAB_SIZE = SHAPES["135m"].vocab_size

Found = dict[tuple[str, str], dict[str, list[float]]]  # (workload, figure) -> set-up -> turns


class Bench:
    """One run: what it found, workload by workload."""

    def __init__(self, args: argparse.Namespace, clients: Mapping[str, MakeClient]) -> None:
        self.found: Found = {}
        self._args, self._clients = args, clients
        self._slo = Slo.parse(args.goodput)

    def run(self) -> None:
        for name in self._clients:
            with self._said(name):
                asyncio.run(self._warm_up(name))
        for turn in range(self._args.turns):
            for workload in self._args.workloads:
                for name in self._clients:
                    time.sleep(PAUSE_S)
                    with self._said(name):
                        self._keep(name, *asyncio.run(self._turn(workload, name, turn)))
        if self._args.sweep:
            for workload in OPEN_LOADS.keys() & self._args.workloads:
                for name in self._clients:
                    load = OPEN_LOADS[workload]
                    with self._said(name):
                        self._keep(name, load.name, asyncio.run(self._sweep(load, name, self._args.rates[workload])))

    @contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """A server that is gone has no figures; the others go on."""
        try:
            yield
        except SendError as error:
            print(f"{name} has no figures: {error}", file=sys.stderr)

    async def _warm_up(self, name: str) -> None:
        """Prompts of every length, once, and a little of the load with hits: nobody learns on the clock."""
        async with self._clients[name]() as client:
            await client.get_model()
            await lone(client, VOCAB_SIZE, _dice(0))
            await self._open(OPEN_LOADS["b"], name, 2.0, WARM_UP_S, _dice(0))

    async def _turn(self, workload: str, name: str, turn: int) -> tuple[str, Figures]:
        load, dice = OPEN_LOADS.get(workload), _dice(turn)
        if load is not None:
            report = await self._open(load, name, self._args.rates[workload], self._args.seconds, dice)
            _complain(name, report)
            return load.name, open_figures(load, report)
        async with self._clients[name]() as client:
            await client.get_model()
            if workload == "d":
                return INTERFERENCE, await interference(client, self._args.seconds, VOCAB_SIZE, dice)
            return LONE, await lone(client, VOCAB_SIZE, dice)

    async def _open(self, load: OpenLoad, name: str, rate_per_s: float, seconds: float, dice: Dice) -> Report:
        async with self._clients[name]() as client:
            await client.get_model()
            plan = load.plan(rate_per_s, seconds, VOCAB_SIZE, dice)
            await warm_prefixes(client, load, plan)
            return await run_open(client, plan, self._slo)

    async def _sweep(self, load: OpenLoad, name: str, start_per_s: float) -> Figures:
        search = Search(start_per_s, precision=SWEEP_PRECISION)
        while (rate_per_s := search.next_per_s()) is not None:
            await asyncio.sleep(PAUSE_S)
            report = await self._open(load, name, rate_per_s, self._args.seconds, _dice(0))
            search.tell(rate_per_s, (report.good_share or 0.0) >= SWEEP_SHARE)
            print(f"{load.name} {name} {rate_per_s:.2f}/s: {report.good_share or 0:.0%} in time", file=sys.stderr)
        requests = load.shape.turns * (search.best_per_s or 0.0)
        return {"highest rate in time, req/s": requests}

    def _keep(self, name: str, workload: str, figures: Figures) -> None:
        for figure, value in figures.items():
            self.found.setdefault((workload, figure), {}).setdefault(name, []).append(value)
        print(workload, name, {figure: float(f"{value:.4g}") for figure, value in figures.items()}, file=sys.stderr)


def _dice(turn: int) -> Dice:
    return Dice(turn, secrets.token_hex(8))


def _complain(name: str, report: Report) -> None:
    for error, count in report.errors.items():
        print(f"{name}: {count} x {error}", file=sys.stderr)
    lag_ms = report.lateness.p99_ms
    if lag_ms > 100:
        print(f"{name}: the client sent {lag_ms:.0f} ms late (P99)", file=sys.stderr)


def results(found: Found, names: Sequence[str]) -> tuple[list[Row], list[Peer]]:
    """The first set-up's rows; the others beside it. A row needs figures of the first one."""
    first, *others = names
    kept = {key: by_name for key, by_name in sorted(found.items(), key=lambda item: item[0][0]) if first in by_name}
    rows = []
    for (workload, figure), by_name in kept.items():
        figure_name, _, unit = figure.rpartition(", ")
        rows.append(Row(f"{workload}: {figure_name}", unit, tuple(by_name[first])))
    return rows, [Peer(name, [by_name.get(name, []) for by_name in kept.values()]) for name in others]


def about(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What the figures hang on besides the code."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor.split(":")[1].strip(),
        "commit": subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip(),
        "baton": names[0],
        "setups": list(names),
        "turns": args.turns,
        "seconds": args.seconds,
        "goodput": args.goodput,
        "rates_per_s": args.rates,
        "vllm_options": args.vllm_options,
        "load_average": list(os.getloadavg()),
    }


def _rate(text: str) -> tuple[str, float]:
    key, _, rate = text.partition("=")
    if key not in OPEN_LOADS or not float(rate) > 0:
        raise ValueError
    return key, float(rate)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peer", default="all", help="all (default), or none: Baton alone")
    add("--peer-folder", type=Path, help="that install_peers.sh filled")
    add("--setups", default="", help=f"some of {','.join((*BATON, *PEERS))}; the first is what the others stand beside")
    add("--workloads", default="a,b,c,d,e", help="default %(default)s")
    add("--turns", type=int, default=2)
    add("--seconds", type=float, default=16.0, help="that requests of (a) to (d) come, in one turn (default 16)")
    add("--rates", type=_rate, nargs="+", default=[], metavar="LOAD=PER_S", help=f"other ones than {_RATES}")
    add("--goodput", nargs="+", default=["ttft:1000", "tpot:60"], metavar="NAME:MS")
    add("--sweep", action="store_true", help="find the highest rate, too; open loads alone")
    add("--quick", action="store_true", help="one turn of 6 s")
    add(
        "--vllm-options", type=str.split, default=[], help="added to `vllm serve`, as in '--max-num-batched-tokens 512'"
    )
    add("--cache", type=Path, help="keep the model and what vLLM compiles there, for a later run")
    add("--json", type=Path, help="append the lines to this file, behind one about the run")
    args = parser.parse_args(argv)
    names = args.setups.split(",") if args.setups else [*DEFAULT_BATON, *(() if args.peer == "none" else PEERS)]
    if unknown := set(names) - {*BATON, *PEERS}:
        parser.error(f"--setups: there is no {', '.join(sorted(unknown))}")
    if names[0] not in BATON:
        parser.error("--setups: the first must be one of Baton's")
    if {*names} & {*PEERS} and args.peer_folder is None:
        parser.error("peers need --peer-folder, or there is --peer none")
    args.rates = {key: load.rate_per_s for key, load in OPEN_LOADS.items()} | dict(args.rates)
    args.setups, args.workloads = names, args.workloads.split(",")
    if unknown := {*args.workloads} - {*OPEN_LOADS, "d", "e"}:
        parser.error(f"--workloads: there is no {', '.join(sorted(unknown))}")
    if args.quick:
        args.turns, args.seconds = 1, 6.0
    return args


def start_all(fleet: Fleet, names: Sequence[str]) -> dict[str, MakeClient]:
    """Those that start; a peer that does not is said, and left out."""
    clients = {}
    for name in names:
        begin_s = time.monotonic()
        try:
            clients[name] = fleet.start(name)
        except NotStarted as error:
            if name in BATON:
                raise
            print(f"{error}\n{name} is left out", file=sys.stderr)
            continue
        print(f"{name} is up after {time.monotonic() - begin_s:.0f} s", file=sys.stderr)
    return clients


def report(args: argparse.Namespace, found: Found) -> None:
    """The table, the aims, and the lines."""
    rows, peers = results(found, args.setups)
    print_table(tall_table(TITLE, rows, peers))
    for line in aims(found):
        print(line)
    meta = {"benchmark": TITLE, "about": about(args, args.setups)}
    written = [meta, *lines(TITLE, rows, peers)]
    print("\n".join(map(json.dumps, written)))
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in written)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    with tempfile.TemporaryDirectory(prefix="baton-") as name:
        folder = Path(name)
        cache = args.cache or folder
        model = cache / "model"  # what vLLM compiles is only found again for a model at the same place
        if not (model / "tokenizer.json").exists():
            write_model(SHAPES["135m"], model)
        with Fleet(model, cache, args.peer_folder, args.vllm_options) as fleet:
            bench = Bench(args, start_all(fleet, args.setups))
            try:
                bench.run()
            except (KeyboardInterrupt, SystemExit):
                print("stopped: these are the figures so far", file=sys.stderr)
            report(args, bench.found)  # before the servers end, which takes a while


if __name__ == "__main__":
    main()
