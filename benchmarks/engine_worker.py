"""A process that holds one loaded engine of benchmarks/engine.py, from both sides: who asks it, and its own loop.

Over its pipes: a greeting when the first token is there, then a JSON task a line in, the task's steps a line out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

REPOSITORY = Path(__file__).resolve().parent.parent


class Step(NamedTuple):
    """Some tokens came: how many, and how long after the task's start."""

    seconds: float
    tokens: int


class Task(NamedTuple):
    """Prompts of one length, run together, without an end token."""

    prompts: list[list[int]]
    max_tokens: int
    every_step: bool  # whether each step is asked for, or only the last


class Worker:
    """A worker process as the benchmark sees it. Inherits the benchmark's cores."""

    def __init__(self, python: str, module: str, folder: Path, threads: int, extra: dict[str, str]) -> None:
        self._module = module
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, "-m", module, str(folder), str(threads), repr(time.time())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | extra,
            start_new_session=True,  # so that its own children can be ended with it
        )
        try:
            greeting = self._answer()
        except BaseException:
            self._kill()
            raise
        self.first_token_s = float(greeting["first_token_s"])
        self.version = str(greeting["version"])

    def run(self, task: Task) -> list[Step]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task._asdict()) + "\n")
        self._process.stdin.flush()
        return [Step(*step) for step in self._answer()["steps"]]

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._kill()
        self._log.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):  # ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"{self._log.read()[-4000:]}\n{self._module} ended with {status}")
        return json.loads(line)


def take_stdout() -> TextIO:
    """Standard output for answers alone; what libraries print there goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, begin_s: float, version: str, run: Callable[[Task], list[Step]]) -> None:
    """The worker's loop: ends with its input."""
    run(Task([[1, 2, 3]], 1, False))
    greeting = {"first_token_s": time.time() - begin_s, "version": version}
    print(json.dumps(greeting), file=answers, flush=True)
    for line in sys.stdin:
        task = Task(**json.loads(line))
        steps = run(task)
        assert sum(step.tokens for step in steps) == len(task.prompts) * task.max_tokens
        print(json.dumps({"steps": steps}), file=answers, flush=True)
