"""docs/deploy.md: its files are files that `baton serve --config` takes, and its flags are flags."""

from __future__ import annotations

import argparse
import re

import pytest
import yaml
from conftest import REPOSITORY

from deploy.commands import parser
from deploy.config_file import keys_of, parse_config
from deploy.serve_arguments import add_serve_arguments

PAGE = (REPOSITORY / "docs" / "deploy.md").read_text()
ELSEWHERE = {  # of ray, docker, kubectl, helm, openssl and what `-f` takes
    *("--head", "--node-ip-address", "--port", "--num-gpus", "--resources", "--object-store-memory", "--address"),
    *("--include-dashboard", "--disable-usage-stats", "--block", "--shm-size", "--build", "--from-literal", "--set"),
}
PARALLEL = re.compile(r"^(prefill_|decode_)?(tensor|pipeline)_parallel_size$")  # as far as this version has them


def blocks(language: str) -> list[str]:
    """Fenced ones, without the indent of the list that they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", PAGE, re.M | re.S)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


def serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return parser


@pytest.mark.parametrize("text", blocks("yaml"))
def test_files_are_taken(text: str) -> None:
    parser = serve_parser()
    known = keys_of(parser)
    kept = {k: v for k, v in yaml.safe_load(text).items() if k in known or not PARALLEL.match(k)}
    assert len(parse_config(parser, yaml.safe_dump(kept))) == len(kept) > 4


def test_flags_are_there() -> None:
    commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    known = {
        name for parser in commands.choices.values() for action in parser._actions for name in action.option_strings
    }
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert len(used) > 15 and used <= known | ELSEWHERE, used - known - ELSEWHERE


def test_each_command_has_the_flags_that_it_is_given() -> None:
    """A command goes on over a line that ends with a backslash, and ends at a quote, a pipe, a comment or a `&&`."""
    commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    asked = re.findall(r"(?<!install )\bbaton ([a-z]+)((?:\\\n|[^\n`|&#])*)", PAGE)
    given = [(name, flag) for name, rest in asked for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest)]
    assert len(given) > 12
    for name, flag in given:
        assert flag in {option for action in commands.choices[name]._actions for option in action.option_strings}, name


def test_ports_of_the_checklist_are_the_options() -> None:
    assert {"port", "http_port", "admin_port", "metrics_port"} <= set(keys_of(serve_parser()))
