"""A process that a benchmark asks over pipes, a line of JSON each way. From both sides; knows no benchmark.

It may run in another environment's Python, which needs nothing of Baton's: everything here is of the standard library.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

REPOSITORY = Path(__file__).resolve().parent.parent


class WorkerProcess:
    """The worker as the benchmark sees it. Inherits the benchmark's cores; `greeting` is what it said first."""

    def __init__(
        self, python: str, module: str, arguments: Sequence[str], extra: Mapping[str, str], prefix: Sequence[str] = ()
    ) -> None:
        """`extra` are variables of its environment, `prefix` words before its command."""
        self._module = module
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*prefix, python, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | extra,
            start_new_session=True,  # so that its own children can be ended with it
        )
        try:
            self.greeting = self.receive()
        except BaseException:
            self._kill()
            raise

    def send(self, question: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        """The next answer. `SystemExit` with the end of the worker's log when it is gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"{self._log.read()[-4000:]}\n{self._module} ended with {status}")
        return json.loads(line)

    def stop(self) -> None:
        """The end of its input is its sign to end. What it started and left behind, as when it crashed, ends too."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self._kill()
        self._log.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):  # all ended by themselves
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def take_stdout() -> TextIO:
    """Standard output for answers alone; what libraries print there goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def say(answers: TextIO, answer: Any) -> None:
    print(json.dumps(answer), file=answers, flush=True)
