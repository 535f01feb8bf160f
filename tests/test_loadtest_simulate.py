"""`baton simulate` and what it prints: tables, the same JSON for the same seed, errors that name the option."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import main
from loadtest.sim_report import distribution, hit_rate, imbalance, windows
from loadtest.simulate import number

SMALL = ["--generate", "80", "--prefill", "2", "--decode", "1"]


def test_a_table_and_the_same_bytes_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = []
    for name in ("one.json", "two.json"):
        path = str(tmp_path / name)
        assert main(["simulate", *SMALL, "--policy", "random", "predict", "--scale", "1", "2", "--json", path]) == 0
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    data = json.loads(written[0])
    assert [run["name"] for run in data["runs"]] == ["random x1", "predict x1", "random x2", "predict x2"]
    assert data["cluster"]["prefill"] == 2 and data["runs"][0]["requests"] == 80
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("predict x2", "hit rate", "goodput"))
    assert main(["simulate", *SMALL, "--seed", "1", "--json", str(tmp_path / "other.json")]) == 0
    assert json.loads((tmp_path / "other.json").read_bytes())["runs"] != data["runs"]


def test_a_file_is_read_with_faults_and_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"timestamp": 0, "input_length": 3000, "output_length": 9, "hash_ids": [0, 1, 2, 3, 4, 5]}
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(json.dumps(line | {"timestamp": 3000 * at}) for at in range(20)))
    arguments = ["simulate", str(trace), "--prefill", "2", "--limit", "9", "--ttft-slo-s", "30", "--tpot-slo-ms", "90"]
    arguments += ["--fault", "kill:prefill-0@9", "--eviction", "s3fifo", "--queue", "fcfs"]
    assert main([*arguments, "--json", str(tmp_path / "out")]) == 0
    run = json.loads((tmp_path / "out").read_bytes())["runs"][0]
    assert run["requests"] == 9 and run["attained"] == 1.0
    assert "9 requests, 2 prefill + 8 decode nodes of 8xA100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a TRACE"),
        (["x.jsonl", "--generate", "3"], "name a TRACE"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        ([*SMALL, "--policy", "best"], "--policy must be one of predict, random"),
        ([*SMALL, "--eviction", "fifo"], "--eviction must be one of lru, s3fifo"),
        ([*SMALL, "--queue", "lifo"], "--queue must be one of shortest, fcfs"),
        ([*SMALL, "--machine", "1xTPU"], "machine must be one of 8xA100, 8xH100"),
        ([*SMALL, "--fault", "kill:decode-7@3"], "no node 'decode-7'"),
        ([*SMALL, "--fault", "burn"], "write it like"),
        ([*SMALL[:2], "--prefill", "0"], "--prefill and --decode"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("baton simulate: ") and words in error and error.count("\n") == 1


def test_a_broken_trace_names_line_and_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t").write_text('{"timestamp": -5}')
    assert main(["simulate", str(tmp_path / "t")]) == 2
    assert "t, line 1: timestamp must be" in capsys.readouterr().err


def test_numbers_have_limits(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--prefill", "-1"], ["--scale", "0"], ["--generate", "nan"], ["--ttft-slo-s", "nan"]):
        with pytest.raises(SystemExit):
            main(["simulate", *arguments])
        assert arguments[0] in capsys.readouterr().err
    assert number(int, 1)("5") == 5


def test_without_matplotlib_plots_are_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["simulate", *SMALL, "--plots", str(tmp_path)]) == 2
    assert "pip install 'baton[plots]'" in capsys.readouterr().err


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["simulate", *SMALL, "--scale", "1", "2", "--plots", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.svg" for name in (
        "ttft", "tpot", "hit_rate", "imbalance", "goodput"
    )}  # fmt: skip


def test_nothing_is_nothing() -> None:
    assert distribution([])["p99"] == 0.0 and hit_rate([]) == 0.0 and imbalance([]) == 1.0


def test_windows_leave_out_the_rejected() -> None:
    from loadtest.sim_nodes import Job
    from loadtest.trace import TracedRequest

    jobs = [Job(TracedRequest(at_s, 512, 2, (1,)), 0, hit_blocks=at_s > 60, computed_tokens=9) for at_s in (5, 70, 80)]
    jobs[2].rejected = "TTFT"
    assert [(part["at_s"], part["hit_rate"]) for part in windows(jobs)] == [(0.0, 0.0), (60.0, 1.0)]
