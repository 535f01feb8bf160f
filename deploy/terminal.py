"""What the `baton` command shows: progress on standard error, answers on standard output."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO

from rich.console import Console

WIDTH = 120  # characters, where standard output is no terminal


def say(line: str) -> None:
    """A progress line. Standard output is kept for answers."""
    show(f"baton: {line}", sys.stderr)


def show(line: str, where: TextIO | None = None) -> None:
    """On standard output, or elsewhere. A full disk behind it, or a reader who left, is no reason to stop a cluster."""
    with contextlib.suppress(OSError):
        print(f"{line}\n", end="", file=where or sys.stdout, flush=True)  # in one go: other threads say something, too


def console() -> Console:
    """For tables. Names are shown as they are, whatever rich would make of their brackets."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
