"""`docs/options.md` has all commands, all options of `baton serve` with their defaults, and all variables."""

from __future__ import annotations

import argparse
import re

import pytest
import yaml
from conftest import REPOSITORY

from deploy.commands import parser as baton
from deploy.config_file import keys_of, parse_config
from deploy.node_config import NodeConfig
from deploy.serve_arguments import add_serve_arguments
from kvstore.server import StoreConfig
from router.config import RouterConfig

PAGE = (REPOSITORY / "docs" / "options.md").read_text()
CONFIGS = {cls.__name__: cls for cls in (NodeConfig, StoreConfig, RouterConfig)}
SHIPPED = ("engine", "kvstore", "grammar", "node", "prefill_node", "decode_node", "router", "deploy", "loadtest")


def rows(section: str) -> list[tuple[list[str], str]]:
    """(what is in backticks in the first column, the second column) of each row of a section's tables."""
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0].replace("\\|", "/")
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", row[0]), row[1].strip()) for row in cells]


def serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return parser


def test_all_commands_are_there() -> None:
    (commands,) = [action for action in baton()._actions if isinstance(action, argparse._SubParsersAction)]
    told = [names[0].split()[1] for names, _ in rows("Commands")]
    assert sorted(told) == sorted(commands.choices)


def test_all_options_of_serve_are_there_with_their_defaults() -> None:
    parser = serve_parser()
    told = {name: default for names, default in rows("`baton serve`") for name in names}
    actions, args = keys_of(parser), parser.parse_args([])
    assert told.keys() == actions.keys()
    file = "".join(f"{name}: {default}\n" for name, default in told.items() if default)
    values = parse_config(parser, file)
    for name, action in actions.items():
        if name != "state_dir":  # which hangs on the environment
            default = getattr(args, action.dest)
            assert values[action.dest] == default if told[name] else not default, name


@pytest.mark.parametrize(("fields", "default"), rows("Servers by hand"))
def test_fields_without_a_flag_have_these_defaults(fields: list[str], default: str) -> None:
    for field in fields:
        config, name = field.split(".")
        assert CONFIGS[config].__dataclass_fields__[name].default == yaml.safe_load(default), field


def test_all_variables_are_there() -> None:
    code = [path.read_text() for folder in SHIPPED for path in (REPOSITORY / folder).rglob("*.py")]
    code += [path.read_text() for path in (REPOSITORY / "deploy" / "docker").iterdir()]
    used = set(re.findall(r"\bBATON_[A-Z_]+\b", "\n".join(code)))
    assert set(re.findall(r"`(BATON_\w+)`", PAGE)) == used


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/deploy.md"])
def test_the_page_is_found(page: str) -> None:
    assert "options.md" in (REPOSITORY / page).read_text()
