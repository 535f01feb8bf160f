"""Benchmark figures as a table for people and as JSON lines for whatever compares them later. Knows no benchmark.

A JSON line is `{"benchmark", "row", "unit", "baton": {"min", "median", "max", "n"}, "peer", "peer_value", "ratio"}`;
the last three are null where no peer ran beside Baton.
"""

from __future__ import annotations

import json
import statistics
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


def print_rows(benchmark: str, rows: Sequence[Row]) -> None:
    """The table, then one JSON line for each row, on stdout."""
    table = Table("row", "unit", title=benchmark)
    for name in ("min", "median", "max", "n"):
        table.add_column(name, justify="right")
    for row in rows:
        summary = row.summary()
        table.add_row(row.name, row.unit, *(f"{summary[name]:.4g}" for name in ("min", "median", "max", "n")))
    Console().print(table)
    for row in rows:
        line = {"benchmark": benchmark, "row": row.name, "unit": row.unit, "baton": row.summary()}
        print(json.dumps(line | {"peer": None, "peer_value": None, "ratio": None}))
