"""The engine alone, beside vLLM and transformers on the CPU, and beside what the machine could do at best.

    benchmarks/install_peers.sh /somewhere vllm
    python -m benchmarks.engine --model 135m --threads 2 --peer vllm,transformers \\
        --peer-python /somewhere/vllm/bin/python --json docs/results/engine_135m_2.jsonl

All load the same random bf16 weights in a published shape, made on the fly, on the same cores, and take turns at each
row, in one run: one turn to warm up, then 5 that count. Rows of many prompt tokens have no warm-up, and in TPOT rows
three figures a turn and two turns. transformers is slow: 3 turns that count, and one in rows of many prompt tokens.
Prompts are random token ids, new for each turn, without prefix caching.
`--peer none` leaves the peers out, `--quick` counts one turn at the short rows.

TPOT is the mean time of the steps that give a token to each request of the batch, once all prompts are done. The
"first" start has no compiled code of any earlier one (vLLM compiles its model), "later" ones may find what it left.
The roofline (see benchmarks/roofline.py) is measured between the rows, while nothing else computes; its best counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine_shapes import SHAPES, Shape
from benchmarks.engine_worker import Step, Task, Worker
from benchmarks.roofline import Machine, Meter, Work, decode, prefill
from benchmarks.rows import Peer, Row, lines, print_beside
from benchmarks.worker_process import REPOSITORY

TURNS = 5
SLOW_TURNS = 3  # of transformers
HEAVY_TOKENS = 8192  # in a turn's prompts
PAUSE_S = 1.5  # until the last one's idle threads no longer spin: vLLM's do for a second
CONTEXT = 1024
DECODE_TOKENS = 65  # of each request in a TPOT row: the first ones come while others are still in prefill
MIN_DECODE_STEPS = 12
DECODE_PARTS = 3  # of a turn in the rows of many prompt tokens, each with a figure


@dataclass(frozen=True)
class Measurement:
    """A row: what its turns are, what they give, and what the machine could give."""

    name: str
    unit: str
    count: int
    length: int
    max_tokens: int
    figures: Callable[[list[Step]], list[float]]  # of one turn
    work: Work
    limit: Callable[[float], float]  # the figure, had `work` taken these seconds

    num_figures: int = 1  # of one turn

    @property
    def is_heavy(self) -> bool:
        """Whether a turn takes so long that none is spent on warming up: the rows before have done that."""
        return self.count * self.length >= HEAVY_TOKENS

    def turn(self, worker: Worker, rng: random.Random, shape: Shape) -> list[float]:
        prompts = [[rng.randrange(shape.vocab_size) for _ in range(self.length)] for _ in range(self.count)]
        time.sleep(PAUSE_S)
        return self.figures(worker.run(Task(prompts, self.max_tokens, every_step=self.unit == "ms")))


def prefill_row(shape: Shape, length: int) -> Measurement:
    def rate(seconds: float) -> float:
        return length / seconds

    name, work = f"prefill, prompt of {length}", prefill(shape, 1, length)
    return Measurement(name, "tok/s", 1, length, 1, lambda steps: [rate(steps[-1].seconds)], work, rate)


def tpot_row(shape: Shape, batch: int) -> Measurement:
    parts = DECODE_PARTS if batch * CONTEXT >= HEAVY_TOKENS else 1  # a prefill of all prompts for each figure is dear

    def tpot_ms(steps: list[Step]) -> list[float]:
        ends_s = [step.seconds for step in steps if step.tokens == batch]
        size = (len(ends_s) - 1) // parts
        if size < MIN_DECODE_STEPS:
            raise SystemExit(f"only {len(ends_s)} steps of the whole batch of {batch}: raise DECODE_TOKENS")
        return [1e3 * (ends_s[i + size] - ends_s[i]) / size for i in range(0, parts * size, size)]

    name, work = f"TPOT at context {CONTEXT}, batch {batch}", decode(shape, batch, CONTEXT + DECODE_TOKENS / 2)
    return Measurement(name, "ms", batch, CONTEXT, DECODE_TOKENS, tpot_ms, work, lambda seconds: 1e3 * seconds, parts)


def offline_row(shape: Shape, count: int = 32, length: int = 256, out: int = 64) -> Measurement:
    def rate(seconds: float) -> float:
        return count * out / seconds

    steps = decode(shape, count, length + out / 2)
    work = prefill(shape, count, length) + Work((out - 1) * steps.read_bytes, (out - 1) * steps.flops)
    name = f"offline, {count} x ({length} in, {out} out)"
    return Measurement(name, "out tok/s", count, length, out, lambda steps: [rate(steps[-1].seconds)], work, rate)


def measurements(shape: Shape, quick: bool) -> list[Measurement]:
    lengths, batches = ((256, 1024), (1, 8)) if quick else ((256, 1024, 4096), (1, 8, 32))
    rows = [prefill_row(shape, length) for length in lengths] + [tpot_row(shape, batch) for batch in batches]
    return rows if quick else [*rows, offline_row(shape)]


class Bench:
    """The workers of one run, in turns; what they did, row by row."""

    def __init__(self, shape: Shape, starts: Mapping[str, Callable[[], Worker]], turns: int, meter: Meter) -> None:
        self.versions: dict[str, str] = {}
        self.figures: list[tuple[str, str, dict[str, list[float]]]] = []
        self._shape, self._starts, self._turns, self._meter = shape, starts, turns, meter
        self._rng = random.Random(0)

    def run(self, rows: Sequence[Measurement], starts_again: bool) -> None:
        self._meter.measure()
        first: dict[str, list[float]] = {}
        with ExitStack() as stack:
            workers = {}
            for name, start in self._starts.items():
                workers[name] = start()
                stack.callback(workers[name].stop)
                self.versions[name], first[name] = workers[name].version, [workers[name].first_token_s]
            for row in rows:
                self._measure(row, workers)
                time.sleep(PAUSE_S)
                self._meter.measure()
        self._keep("process start to first token, first", "s", first)
        if starts_again:
            self._keep("process start to first token, later", "s", self._start_again())

    def _measure(self, row: Measurement, workers: Mapping[str, Worker]) -> None:
        values: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(1 + self._turns):
            for name, worker in workers.items():
                if turn in self._turns_of(name, row.is_heavy, row.num_figures):
                    figures = row.turn(worker, self._rng, self._shape)
                    values[name] += figures if turn else []
        self._keep(row.name, row.unit, values)

    def _start_again(self) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {name: [] for name in self._starts}
        for turn in range(1, 1 + self._turns):
            for name, start in self._starts.items():
                if turn in self._turns_of(name):
                    worker = start()
                    values[name].append(worker.first_token_s)
                    worker.stop()
        return values

    def _turns_of(self, name: str, is_heavy: bool = False, num_figures: int = 1) -> range:
        """Which turns a worker takes part in; turn 0 warms up."""
        is_slow = name == "transformers"
        if is_heavy:
            return range(1, 2 if is_slow else 1 + -(-self._turns // num_figures))
        return range(1 + (min(SLOW_TURNS, self._turns) if is_slow else self._turns))

    def _keep(self, name: str, unit: str, values: dict[str, list[float]]) -> None:
        self.figures.append((name, unit, values))
        print(name, {who: [f"{value:.4g}" for value in seen] for who, seen in values.items()}, file=sys.stderr)


def results(bench: Bench, rows: Sequence[Measurement], machine: Machine) -> tuple[list[Row], list[Peer]]:
    """The rows, and beside them the peers and the roofline."""
    found = [Row(name, unit, tuple(values["baton"])) for name, unit, values in bench.figures]
    names = [name for name in bench.versions if name != "baton"]
    peers = [Peer(name, [values[name] for _, _, values in bench.figures]) for name in names]
    limits = {row.name: [row.limit(machine.seconds(row.work))] for row in rows}
    return found, [*peers, Peer("roofline", [limits.get(row.name, []) for row in found], is_limit=True)]


def baton_and_peers(args: argparse.Namespace, folder: Path, cores: Sequence[int]) -> dict[str, Callable[[], Worker]]:
    """How to start each worker. Compiled code is kept in this run's own folder."""
    caches = {name: str(folder / name.lower()) for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")}
    model, own = folder / "model", sys.executable
    starts: dict[str, Callable[[], Worker]] = {
        "baton": lambda: Worker(own, "benchmarks.engine_baton", model, args.threads, caches)
    }
    if "vllm" in args.peer:
        vllm = caches | {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_NO_USAGE_STATS": "1",
            "LD_PRELOAD": ":".join(args.peer_preload),
        }
        starts["vllm"] = lambda: Worker(args.peer_python, "benchmarks.engine_vllm", model, args.threads, vllm)
    if "transformers" in args.peer:
        starts["transformers"] = lambda: Worker(own, "benchmarks.engine_transformers", model, args.threads, caches)
    return starts


def advised_preload(peer_python: str) -> list[str]:
    """The libraries that vLLM's authors advise to preload, where install_peers.sh or the system has put them."""
    environment = Path(peer_python).absolute().parent.parent
    found: list[str] = []
    for folder, name in (
        (environment.parent / "tcmalloc", "**/libtcmalloc_minimal.so.4"),
        (Path("/usr/lib"), "*/libtcmalloc_minimal.so.4"),
        (environment / "lib", "libiomp5.so"),
    ):
        hits = sorted(map(str, folder.glob(name)))
        if hits and not any(Path(hits[0]).name == Path(other).name for other in found):
            found.append(hits[0])
    return found


def about(args: argparse.Namespace, bench: Bench, meter: Meter, bounds: Mapping[str, str]) -> dict[str, Any]:
    """What the figures hang on besides the code."""
    processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=REPOSITORY, capture_output=True, text=True
    )
    read = Row("", "", tuple(sample.read_bytes_per_s / 1e9 for sample in meter.samples))
    products = Row("", "", tuple(sample.flops_per_s / 1e12 for sample in meter.samples))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor.split(":")[1].strip(),
        "threads": args.threads,
        "commit": git.stdout.strip(),
        "versions": bench.versions,
        "vllm_preload": [Path(path).name for path in args.peer_preload],
        "memory_read_gb_per_s": read.summary(),
        "bf16_products_tflop_per_s": products.summary(),
        "measured_by": meter.MEASURED_BY,
        "bound_by": bounds,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="135m")
    parser.add_argument("--threads", type=int, default=2, help="all are bound to the first so many cores")
    parser.add_argument("--peer", default="none", help="vllm, transformers, vllm,transformers or none")
    parser.add_argument("--peer-python", default="", help="of vLLM's environment")
    parser.add_argument("--peer-preload", default="search", help="vLLM's LD_PRELOAD; `search`: what its authors advise")
    parser.add_argument("--turns", type=int, default=TURNS, help="that count, after one to warm up")
    parser.add_argument("--quick", action="store_true", help="one turn at the short rows")
    parser.add_argument("--rows", type=re.compile, default="", help="a regular expression: only rows with such names")
    parser.add_argument("--json", type=Path, help="append the lines to this file, behind one about the run")
    args = parser.parse_args()
    args.peer = [] if args.peer == "none" else args.peer.split(",")
    if not {"vllm", "transformers"}.issuperset(args.peer):
        parser.error("--peer takes vllm and transformers, separated by a comma, or none")
    if "vllm" in args.peer and not args.peer_python:
        parser.error("--peer vllm needs --peer-python, which benchmarks/install_peers.sh prints")
    search = args.peer_preload == "search"
    preload = advised_preload(args.peer_python) if search else args.peer_preload.split(":")
    args.peer_preload = preload if "vllm" in args.peer else []
    args.turns = 1 if args.quick else args.turns
    return args


def main() -> None:
    args = arguments()
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(cores) < args.threads:
        raise SystemExit(f"{args.threads} threads need as many cores, there are {len(cores)}")
    os.sched_setaffinity(0, cores)  # the workers inherit it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the workers and the model's folder go too
    shape = SHAPES[args.model]
    rows = [row for row in measurements(shape, args.quick) if args.rows.search(row.name)]
    meter = Meter(args.threads)
    with tempfile.TemporaryDirectory(prefix="baton-") as name:
        shape.write(Path(name) / "model")
        bench = Bench(shape, baton_and_peers(args, Path(name), cores), args.turns, meter)
        bench.run(rows, bool(args.rows.search("process start to first token, later")))
    machine = meter.best()
    figures, peers = results(bench, rows, machine)
    title = f"engine, {shape.name}'s shape, bf16, {args.threads} thread{'s' if args.threads > 1 else ''}"
    print_beside(title, figures, peers)
    meta = {"benchmark": title, "about": about(args, bench, meter, {row.name: machine.bound(row.work) for row in rows})}
    print(json.dumps(meta))
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            for line in (meta, *lines(title, figures, peers)):
                print(json.dumps(line), file=file)


if __name__ == "__main__":
    main()
