"""One YAML for all of `baton serve`'s options: every flag is a key, and nothing else is."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import POCKET, REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from deploy.cli import main
from deploy.commands import parser
from deploy.config import ConfigError
from deploy.config_file import is_secret, keys_of, parse_config, parse_with_file, shown
from deploy.serve_arguments import add_serve_arguments, config_from


def serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return parser


KEYS = keys_of(serve_parser())


def a_value(action: argparse.Action) -> tuple[Any, list[str]]:
    """A value that is not the default, as a file has it and as the command line has it."""
    flag = max(action.option_strings, key=len, default="").replace("--no-", "--")
    if action.nargs == 0:
        return not action.default, [flag if not action.default else flag.replace("--", "--no-", 1)]
    if action.choices is not None:
        other = next(choice for choice in action.choices if choice != action.default)
        return other, [flag, other]
    kinds: dict[Any, tuple[Any, str]] = {int: (7, "7"), float: (2.5, "2.5"), Path: ("/x/y", "/x/y"), None: ("ab", "ab")}
    if isinstance(action.default, tuple):
        return ["a", "b"], [flag, "a,b"]
    value, word = kinds.get(action.type, ("3G", "3G"))
    return value, [flag, word] if flag else [word]


@pytest.mark.parametrize("key", KEYS)
def test_every_flag_is_a_key_and_means_the_same(key: str) -> None:
    value, argv = a_value(KEYS[key])
    dest = KEYS[key].dest
    expected = getattr(serve_parser().parse_args(argv), dest)
    assert expected != KEYS[key].default
    for name in (key, key.replace("_", "-")):
        parser = serve_parser()
        parser.set_defaults(**parse_config(parser, yaml.safe_dump({name: value})))
        assert getattr(parser.parse_args([]), dest) == expected


@pytest.mark.parametrize("key", KEYS)
def test_wrong_types_are_refused_by_line_and_key(key: str) -> None:
    for wrong in ({"a": 1}, [[1]], "true" if KEYS[key].nargs == 0 else True):
        with pytest.raises(ConfigError, match=rf"^line 2: {key}: must be "):
            parse_config(serve_parser(), f"# a comment\n{yaml.safe_dump({key: wrong}, default_flow_style=True)[1:-2]}")


def test_null_is_the_default() -> None:
    parser = serve_parser()
    parser.set_defaults(**parse_config(parser, "".join(f"{key}: null\n" for key in KEYS)))
    assert vars(parser.parse_args([])) == vars(serve_parser().parse_args([]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prefil: 2", "line 1: unknown key 'prefil'; did you mean 'prefill'?"),
        ("\nkv-memroy: 2G", "line 2: unknown key 'kv-memroy'; did you mean 'kv_memory'?"),
        ("zzz: 1", "line 1: unknown key 'zzz'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("no_metrics: true", "unknown key 'no_metrics'"),
        ("port: 1\nport: 2", "line 2: port is given twice"),
        ("kv-memory: 1G\nkv_memory: 2G", "line 2: kv_memory is given twice"),
        ("kv_memory: 5X", "line 1: kv_memory: '5X' is no amount of memory"),
        ("policy: best", "line 1: policy: must be one of "),
        ("port: '8200'", "line 1: port: must be a whole number, got '8200'"),
        ("served_model_name: 7", "line 1: served_model_name: must be text, got 7 (quote it?)"),
        ("prefill_hosts: [1]", "line 1: prefill_hosts: must be a list of names"),
        ("- a", "must be `key: value` lines"),
        ("a: [", "no YAML"),
        ("model: !!python/object:os.system x", "no YAML"),
        ("? [a]\n: 1", "unknown key"),
        ("[" * 5000, "no YAML"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(serve_parser(), text)
    assert message in str(error.value) and "\n" not in str(error.value)


@given(st.text(max_size=60))
def test_no_text_is_more_than_refused(text: str) -> None:
    try:
        parse_config(serve_parser(), text)
    except ConfigError:
        pass


def test_the_command_line_goes_before_the_file_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text(f"model: {POCKET}\nprefill: 3\nport: 9\nmetrics: false\n")
    for argv in (["serve", "--port", "0", "--config", str(file)], ["serve", "--config", str(file), "--port", "0"]):
        config = config_from(parse_with_file(parser(), argv))
        assert (config.model_dir, config.prefill, config.port, config.metrics) == (POCKET, 3, 0, False)
    assert config_from(parse_with_file(parser(), ["serve", "--config", str(file), "--metrics"])).metrics
    other = parse_with_file(parser(), ["serve", str(REPOSITORY), "--config", str(file)])
    assert other.model == REPOSITORY


def test_what_is_shown_reads_back_to_the_same() -> None:
    parser = serve_parser()
    argv = [word for key in KEYS for word in a_value(KEYS[key])[1]]
    for args in (parser.parse_args([]), parser.parse_args(argv)):
        again = serve_parser()
        again.set_defaults(**parse_config(again, shown(parser, args)))
        assert vars(again.parse_args([])) == vars(args)


def test_secrets_are_not_shown() -> None:
    parser = serve_parser()
    args = parser.parse_args(["--redis-url", "redis://:hunter2@r:6379"])
    assert "hunter2" not in shown(parser, args) and "# redis_url: set, and not shown" in shown(parser, args)
    assert is_secret("cluster_token", "abc") and is_secret("redis_url", "redis://r?password=x")
    assert not is_secret("max_batched_tokens", 512) and not is_secret("cluster_token_file", Path("/run/token"))


def test_show_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text(f"model: {POCKET}\nboth: 2\n")
    assert main(["config", "show", str(file)]) == 0
    assert "both: 2\n" in capsys.readouterr().out
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: well (pocket: both, both)\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no MODEL"),
        ("model: /nowhere", "there is no folder /nowhere"),
        (f"model: {REPOSITORY}", "has no config.json"),
        (f"model: {POCKET}\ndtype: int4", "dtype 'int4' is not supported"),
        (f"model: {POCKET}\nprefill: -1", "--prefill, --decode and --both must be 0 or more"),
        (f"model: {POCKET}\ntensor_parallel_size: 3", "tensor_parallel_size 3 does not divide num_attention_heads (4)"),
        (f"model: {POCKET}\ntenants: /no.toml", "--tenants: "),
        ("modle: x", "baton.yaml: line 1: unknown key 'modle'; did you mean 'model'?"),
    ],
)
def test_check_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text(text)
    assert main(["config", "check", str(file)]) == 1
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """In a process of its own, as people see it: one line, no traceback."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "bytes", "."):
        argv = [sys.executable, "-m", "deploy.cli", "serve", "--config", str(tmp_path / name)]
        result = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith(f"baton: error: --config: {tmp_path}")
