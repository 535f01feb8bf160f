"""`baton bench report`: results of runs, side by side in one HTML page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loadtest.report_html import page
from loadtest.report_json import BadResult, read_result

_OK, _NOT_DONE = 0, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files to read, and the one to write."""
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="of --result-json or --json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, HTML")


def run(args: argparse.Namespace) -> int:
    """0, or 2 with one line on what is wrong with a file."""
    try:
        results = [(str(file), read_result(file)) for file in args.results]
        args.out.write_text(page(results), encoding="utf-8")
    except (BadResult, OSError) as error:
        print(f"baton bench report: {error}", file=sys.stderr)
        return _NOT_DONE
    return _OK
