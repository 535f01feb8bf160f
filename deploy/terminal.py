"""What the `baton` command shows: progress on standard error, answers on standard output."""

from __future__ import annotations

import sys

from rich.console import Console

WIDTH = 120  # characters, where standard output is no terminal


def say(line: str) -> None:
    """A progress line. Standard output is kept for answers."""
    print(f"baton: {line}", file=sys.stderr, flush=True)


def console() -> Console:
    """For tables. Names are shown as they are, whatever rich would make of their brackets."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
