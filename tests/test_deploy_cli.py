"""The `baton` command: options, errors in one line, and what a client of it sees; against a router made of thin air."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from conftest import POCKET, REPOSITORY
from rich.console import Console

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc
from deploy import commands
from deploy.cli import main
from deploy.client import as_json
from deploy.serve import changes
from deploy.serve_arguments import add_serve_arguments, config_from
from deploy.start_bar import StartBar
from deploy.state import ServeState, StateDir, start_ticks
from deploy.status import arena_table, http_urls, node_table
from kvstore.directory import ArenaRecord, NodeRecord


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return parser.parse_args([str(POCKET), *argv])


# --- serve's options ---


def test_defaults() -> None:
    config = config_from(parse())
    assert (config.prefill, config.decode, config.both) == (1, 1, 0)
    assert (config.host, config.port) == ("127.0.0.1", 0)
    assert config.kv_bytes == 256 * 2**20


def test_both_replaces_the_other_roles_unless_they_are_asked_for() -> None:
    assert config_from(parse("--policy", "conductor")).policy == "conductor"
    config = config_from(parse("--both", "2"))
    assert (config.prefill, config.decode, config.both) == (0, 0, 2)
    config = config_from(parse("--both", "1", "--decode", "3"))
    assert (config.prefill, config.decode, config.both) == (0, 3, 1)


def test_every_option_arrives() -> None:
    argv = "--prefill 2 --decode 3 --host 0.0.0.0 --port 9 --redis-url redis://r --ray-address h:6379 --dtype float16"
    argv += " --block-size 32 --kv-memory 1G --store-memory 2G --max-model-len 512 --num-threads 4 --cluster c"
    argv += " --served-model-name m --prefill-hosts a,b --decode-hosts c --max-batched-tokens 99 --max-requests 7"
    config = config_from(parse(*argv.split()))
    assert (config.prefill, config.decode, config.port, config.host) == (2, 3, 9, "0.0.0.0")
    assert (config.redis_url, config.ray_address, config.cluster) == ("redis://r", "h:6379", "c")
    assert (config.dtype, config.block_size, config.kv_bytes, config.store_bytes) == ("float16", 32, 2**30, 2**31)
    assert (config.max_model_len, config.num_threads, config.model_name) == (512, 4, "m")
    assert (config.prefill_hosts, config.decode_hosts) == (("a", "b"), ("c",))
    assert (config.max_num_batched_tokens, config.max_num_requests) == (99, 7)
    config = config_from(parse("--store-eviction", "lru", "--store-disk-bytes", "3G", "--store-disk-dir", "/var/x"))
    assert (config.store_eviction, config.store_disk_bytes) == ("lru", 3 << 30)
    assert (config.store_disk_dir, config.store_disk_admission) == (Path("/var/x"), "all")
    assert config_from(parse("--store-disk-admission", "second-touch")).store_disk_admission == "second-touch"
    assert config.tenants_file is None
    assert config.pin_cores and not config_from(parse("--no-pin-cores")).pin_cores
    assert config.metrics and not config_from(parse("--no-metrics")).metrics
    assert config.http and not config_from(parse("--no-http")).http
    assert (config.http_port, config_from(parse("--http-port", "8000")).http_port) == (0, 8000)
    assert http_urls(["127.0.0.1:8000", ""]) == ["http://127.0.0.1:8000/v1"]
    assert http_urls(["127.0.0.1:8000"], has_tls=True) == ["https://127.0.0.1:8000/v1"]


def test_a_folder_is_where_the_command_ran(monkeypatch: pytest.MonkeyPatch, short_dir: Path) -> None:
    """Servers and `baton down` run elsewhere."""
    monkeypatch.chdir(short_dir)
    assert config_from(parse("--store-dir", "here")).store_base == short_dir / "here"


# --- the bar of a start ---


def test_bar_tells_how_many_nodes_do_what() -> None:
    bar = StartBar(3, Console(file=io.StringIO(), force_terminal=True))
    assert bar.words == "3 starting"
    bar.show("prefill-0", 0.0)
    bar.show("decode-0", 0.5)
    bar.show("decode-1", 1.0)
    assert bar.words == "1 loading, 1 warming up, 1 up"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bar_is_shown_on_a_terminal_only(is_terminal: bool) -> None:
    out = io.StringIO()
    with StartBar(2, Console(file=out, force_terminal=is_terminal)) as bar:
        bar.show("both-0", 1.0)
    assert ("1 starting, 1 up" in out.getvalue()) is is_terminal


# --- errors ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "/nowhere"], "there is no folder /nowhere"),
        (["serve", str(REPOSITORY)], "has no config.json"),
        (["serve", str(POCKET), "--dtype", "int4"], "dtype 'int4' is not supported"),
        (["serve", str(POCKET), "--ray-address", "127.0.0.1:1"], "no Ray at 127.0.0.1:1"),
        (["serve", str(POCKET), "--ray-address", "here"], "--ray-address must be HOST:PORT, or auto"),
        (["serve", str(POCKET), "--start-timeout", "nan"], "--start-timeout must be above 0"),
        (["serve", str(POCKET), "--otlp-endpoint", "here"], "--otlp-endpoint must be http://"),
        (["serve", str(POCKET), "--port", "8", "--http-port", "8"], "--http-port and --port both ask for port 8"),
        (["serve", str(POCKET), "--port", "9", "--metrics-port", "8"], "--metrics-port and --port both ask for port 9"),
        (["serve", str(POCKET), "--store-dir", "/etc/passwd"], "--store-dir /etc/passwd: cannot be written to: Not a"),
        (
            ["serve", str(POCKET), "--host", "203.0.113.7", "--port", "8"],
            "--port 8: cannot listen there on 203.0.113.7",
        ),
        (["serve", str(POCKET), "--redis-url", "redis://127.0.0.1:1"], "the given Redis does not answer"),
        (["serve", str(POCKET), "--redis-url", "127.0.0.1:1"], "--redis-url"),
        (["status"], "no cluster is up"),
        (["down"], "no cluster is up"),
        (["generate", "hello"], "no cluster is up"),
        (["chat"], "no cluster is up"),
        (["generate", "hello", "--address", "127.0.0.1:1"], "UNAVAILABLE"),
        (["generate", "hello", "--address", "127.0.0.1:1", "--max-tokens", "-1"], "--max-tokens: "),
        (["generate", "hello", "--address", "127.0.0.1:1", "--n", "0"], "--n must be from 1 to 16, got 0"),
        (["generate", "hello", "--address", "127.0.0.1:1", "--tls-ca", "/nowhere"], "--tls-ca: /nowhere: No such file"),
        (["generate", "-", "--address", "127.0.0.1:1"], "not valid UTF-8"),
    ],
)
def test_errors_are_one_line(argv: list[str], message: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *argv, "--state-dir", str(tmp_path / "state")],
        cwd=REPOSITORY,
        input=b"\xff",
        capture_output=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == b""
    lines = result.stderr.decode().strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("baton: error: ")
    assert message in lines[0]


def test_a_state_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["serve", str(POCKET), "--state-dir", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == f"baton: error: --state-dir {tmp_path}/file: cannot be used: File exists\n"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_what_is_no_error_of_ours(error: type[BaseException], status: int, tmp_path: Path) -> None:
    """Ctrl-C, also before anything is read, and a reader that has seen enough: no traceback."""
    code = f"def run(argv): raise {error.__name__}\ncli._run = run\nsys.exit(cli.main())"
    code = f"import sys\nfrom deploy import cli\n{code}"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (status, b"")


def described(parser: argparse.ArgumentParser) -> bool:
    """Whether all options and arguments say what they are for."""
    actions = parser._actions
    inner = [
        sub for action in actions if isinstance(action, argparse._SubParsersAction) for sub in action.choices.values()
    ]
    plain = [action for action in actions if not isinstance(action, argparse._SubParsersAction)]
    return all(action.help for action in plain) and all(map(described, inner))


def test_help_says_what_each_option_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert described(commands.parser())
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("baton ")


@pytest.mark.parametrize("argv", [["config"], ["nonsense"], ["serve", "x", "--kv-memory", "lots"], ["generate"]])
def test_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: baton" in capsys.readouterr().err


def test_a_prompt_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "half a \udcc3 character", "--address", "127.0.0.1:1"]) == 1
    assert "not valid UTF-8" in capsys.readouterr().err


# --- generate and chat ---


class EchoRouter(inference_pb2_grpc.InferenceServicer):
    """Answers with what it was asked, in two pieces."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.keys: list[str | None] = []

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.keys.append(dict(context.invocation_metadata()).get("authorization"))
        said = request.text or request.chat.messages[-1].content
        if said == "refuse":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "all busy")
        yield inference_pb2.GenerateResponse(text="you said ", tokens=[common_pb2.Token(token_id=1)])
        yield inference_pb2.GenerateResponse(
            text=said,
            tokens=[common_pb2.Token(token_id=2)],
            finish_reason=common_pb2.FINISH_REASON_STOP,
            usage=inference_pb2.Usage(prompt_tokens=5, output_tokens=2),
            timeline=inference_pb2.Timeline(decode_node="decode-0"),
        )

    def Explain(
        self, request: inference_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ExplainResponse:
        if request.request_id != "one":
            context.abort(grpc.StatusCode.NOT_FOUND, "no decision")
        decided = inference_pb2.Decision(policy="predict", outcome="both legs", prefill_node="p1", decode_node="d0")
        decided.prefill.add(node_id="p0", queue_s=1.5, cost_s=2.5)
        decided.prefill.add(node_id="p1", queue_s=0.25, num_hit_blocks=17)
        decided.decode.add(node_id="d0", step_s=0.03)
        late = inference_pb2.Decision(
            policy="predict", outcome="rejected", reason="the first token would come too late"
        )
        return inference_pb2.ExplainResponse(decisions=[decided, late], ttft_s=0.5, tpot_s=0.02)

    def GetModel(
        self, request: inference_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GetModelResponse:
        self.keys.append(dict(context.invocation_metadata()).get("authorization"))
        return inference_pb2.GetModelResponse(model="echo", has_chat_template=True)


@pytest.fixture
def router() -> Iterator[tuple[EchoRouter, str]]:
    servicer = EchoRouter()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_generate_streams_text(router: tuple[EchoRouter, str], capsys: pytest.CaptureFixture[str]) -> None:
    servicer, address = router
    argv = ["--temperature", "0", "--max-tokens", "7", "--stop", "a", "--stop", "b", "--seed", str(2**64 - 1)]
    assert main(["generate", "hello", "--address", address, *argv]) == 0
    assert capsys.readouterr().out == "you said hello\n"
    sampling = servicer.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, list(sampling.stop)) == (0.0, 7, ["a", "b"])
    assert sampling.HasField("temperature")
    assert not sampling.HasField("top_p")


def test_limits_and_priority_are_sent(router: tuple[EchoRouter, str], capsys: pytest.CaptureFixture[str]) -> None:
    servicer, address = router
    limits = ["--ttft-slo-ms", "500", "--tpot-slo-ms", "50", "--priority", "-3"]
    assert main(["generate", "hello", "--address", address, *limits]) == 0
    sent = servicer.requests[0]
    assert (sent.ttft_slo_ms, sent.tpot_slo_ms, sent.priority, sent.text) == (500, 50, -3, "hello")
    assert main(["generate", "hello", "--address", address]) == 0
    assert not servicer.requests[1].HasField("ttft_slo_ms")
    assert main(["generate", "hello", "--address", address, "--ttft-slo-ms", "-1"]) == 1
    assert capsys.readouterr().err.startswith("baton: error: ")


def test_explain_shows_each_candidate(
    router: tuple[EchoRouter, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "one", "--address", router[1]]) == 0
    shown = capsys.readouterr().out
    assert "decision 1 of 2, by predict" in shown and "p1 then d0" in shown
    assert "rejected, the first token would come too late" in shown and "TTFT was 0.500 s" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["p0", "1.5000"] in [row[:2] for row in rows]
    assert [">", "p1", "0.2500"] in [row[:3] for row in rows] and [">", "d0", "0.0300"] in [row[:3] for row in rows]
    assert main(["explain", "one", "--address", router[1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decisions"][0]["prefill"][1]["num_hit_blocks"] == 17
    assert main(["explain", "two", "--address", router[1]]) == 1
    assert capsys.readouterr().err == "baton: error: no router keeps a decision on request 'two'\n"


def test_explain_asks_the_next_router_where_one_is_away(
    router: tuple[EchoRouter, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_dir, pid = StateDir(tmp_path), os.getpid()
    state_dir.claim()
    routers = ("127.0.0.1:1", router[1])
    state_dir.write(ServeState(pid, start_ticks(pid), "default", "0123abcd", "echo", "unix:///x", routers))
    assert main(["explain", "one", "--state-dir", str(tmp_path)]) == 0
    assert "decision 1 of 2" in capsys.readouterr().out
    assert main(["explain", "two", "--state-dir", str(tmp_path)]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err, "it may be the one that knows"
    state_dir.release()


def test_generate_from_standard_input_as_json(
    router: tuple[EchoRouter, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert main(["generate", "-", "--address", router[1], "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("you said piped", [1, 2], "stop")
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["timeline"]["decode_node"] == "decode-0"


def test_generate_names_the_status(router: tuple[EchoRouter, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "refuse", "--address", router[1]]) == 1
    assert capsys.readouterr().err == "baton: error: RESOURCE_EXHAUSTED: all busy\n"


def test_the_key_comes_from_the_flag_or_the_environment(
    router: tuple[EchoRouter, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, address = router
    monkeypatch.delenv("BATON_API_KEY", raising=False)
    assert main(["generate", "hello", "--address", address]) == 0
    monkeypatch.setenv("BATON_API_KEY", "from-env\n")
    assert main(["generate", "hello", "--address", address]) == 0
    assert main(["generate", "hello", "--address", address, "--api-key", "from-flag"]) == 0
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    assert main(["chat", "--address", address]) == 0
    assert servicer.keys == [None, "Bearer from-env", "Bearer from-flag", "Bearer from-env"]


@pytest.mark.parametrize("command", [["generate", "x"], ["chat"], ["bench"]])
def test_a_key_that_no_header_can_hold_is_refused_unseen(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("sécret", "sec ret", "sec\nret"):
        assert main([*command, "--address", "127.0.0.1:1", "--api-key", key]) == 1
    assert capsys.readouterr().err == "baton: error: the API key must be printable ASCII without spaces\n" * 3


def test_router_is_found_through_the_state(
    router: tuple[EchoRouter, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_dir = StateDir(tmp_path)
    state_dir.claim()
    pid = os.getpid()
    state_dir.write(ServeState(pid, start_ticks(pid), "default", "0123abcd", "echo", "unix:///x", (router[1],)))
    assert main(["generate", "hello", "--state-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "you said hello\n"
    state_dir.release()


def test_chat_keeps_the_conversation(
    router: tuple[EchoRouter, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["first", "refuse", "  ", "second", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "--address", router[1], "--system", "be brief"]) == 0
    said = [(message.role, message.content) for message in router[0].requests[-1].chat.messages]
    assert said == [("system", "be brief"), ("user", "first"), ("assistant", "you said first"), ("user", "second")]
    assert "RESOURCE_EXHAUSTED: all busy; this turn is forgotten" in capsys.readouterr().err


def test_json_of_an_answer_has_every_field() -> None:
    fields = as_json([inference_pb2.GenerateResponse(finish_reason=common_pb2.FINISH_REASON_LENGTH)])
    assert fields["finish_reason"] == "length"
    assert isinstance(fields["timeline"], dict)
    assert set(fields["timeline"]) == {field.name for field in inference_pb2.Timeline.DESCRIPTOR.fields}


# --- status ---


def test_changes_are_told_once() -> None:
    assert changes({}, {"a": "1"}) == []
    assert changes({"a": "1"}, {}) == ["a is gone"]
    assert changes({"a": ""}, {}) == []
    assert changes({"a": ""}, {"a": "1"}) == ["a is back"]
    assert changes({"a": "1"}, {"a": "2"}) == ["a is back"]


def test_tables_show_every_member() -> None:
    node = NodeRecord(
        **{
            field: "x"
            for field in ("node_id", "incarnation", "role", "address", "model", "kv_root", "arena_id", "host")
        },
        **{field: 1 for field in ("block_size", "block_bytes", "vocab_size", "max_model_len", "num_running")},
        **{field: 1 for field in ("num_waiting", "queued_prefill_tokens", "free_blocks", "total_blocks")},
        draining=True,
        prefill_tokens_per_s=0.0,
        decode_step_s=0.0,
    )
    assert node_table([node, node]).row_count == 2
    arena = ArenaRecord(arena_id="x", address="tcp://x", host="x", num_slots=4, free_slots=1, slot_bytes=2**20)
    assert list(arena_table([arena]).columns[3].cells) == ["3/4"]
    assert list(arena_table([arena]).columns[5].cells) == ["none"]
    arena = replace(arena, draining=True, metrics_address="10.0.0.1:9100")
    assert list(arena_table([arena]).columns[0].cells) == ["x (draining)"]
    assert list(arena_table([arena]).columns[5].cells) == [":9100"]
    assert list(node_table([replace(node, metrics_address="[::1]:9101")]).columns[9].cells) == [":9101"]


def test_status_of_a_cluster_that_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state_dir = StateDir(tmp_path)
    state_dir.claim()
    state = ServeState(os.getpid(), start_ticks(os.getpid()), "default", "0123abcd", "pocket", "")
    state_dir.write(state)
    assert main(["status", "--state-dir", str(tmp_path)]) == 0
    assert "is starting pocket" in capsys.readouterr().err
    for command in (["generate", "hello"], ["nodes"], ["explain", "x"]):
        assert main([*command, "--state-dir", str(tmp_path)]) == 1
        assert "still starting" in capsys.readouterr().err
    state_dir.write(replace(state, routers=("127.0.0.1:1",), router_admins=("127.0.0.1:2",), has_tls=True))
    for command in (["generate", "hello"], ["nodes"], ["explain", "x"]):
        assert main([*command, "--state-dir", str(tmp_path)]) == 1
        assert "--tls-ca FILE" in capsys.readouterr().err
    state_dir.release()


def test_down_sweeps_up_after_a_killed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "baton-0123abcd").mkdir()
    StateDir(tmp_path).write(ServeState(1, 1, "default", "0123abcd", "pocket", "", (), (str(tmp_path),)))
    assert main(["down", "--state-dir", str(tmp_path)]) == 0
    assert "baton-0123abcd" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
