"""`baton bench` in whole, against a scripted router over gRPC and a scripted OpenAI server over HTTP."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_server import OpenAiServer
from scripted_router import RouterThread

from loadtest import bench, flags


@pytest.fixture
def router() -> Iterator[RouterThread]:
    thread = RouterThread()
    yield thread
    thread.close()


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    thread = OpenAiServer()
    yield thread
    thread.close()


def arguments(server: RouterThread | OpenAiServer, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    address = server.address if isinstance(server, RouterThread) else server.base_url
    common = ["--address", address, "--input-len", "32", "--output-len", "5", "--max-client-lag-ms", "0"]
    return parser.parse_args([*common, *words])


def prompts_of(router: RouterThread) -> list[tuple[int, ...]]:
    return [tuple(request.tokens.token_ids) for request in router.service.requests]


def test_run_closed_loop(router: RouterThread, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    router.service.pause_s = 0.002
    out = tmp_path / "bench.json"
    args = arguments(router, "--num-prompts", "12", "--max-concurrency", "3", "--json", str(out))
    assert bench.run(args) == 0
    text = capsys.readouterr().out
    assert text.startswith("============ Serving Benchmark Result ============\n")
    assert "Successful requests:                     12        \n" in text
    assert "Total generated tokens:                  60        \n" in text
    assert "Prefix hit rate (%):                     50.00     \n" in text
    assert router.service.most_in_flight == 3
    content = json.loads(out.read_text())
    assert (content["completed"], content["config"]["max_concurrency"]) == (12, 3)
    assert [request["index"] for request in content["requests"]] == list(range(12))


def test_a_key_goes_with_each_call_and_into_no_file(router: RouterThread, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    flags = ["--num-prompts", "3", "--warmup", "1", "--json", str(out)]
    assert bench.run(arguments(router, *flags, "--api-key", "my-key")) == 0
    assert router.service.keys == {"Bearer my-key"}
    assert "my-key" not in out.read_text()
    router.service.keys.clear()
    assert bench.run(arguments(router, *flags)) == 0
    assert router.service.keys == {None}


def test_run_poisson_with_warmup(router: RouterThread) -> None:
    assert bench.run(arguments(router, "--num-prompts", "8", "--request-rate", "200", "--warmup", "3")) == 0
    prompts = prompts_of(router)
    assert len(prompts) == 11
    assert len(set(prompts)) == 11  # what warmed up is not asked again
    sampling = router.service.requests[-1].sampling
    assert (sampling.max_tokens, sampling.ignore_eos, sampling.temperature) == (5, True, 0.0)
    assert len({request.sampling.seed for request in router.service.requests}) == 11


def test_prompts_are_fresh_unless_they_are_to_be_repeated(router: RouterThread) -> None:
    seeded, repeated = ["--seed", "5"], ["--seed", "5", "--reuse-prompts"]
    for words in ([], [], seeded, seeded, repeated, repeated):
        assert bench.run(arguments(router, "--num-prompts", "2", "--max-concurrency", "1", *words)) == 0
    runs = [prompts_of(router)[i : i + 2] for i in range(0, 12, 2)]
    assert runs[4] == runs[5]
    assert len({tuple(run) for run in runs}) == 5
    seeds = [request.sampling.seed for request in router.service.requests]
    assert seeds[4:6] == seeds[6:8] and seeds[:2] != seeds[2:4]


def test_run_shared_prefixes(router: RouterThread) -> None:
    flags = ["--dataset", "shared-prefix", "--prefix-len", "24", "--num-prefixes", "2", "--num-prompts", "6"]
    assert bench.run(arguments(router, *flags, "--no-ignore-eos", "--temperature", "0.5")) == 0
    assert len({prompt[:24] for prompt in prompts_of(router)}) == 2
    assert len(set(prompts_of(router))) == 6
    assert all(0 <= token < 50 for prompt in prompts_of(router) for token in prompt)
    assert not router.service.requests[0].sampling.ignore_eos


def test_failures_are_counted_and_shown(router: RouterThread, capsys: pytest.CaptureFixture[str]) -> None:
    router.service.fault = "busy"
    assert bench.run(arguments(router, "--num-prompts", "9")) == 1
    captured = capsys.readouterr()
    assert "Successful requests:                     6         \n" in captured.out
    assert "Failed requests:                         3         \n" in captured.out
    assert "3 x RESOURCE_EXHAUSTED: all nodes are busy" in captured.err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--input-len", "600"], "more than the 512 tokens"),
        (["--dataset", "shared-prefix", "--prefix-len", "32"], "the prefix must have 1 to 31 tokens"),
        (["--address", ""], "--address"),
    ],
)
def test_a_run_that_cannot_be_is_refused(
    router: RouterThread, capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    assert bench.run(arguments(router, *flags)) == 2
    assert reason in capsys.readouterr().err
    assert router.service.requests == []


@pytest.mark.parametrize(
    "flags", [["--num-prompts", "0"], ["--request-rate", "0"], ["--request-rate", "nan"], ["--seed", "-1"]]
)
def test_flags_out_of_range_are_named(
    router: RouterThread, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments(router, *flags)
    assert flags[0] in capsys.readouterr().err


# --- conversations ---


def test_each_turn_has_the_answer_before(router: RouterThread) -> None:
    words = ["--dataset", "multi-turn", "--turns", "3", "--think-time", "0.001", "--num-prompts", "4"]
    assert bench.run(arguments(router, *words)) == 0
    prompts = sorted(prompts_of(router), key=len)
    assert [len(prompt) for prompt in prompts] == [32] * 4 + [69] * 4 + [106] * 4
    for first, second in ((prompts[:4], prompts[4:8]), (prompts[4:8], prompts[8:])):
        assert {prompt[: len(first[0]) + 5] for prompt in second} == {(*prompt, *[7] * 5) for prompt in first}


def test_a_turn_that_fails_ends_its_conversation(
    router: RouterThread, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    router.service.fault = "cut"
    out = tmp_path / "bench.json"
    words = ["--dataset", "multi-turn", "--turns", "3", "--num-prompts", "2", "--result-json", str(out)]
    assert bench.run(arguments(router, *words)) == 1
    assert "Turns not sent after a failure:          4         \n" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert (content["failed"], content["unsent"]) == (2, 4)
    assert "requests" not in content


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_conversations_over_http(server: OpenAiServer, backend: str) -> None:
    words = ["--backend", backend, "--dataset", "multi-turn", "--turns", "2", "--num-prompts", "1"]
    assert bench.run(arguments(server, *words)) == 0
    first, second = server.bodies
    if backend == "openai":
        assert second["prompt"].startswith(first["prompt"] + " é" * 5)
    else:
        said = second["messages"]
        assert said[:1] == first["messages"] and said[1] == {"role": "assistant", "content": " é" * 5}
        assert [message["role"] for message in said] == ["user", "assistant", "user"]


# --- other data ---


def test_lengths_like_sharegpt(server: OpenAiServer) -> None:
    words = ["--backend", "openai", "--dataset", "sharegpt", "--num-prompts", "10", "--seed", "1"]
    assert bench.run(arguments(server, *words)) == 0
    assert len({len(body["prompt"]) for body in server.bodies}) > 5
    assert len({body["max_tokens"] for body in server.bodies}) > 5


def test_a_sharegpt_file(router: RouterThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.json"
    said = [
        {"from": "human", "value": "How do you do, stranger?"},
        {"from": "gpt", "value": "Quite well, I thank you."},
    ]
    file.write_text(json.dumps([{"conversations": said}] * 3))
    words = ["--dataset", "sharegpt", "--dataset-path", str(file)]
    assert bench.run(arguments(router, *words)) == 0
    assert {request.text for request in router.service.requests} == {"How do you do, stranger?"}
    file.write_text("[7]")
    assert bench.run(arguments(router, *words)) == 2
    assert "--dataset-path: s.json, conversation 0" in capsys.readouterr().err


def test_a_trace_is_replayed(router: RouterThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1024, "output_length": 96, "hash_ids": [1, 2]},
        {"timestamp": 100, "input_length": 1500, "output_length": 32, "hash_ids": [1, 2, 3]},
        {"timestamp": 150, "input_length": 51200, "output_length": 32, "hash_ids": list(range(100))},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset", "trace", "--dataset-path", str(file), "--trace-grain", "0", "--time-scale", "2"]
    words += ["--trace-block-tokens", "16"]
    assert bench.run(arguments(router, *words, "--json", str(tmp_path / "out.json"))) == 0
    first, second = prompts_of(router)
    assert (len(first), len(second)) == (32, 47) and second[:32] == first
    assert [request.sampling.max_tokens for request in router.service.requests] == [3, 1]
    assert "1 requests are longer than the model takes and are left out" in capsys.readouterr().err
    content = json.loads((tmp_path / "out.json").read_text())
    assert [request["scheduled_s"] for request in content["requests"]] == [0.0, 0.05]
    file.write_text("7\n")
    assert bench.run(arguments(router, *words)) == 2
    assert "trace.jsonl, line 1: must be an object" in capsys.readouterr().err


# --- over HTTP ---


def test_run_over_http(server: OpenAiServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--backend", "openai", "--num-prompts", "12", "--max-concurrency", "3", "--metric-percentiles", "50,90"]
    server.script.first_pause_s = 0.005
    assert bench.run(arguments(server, *words)) == 0
    text = capsys.readouterr().out
    assert "Total generated tokens:                  60        \n" in text
    assert "Total input tokens:                      384       \n" in text
    assert "Prefix hit rate (%):                     50.00     \n" in text
    assert "P90 TTFT (ms):" in text and "P99 TTFT" not in text
    assert server.most_in_flight == 3
    assert all(max(body["prompt"]) < 256 for body in server.bodies)


def test_errors_over_http(server: OpenAiServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.script.status, server.script.body = 429, '{"error": {"message": "busy"}}'
    assert bench.run(arguments(server, "--backend", "openai-chat", "--num-prompts", "3")) == 1
    assert "3 x HTTP 429: busy" in capsys.readouterr().err


def test_the_key_over_http_is_in_no_file(server: OpenAiServer, tmp_path: Path) -> None:
    files = tmp_path / "r.json", tmp_path / "r.html"
    words = ["--backend", "openai", "--api-key", "my-key", "--json", str(files[0]), "--report", str(files[1])]
    assert bench.run(arguments(server, *words, "--num-prompts", "2")) == 0
    assert server.keys == {"Bearer my-key"}
    assert not any("my-key" in file.read_text() for file in files)


# --- clients that leave or misbehave ---


@pytest.mark.parametrize("backend", ["grpc", "openai", "openai-chat"])
def test_bad_clients_are_counted_apart(
    router: RouterThread, server: OpenAiServer, backend: str, tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    words = ["--backend", backend, "--num-prompts", "16", "--cancel-rate", "0.25", "--cancel-after", "2"]
    words += ["--bad-clients", "0.5", "--oversized-bytes", "2000000", "--json", str(out), "--output-len", "4"]
    assert bench.run(arguments(router if backend == "grpc" else server, *words)) == 0
    content = json.loads(out.read_text())
    assert (content["completed"], content["failed"]) == (4, 0)
    assert content["misbehaved"] == {
        "cancel": {"left": 4},
        "disconnect": {"left": 2},
        "malformed": {"refused": 2},
        "oversized": {"refused": 2},
        "slow-reader": {"served": 2},
    }
    assert len(content["requests"]) == 16


def test_the_seed_fixes_who_misbehaves(router: RouterThread, tmp_path: Path) -> None:
    kinds = []
    for run in "ab":
        out = tmp_path / f"{run}.json"
        words = ["--num-prompts", "12", "--cancel-rate", "0.5", "--seed", "3", "--json", str(out)]
        assert bench.run(arguments(router, *words)) == 0
        kinds.append([request["kind"] for request in json.loads(out.read_text())["requests"]])
    assert kinds[0] == kinds[1] and kinds[0].count("cancel") == 6


# --- objectives ---


def test_goodput(router: RouterThread, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    router.service.pause_s = 0.01
    words = ["--num-prompts", "4", "--goodput", "ttft:60000", "tpot:60000"]
    assert bench.run(arguments(router, *words)) == 0
    text = capsys.readouterr().out
    figures = dict(line.rsplit(maxsplit=1) for line in text.splitlines() if line.startswith("Request "))
    assert figures["Request goodput (req/s):"] == figures["Request throughput (req/s):"]
    assert bench.run(arguments(router, "--num-prompts", "4", "--goodput", "tpot:9")) == 0  # it takes 10 at least
    assert "Request goodput (req/s):                 0.00      " in capsys.readouterr().out


def test_a_sweep_finds_what_was_met(router: RouterThread, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, page = tmp_path / "s.json", tmp_path / "s.html"
    words = ["--sweep", "--sweep-start", "100", "--sweep-max", "400", "--sweep-seconds", "0.05", "--num-prompts", "8"]
    words += ["--goodput", "ttft:60000", "--result-json", str(out), "--report", str(page)]
    assert bench.run(arguments(router, *words)) == 0
    assert "Highest rate that meets the objectives for 90 % of requests: 400.00 req/s" in capsys.readouterr().out
    sweep = json.loads(out.read_text())["sweep"]
    assert [step["request_rate"] for step in sweep["steps"]] == [100.0, 200.0, 400.0]
    assert [step["completed"] for step in sweep["steps"]] == [8, 10, 20]
    assert len(set(prompts_of(router))) == 38  # no step finds the prompts of another
    assert "Goodput against rate" in page.read_text()


def test_a_sweep_in_which_nothing_is_met(router: RouterThread, capsys: pytest.CaptureFixture[str]) -> None:
    router.service.pause_s = 0.002
    words = ["--sweep", "--sweep-start", "500", "--sweep-seconds", "0", "--num-prompts", "2", "--goodput", "tpot:1"]
    assert bench.run(arguments(router, *words)) == 1
    assert "No rate that was tried" in capsys.readouterr().out


# --- the client itself ---


def test_a_late_client_prints_no_figures(
    router: RouterThread, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    words = ["--num-prompts", "20", "--max-client-lag-ms", "0.000001", "--json", str(out)]
    assert bench.run(arguments(router, *words)) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no figures: the client was late itself" in captured.err and "--client-processes" in captured.err
    assert not out.exists()


def test_a_sweep_keeps_what_was_measured_before_the_client_was_late(
    router: RouterThread, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lags = iter(["", "", "it was late"])
    monkeypatch.setattr(bench, "lag_of", lambda report, limit_ms: next(lags))
    words = ["--sweep", "--sweep-start", "100", "--sweep-seconds", "0", "--num-prompts", "2", "--goodput", "ttft:60000"]
    assert bench.run(arguments(router, *words)) == 3
    captured = capsys.readouterr()
    assert "90 % of requests: 200.00 req/s" in captured.out
    assert "no figures from 400.00 req/s on: it was late" in captured.err


@pytest.mark.parametrize("backend", ["grpc", "openai"])
def test_several_client_processes_send_the_same(
    router: RouterThread, server: OpenAiServer, backend: str, tmp_path: Path
) -> None:
    target = router if backend == "grpc" else server
    common = ["--backend", backend, "--num-prompts", "7", "--seed", "1", "--reuse-prompts", "--dataset", "multi-turn"]
    common += ["--turns", "2", "--cancel-rate", "0.3", "--max-concurrency", "3", "--warmup", "2"]
    contents = []
    for count in ("1", "3"):
        out = tmp_path / f"{count}.json"
        assert bench.run(arguments(target, *common, "--client-processes", count, "--json", str(out))) == 0
        contents.append(json.loads(out.read_text()))
    for name in ("completed", "total_input_tokens", "total_output_tokens", "misbehaved"):
        assert contents[0][name] == contents[1][name]
    rows = [[(r["index"], r["turn"], r["kind"]) for r in content["requests"]] for content in contents]
    assert rows[0] == rows[1] and [row[0] for row in rows[1]] == list(range(14))
    assert multiprocessing.active_children() == []


def test_a_client_process_that_dies_is_named(
    router: RouterThread, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other processes do not find their code.
    monkeypatch.setattr("multiprocessing.spawn.get_preparation_data", lambda name: {"sys_path": [], "name": name})
    assert bench.run(arguments(router, "--num-prompts", "4", "--client-processes", "2")) == 2
    assert "a client process died" in capsys.readouterr().err
    assert multiprocessing.active_children() == []


def test_waiting_for_a_place_is_not_the_clients_lateness(router: RouterThread, tmp_path: Path) -> None:
    router.service.pause_s = 0.01
    out = tmp_path / "bench.json"
    assert bench.run(arguments(router, "--num-prompts", "6", "--max-concurrency", "1", "--json", str(out))) == 0
    content = json.loads(out.read_text())
    assert content["max_send_delay_ms"] >= 5 * 50
    for request in content["requests"][1:]:
        assert request["sent_s"] >= request["ready_s"] > request["scheduled_s"]


# --- the command ---


def test_results_side_by_side(router: RouterThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from deploy.cli import main

    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    for file in files:
        assert bench.run(arguments(router, "--num-prompts", "3", "--json", file)) == 0
    page = tmp_path / "cmp.html"
    assert main(["bench", "report", *files, "--out", str(page)]) == 0
    assert all(file in page.read_text() for file in files)
    (tmp_path / "no.json").write_text("{}")
    assert main(["bench", "report", str(tmp_path / "no.json"), "--out", str(page)]) == 2
    assert "no result of `baton bench`" in capsys.readouterr().err


def test_the_command_over_http(server: OpenAiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.cli import main

    monkeypatch.setenv("BATON_API_KEY", "from-env")
    words = ["--num-prompts", "2", "--input-len", "8", "--output-len", "2", "--max-client-lag-ms", "0"]
    assert main(["bench", "--backend", "openai", "--base-url", server.base_url + "/v1", *words]) == 0
    assert server.keys == {"Bearer from-env"}
    assert main(["bench", "--backend", "openai", *words]) == 2  # anybody's server: it must be named


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--sweep"], "--sweep needs --goodput"),
        (["--sweep", "--goodput", "ttft:5", "--request-rate", "3"], "--sweep chooses the rate"),
        (["--sweep", "--goodput", "ttft:5", "--sweep-start", "5", "--sweep-max", "2"], "above --sweep-max"),
        (["--goodput", "itl:5"], "--goodput: 'itl:5'"),
        (["--dataset", "trace", "--request-rate", "3"], "--time-scale"),
        (["--ramp-up-strategy", "linear"], "goes with --ramp-up-start-rps"),
        (["--ramp-up-end-rps", "3"], "need --ramp-up-strategy"),
        (["--backend", "openai", "--ttft-slo-ms", "5"], "over gRPC only"),
        (["--cancel-rate", "0.6", "--bad-clients", "0.6"], "1 at most together"),
        (["--tls-ca", "/nowhere.pem"], "--tls-ca names no file"),
        (["--tls-cert", "/nowhere.pem"], "--tls-cert and --tls-key go together"),
        (["--tls", "--backend", "openai", "--address", "http://x"], "over TLS it must be HOST:PORT or https://"),
        (["--turns", "2"], "--turns is for"),
        (["--dataset", "trace", "--dataset-path", "/nowhere"], "--dataset-path"),
        (["--backend", "openai", "--address", "ftp://x"], "must be HOST:PORT"),
        (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
        (["--report", "/"], "cannot write /: Is a directory"),
        (["--dataset", "multi-turn", "--turns", "20"], "20 turns of --input-len 32 + --output-len 5 is more than"),
    ],
)
def test_flags_that_do_not_go_together(
    router: RouterThread, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert bench.run(arguments(router, *words)) == 2
    assert reason in capsys.readouterr().err
    assert router.service.requests == []
