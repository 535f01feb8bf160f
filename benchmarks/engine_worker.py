"""A process that holds one loaded engine of benchmarks/engine.py, from both sides: who asks it, and its own loop.

Over its pipes: a greeting when the first token is there, then a JSON task a line in, the task's steps a line out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

from benchmarks.worker_process import WorkerProcess, say


class Step(NamedTuple):
    """Some tokens came: how many, and how long after the task's start."""

    seconds: float
    tokens: int


class Task(NamedTuple):
    """Prompts of one length, run together, without an end token."""

    prompts: list[list[int]]
    max_tokens: int
    every_step: bool  # whether each step is asked for, or only the last


class Worker(WorkerProcess):
    """A worker process as the benchmark sees it."""

    def __init__(self, python: str, module: str, folder: Path, threads: int, extra: dict[str, str]) -> None:
        fixed = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        super().__init__(python, module, [str(folder), str(threads), repr(time.time())], fixed | extra)
        self.first_token_s = float(self.greeting["first_token_s"])
        self.version = str(self.greeting["version"])

    def run(self, task: Task) -> list[Step]:
        self.send(task._asdict())
        return [Step(*step) for step in self.receive()["steps"]]


def serve(answers: TextIO, begin_s: float, version: str, run: Callable[[Task], list[Step]]) -> None:
    """The worker's loop: ends with its input."""
    run(Task([[1, 2, 3]], 1, False))
    say(answers, {"first_token_s": time.time() - begin_s, "version": version})
    for line in sys.stdin:
        task = Task(**json.loads(line))
        steps = run(task)
        assert sum(step.tokens for step in steps) == len(task.prompts) * task.max_tokens
        say(answers, {"steps": steps})
