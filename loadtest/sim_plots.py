"""Plots of simulated runs, as SVG. Needs matplotlib, which is an extra: `pip install 'baton[plots]'`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class NoPlots(Exception):
    """matplotlib is not installed."""


def draw(runs: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """TTFT and TPOT distributions, hit rate and imbalance over time, and goodput against load if loads differ.

    `runs`: `sim_report.figures` with `name`, `policy` and `scale`. Raises `NoPlots`, OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for field, title, unit in (("ttft_s", "TTFT", 1.0), ("tpot_s", "TPOT", 1e3)):
        lines = {run["name"]: _quantiles(run[field], unit) for run in runs}
        label = f"{title}, {'s' if unit == 1.0 else 'ms'}"
        files.append(
            _lines(folder / f"{title.lower()}.svg", lines, label, "share of requests", is_log=field == "ttft_s")
        )
    for field in ("hit_rate", "imbalance"):
        over = {run["name"]: [(part["at_s"] / 60, part[field]) for part in run["windows"]] for run in runs}
        files.append(_lines(folder / f"{field}.svg", over, "minute", field.replace("_", " ")))
    if len({run["scale"] for run in runs}) > 1:
        loads: dict[str, list[tuple[float, float]]] = {}
        for run in sorted(runs, key=lambda run: run["scale"]):
            loads.setdefault(run["policy"], []).append((run["offered_rps"], run["goodput_rps"]))
        files.append(_lines(folder / "goodput.svg", loads, "offered, requests/s", "goodput, requests/s"))
    return files


def draw_capacity(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> Path:
    """Capacity in requests/s against the TPOT limit in ms, a line for each kind of cluster."""
    return _lines(path, lines, "TPOT limit, ms", "capacity, requests/s", marker="o")


def _quantiles(found: Mapping[str, float], unit: float) -> list[tuple[float, float]]:
    return sorted((unit * value, float(name[1:]) / 100) for name, value in found.items() if name.startswith("p"))


def _lines(  # noqa: PLR0913
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    is_log: bool = False,
    marker: str = "",
) -> Path:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoPlots("plots need matplotlib: pip install 'baton[plots]'") from error
    matplotlib.rcParams.update({"svg.hashsalt": "baton", "svg.fonttype": "none"})  # equal runs give equal files
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot([point[0] for point in points], [point[1] for point in points], label=name, marker=marker, lw=1.2)
    axes.set(xlabel=x, ylabel=y, xscale="log" if is_log else "linear")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    return path
