"""`baton plan`, and how the capacity of a cluster is found."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.cli import main
from loadtest.capacity import ATTAINMENT, Capacity, colocated, disaggregated
from loadtest.machines import MACHINES
from loadtest.plan import search
from loadtest.sim_config import SimConfig
from loadtest.trace import make_trace


@pytest.mark.parametrize("num_nodes", [2, 3, 16, 40, 1000])
def test_a_search_finds_the_top_of_a_hill(num_nodes: int) -> None:
    for top in {1, num_nodes // 3 + 1, num_nodes - 1}:
        tried = []

        def merit(prefill: int, top: int = top, tried: list[int] = tried) -> tuple[float, float]:
            assert 1 <= prefill < num_nodes
            tried.append(prefill)
            return -abs(prefill - top), 0.0

        assert search(num_nodes, merit) == top
        assert len(tried) <= 64


def test_a_plan_is_the_best_of_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "--generate",
        "200",
        "--gpus",
        "40",
        "--ttft-slo-s",
        "20",
        "--tpot-slo-ms",
        "80",
        "--scale",
        "2",
    ]
    assert main([*arguments, "--json", str(tmp_path / "out")]) == 0
    data = json.loads((tmp_path / "out").read_bytes())
    runs = {run["name"]: run["goodput_rps"] for run in data["runs"]}
    assert set(runs) == {"1P4D", "2P3D", "3P2D", "4P1D", "5 colocated"}
    assert runs[data["best"]] == max(runs.values()) > 1.4 * runs["1P4D"]
    assert f"best: {data['best']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "words"), [(["--gpus", "9"], "--gpus"), (["--gpus", "8", "--policy", "x"], "--policy")]
)
def test_a_plan_that_cannot_be_made(option: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--generate", "5", *option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"baton plan: {words} must be") and error.count("\n") == 1


def test_capacity_is_where_nine_of_ten_are_just_in_time() -> None:
    config = replace(SimConfig(MACHINES["8xA100"]), ttft_limit_s=10.0)
    capacity = Capacity(make_trace(150, random.Random(0)))
    apart = disaggregated(config, 4, 3)
    found = capacity.of(apart, 0.1) / capacity.offered_rps(1.0)
    assert capacity.attained(apart, found, 0.1) >= ATTAINMENT > capacity.attained(apart, found * 1.3, 0.1)
    together = colocated(config, 4, 256)
    assert capacity.of(together, 0.05) < capacity.of(together, 0.3)  # looser limits carry more
    assert capacity.of(apart, 0.001) == 0.0  # no step is so short


def test_capacity_grows_with_nodes() -> None:
    config = replace(SimConfig(MACHINES["8xA100"]), ttft_limit_s=10.0)
    capacity = Capacity(make_trace(150, random.Random(1)))
    assert capacity.of(disaggregated(config, 6, 4), 0.1) > capacity.of(disaggregated(config, 3, 2), 0.1)
