"""The engine alone, beside vLLM on the CPU: prefill, time per output token, offline throughput, time to first token.

    benchmarks/install_peers.sh /somewhere
    python -m benchmarks.engine --threads 2 --peer vllm --peer-python /somewhere/vllm/bin/python

Both load the same random bf16 weights (SmolLM-135M's shape, made on the fly) and take turns at each row, in one run:
one turn to warm up, then 5 that count. Prompts are random token ids, new for each turn, without prefix caching.
`--peer none` leaves the peer out, `--quick` counts one turn at the short rows. TPOT is (time of 33 tokens - time of 1)
/ 32.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.rows import Row, print_rows

REPOSITORY = Path(__file__).resolve().parent.parent
VOCAB = 49152
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


class Worker:
    """A process that holds one loaded engine."""

    def __init__(self, python: str, script: str, folder: Path, threads: int, extra: dict[str, str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | extra
        command = [python, "-m", script] if script.startswith("benchmarks.") else [python, script]
        self._process = subprocess.Popen(
            [*command, str(folder), str(threads), repr(time.time())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        self.first_token_s = self._answer()

    def seconds(self, prompts: list[list[int]], max_tokens: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")
        return float(json.loads(line))


def start_workers(args: argparse.Namespace, folder: Path) -> dict[str, Worker]:
    workers = {"baton": Worker(sys.executable, "benchmarks.engine_baton", folder, args.threads, {})}
    if args.peer == "vllm":
        cores = "0" if args.threads == 1 else f"0-{args.threads - 1}"
        extra = {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_NO_USAGE_STATS": "1",
            "LD_PRELOAD": args.peer_preload,
        }
        script = str(REPOSITORY / "benchmarks" / "engine_vllm.py")
        workers["vllm"] = Worker(args.peer_python, script, folder, args.threads, extra)
    return workers


def prompts(rng: random.Random, count: int, length: int) -> list[list[int]]:
    return [[rng.randrange(VOCAB) for _ in range(length)] for _ in range(count)]


def measurements(quick: bool) -> dict[tuple[str, str], Callable[[Worker, random.Random], float]]:
    """(row, unit) -> one turn at it."""

    def prefill(length: int) -> Callable[[Worker, random.Random], float]:
        return lambda worker, rng: length / worker.seconds(prompts(rng, 1, length), 1)

    def tpot(batch: int) -> Callable[[Worker, random.Random], float]:
        def measure(worker: Worker, rng: random.Random) -> float:
            batch_prompts = prompts(rng, batch, 1024)
            return 1e3 * (worker.seconds(batch_prompts, 33) - worker.seconds(batch_prompts, 1)) / 32

        return measure

    def offline(worker: Worker, rng: random.Random) -> float:
        return 32 * 64 / worker.seconds(prompts(rng, 32, 256), 64)

    lengths, batches = ((256, 1024), (1, 8)) if quick else ((256, 1024, 4096), (1, 8, 32))
    rows = {(f"prefill, prompt of {n}", "tok/s"): prefill(n) for n in lengths}
    rows |= {(f"TPOT at context 1024, batch {b}", "ms"): tpot(b) for b in batches}
    return rows if quick else rows | {("offline, 32 x (256 in, 64 out)", "out tok/s"): offline}


def make_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=["vllm", "none"], default="none")
    parser.add_argument("--peer-python", default="")
    parser.add_argument("--peer-preload", default="", help="LD_PRELOAD of the peer, which its authors advise")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        make_model(Path(folder))
        workers = start_workers(args, Path(folder))
        rng = random.Random(0)
        rows, peers = [], []
        for (name, unit), measure in measurements(args.quick).items():
            count = 2 if args.quick else 6
            turns = [{who: measure(worker, rng) for who, worker in workers.items()} for _ in range(count)][1:]
            rows.append(Row(name, unit, tuple(turn["baton"] for turn in turns)))
            peers.append(tuple(turn["vllm"] for turn in turns) if "vllm" in workers else ())
            print(rows[-1], peers[-1], file=sys.stderr, flush=True)
        rows.append(Row("process start to first token", "s", (workers["baton"].first_token_s,)))
        peers.append((workers["vllm"].first_token_s,) if "vllm" in workers else ())
        for worker in workers.values():
            worker.stop()
    print_rows(f"engine, 135M, {args.threads} threads", rows, args.peer if args.peer != "none" else None, peers)


if __name__ == "__main__":
    main()
