"""Benchmark figures as a table for people and as JSON lines for whatever compares them later. Knows no benchmark.

A JSON line is `{"benchmark", "row", "unit", "baton": {"min", "median", "max", "n"}, "peer", "peer_value", "ratio"}`:
one for each peer that has figures for the row; the last three are null where none has. `ratio` is Baton's median over
the peer's, null where that is 0. A limit, such as a roofline, is a peer whose lines say besides which fraction of it
Baton has `reached`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One figure: a value for each repeat."""

    name: str
    unit: str
    values: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        values = self.values
        return {"min": min(values), "median": statistics.median(values), "max": max(values), "n": len(values)}


@dataclass(frozen=True)
class Peer:
    """What ran beside Baton: its repeats, row by row, none where it has no figure; or a limit, if it is one."""

    name: str
    values: Sequence[Sequence[float]]
    is_limit: bool = False


def print_rows(
    benchmark: str, rows: Sequence[Row], peer: str | None = None, peer_values: Sequence[Sequence[float]] = ()
) -> None:
    """The table, then one JSON line for each row, on stdout. `peer_values` are the peer's repeats, row by row."""
    print_beside(benchmark, rows, [Peer(peer, peer_values)] if peer else [])


def print_beside(benchmark: str, rows: Sequence[Row], peers: Sequence[Peer]) -> None:
    """The table, then the JSON lines, on stdout; any number of peers."""
    print_table(table(benchmark, rows, peers))
    print("\n".join(json.dumps(line) for line in lines(benchmark, rows, peers)))


def print_table(grid: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 150).print(grid)


def lines(benchmark: str, rows: Sequence[Row], peers: Sequence[Peer]) -> list[dict[str, Any]]:
    """The JSON lines, not yet written down."""
    found = []
    for row, beside in _beside(rows, peers):
        head = {"benchmark": benchmark, "row": row.name, "unit": row.unit, "baton": row.summary()}
        for peer, other in zip(peers, beside, strict=True):
            if other is not None:
                line = head | {"peer": peer.name, "peer_value": other.summary(), "ratio": _ratio(row, other)}
                found.append(line | ({"reached": _reached(row, other)} if peer.is_limit else {}))
        if not any(beside):
            found.append(head | {"peer": None, "peer_value": None, "ratio": None})
    return found


def table(benchmark: str, rows: Sequence[Row], peers: Sequence[Peer]) -> Table:
    """Baton's figures in full; of each peer its median, its number of repeats and the ratio (of a limit: reached)."""
    grid = Table("row", "unit", title=benchmark)
    for name in ("min", "median", "max", "n"):
        grid.add_column(name, justify="right")
    for peer in peers:
        for name in (peer.name, "reached") if peer.is_limit else (peer.name, "n", "ratio"):
            grid.add_column(name, justify="right")
    for row, beside in _beside(rows, peers):
        cells = _cells(row)
        for peer, other in zip(peers, beside, strict=True):
            if other is None:
                cells += [""] * (2 if peer.is_limit else 3)
            elif peer.is_limit:
                cells += [f"{other.summary()['median']:.4g}", f"{_reached(row, other):.0%}"]
            else:
                cells += [f"{other.summary()['median']:.4g}", f"{len(other.values)}", _shown(_ratio(row, other))]
        grid.add_row(row.name, row.unit, *cells)
    return grid


def tall_table(title: str, rows: Sequence[Row], peers: Sequence[Peer]) -> Table:
    """A line for Baton and one for each peer that has figures for the row: for more peers than a page has columns."""
    grid = Table("row", "unit", "who", title=title)
    for name in ("min", "median", "max", "n", "ratio"):
        grid.add_column(name, justify="right")
    for row, beside in _beside(rows, peers):
        grid.add_row(row.name, row.unit, "baton", *_cells(row))
        for peer, other in zip(peers, beside, strict=True):
            if other is not None:
                grid.add_row("", "", peer.name, *_cells(other), _shown(_ratio(row, other)))
        grid.add_section()
    return grid


def _cells(row: Row) -> list[str]:
    return [f"{value:.4g}" for value in row.summary().values()]


def _beside(rows: Sequence[Row], peers: Sequence[Peer]) -> list[tuple[Row, list[Row | None]]]:
    """Each row with what each peer has for it."""
    columns = [list(peer.values) for peer in peers]
    if any(len(column) != len(rows) for column in columns):
        raise ValueError("a peer needs an entry for each row, if only an empty one")
    return [
        (row, [Row(row.name, row.unit, tuple(column[index])) if column[index] else None for column in columns])
        for index, row in enumerate(rows)
    ]


def _ratio(row: Row, other: Row) -> float | None:
    median = other.summary()["median"]
    return row.summary()["median"] / median if median else None


def _shown(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _reached(row: Row, limit: Row) -> float:
    """1 is the limit: of a rate (`tok/s`) what Baton has of it, of a time what the limit has of Baton's."""
    ratio = row.summary()["median"] / limit.summary()["median"]
    return ratio if row.unit.endswith("/s") else 1 / ratio
