"""Benchmark figures as a table for people and as JSON lines for whatever compares them later. Knows no benchmark.

A JSON line is `{"benchmark", "row", "unit", "baton": {"min", "median", "max", "n"}, "peer", "peer_value", "ratio"}`;
the last three are null where no peer ran beside Baton.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

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


def print_rows(
    benchmark: str, rows: Sequence[Row], peer: str | None = None, peer_values: Sequence[Sequence[float]] = ()
) -> None:
    """The table, then one JSON line for each row, on stdout. `peer_values` are the peer's repeats, row by row."""
    beside = [Row(row.name, row.unit, tuple(values)) for row, values in zip(rows, peer_values, strict=bool(peer))]
    table = Table("row", "unit", title=benchmark)
    for name in ("min", "median", "max", "n", *([f"{peer} median", "ratio"] if peer else [])):
        table.add_column(name, justify="right")
    lines = []
    for index, row in enumerate(rows):
        summary = row.summary()
        other = beside[index].summary() if peer else None
        ratio = summary["median"] / other["median"] if other else None
        cells = [f"{summary[name]:.4g}" for name in ("min", "median", "max", "n")]
        table.add_row(row.name, row.unit, *cells, *([f"{other['median']:.4g}", f"{ratio:.2f}"] if other else []))
        line = {"benchmark": benchmark, "row": row.name, "unit": row.unit, "baton": summary}
        lines.append(json.dumps(line | {"peer": peer, "peer_value": other, "ratio": ratio}))
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    print("\n".join(lines))
