"""`docs/simulator.md` names all options of its commands, all policies and all faults; its examples run."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest
from conftest import REPOSITORY

from loadtest import plan, simulate
from loadtest.sim_faults import KINDS, Fault
from router.policy import POLICIES

PAGE = (REPOSITORY / "docs" / "simulator.md").read_text()


def options(*modules: object) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for module in modules:
        module.add_arguments(parser)  # type: ignore[attr-defined]
    return {name for action in parser._actions for name in action.option_strings}


def test_the_options_that_the_page_names_are_those_that_there_are() -> None:
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) == options(simulate, plan)


def test_policies_and_faults_are_named() -> None:
    assert all(f"`{name}`" in PAGE for name in POLICIES)
    assert all(f"`{kind}:" in PAGE for kind in KINDS)


@pytest.mark.parametrize("line", re.findall(r"^baton .*", PAGE, re.MULTILINE))
def test_the_examples_are_understood(line: str) -> None:
    _, command, *arguments = shlex.split(line, comments=True)
    parser = argparse.ArgumentParser()
    {"simulate": simulate, "plan": plan}[command].add_arguments(parser)
    for text in getattr(parser.parse_args(arguments), "fault", []):
        Fault.parse(text)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_page_is_found(page: str) -> None:
    assert "simulator.md" in (REPOSITORY / page).read_text()
