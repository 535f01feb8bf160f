"""Baton's side of benchmarks/engine.py: one engine in this process."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from benchmarks.engine_worker import Step, Task, serve
from benchmarks.worker_process import take_stdout
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import RequestOutput, SamplingParams


class TimedEngine(Engine):
    """Notes when each step of `generate` ended, and with how many tokens."""

    def run(self, task: Task) -> list[Step]:
        self._steps: list[Step] = []
        self._start_s = time.perf_counter()
        self.generate(task.prompts, SamplingParams(temperature=0.0, max_tokens=task.max_tokens, ignore_eos=True))
        return self._steps

    def step(self) -> list[RequestOutput]:
        outputs = super().step()
        tokens = sum(len(output.tokens) for output in outputs)
        self._steps.append(Step(time.perf_counter() - self._start_s, tokens))
        return outputs


def main() -> None:
    answers = take_stdout()
    folder, threads, begin_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(threads)
    config = EngineConfig(
        dtype="bfloat16", kv_cache_bytes=2 << 30, max_num_batched_tokens=2048, enable_prefix_caching=False
    )
    engine = TimedEngine.from_pretrained(folder, config)
    assert isinstance(engine, TimedEngine)
    serve(answers, begin_s, f"torch {torch.__version__}", engine.run)


if __name__ == "__main__":
    main()
