"""What any page says that can be looked up: links, files, flags, metrics, names in the code, folders in the map."""

from __future__ import annotations

import argparse
import itertools
import re
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY
from scraping import documented

from deploy.commands import parser
from grammar import source
from router import grpc_door, http_body, http_models, http_requests, validate, validate_chat
from router.config import RouterConfig

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *(REPOSITORY / "examples").glob("*.md"),
    REPOSITORY / "models" / "pocket" / "README.md",
]
PACKAGES = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
FOLDERS = {*PACKAGES, "proto", "benchmarks", "examples", "models", "tests", "docs"} - {"batonpb"}
CODE = [path for folder in sorted(FOLDERS) for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
PYTHON = "\n".join(path.read_text() for path in CODE if path.suffix in (".py", ".proto"))
CLASSES = set(re.findall(r"^\s*(?:class|message) (\w+)", PYTHON, re.MULTILINE))
WORDS = set(re.findall(r"\w+", PYTHON))
OF_OTHERS = {  # flags of ray, docker, kubectl, helm and load generators; and words for several flags
    *("--head", "--node-ip-address", "--num-gpus", "--resources", "--object-store-memory", "--include-dashboard"),
    *("--disable-usage-stats", "--block", "--shm-size", "--build", "--from-literal", "--set"),
    *("--enable-prompt-tokens-details", "--prefill-", "--decode-", "--tls-"),
}


def all_flags(parser: argparse.ArgumentParser) -> set[str]:
    """Those of its commands, too."""
    found = {name for action in parser._actions for name in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(*(all_flags(command) for command in action.choices.values()))
    return found


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of headings."""
    found = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def by_name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


FLAGS = {
    flag
    for folder in ("benchmarks", "deploy", "models")
    for path in (REPOSITORY / folder).rglob("*.py")
    for flag in re.findall(r'"(--[a-z0-9-]+)"', text_of(path))
}
FLAGS |= all_flags(parser()) | OF_OTHERS


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_files_are_there(page: Path) -> None:
    """Those in backticks: by their whole path, or by a name that some file has."""
    names = {path.name for path in CODE}
    for name in re.findall(r"`([\w./-]+\.(?:py|proto|inc|md))`", text_of(page)):
        assert (REPOSITORY / name).exists() or ("/" not in name and name in names), name


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_attributes_are_there(page: Path) -> None:
    """`Class.attribute`: both are in the code."""
    for owner, name in re.findall(r"`([A-Z]\w+)\.([a-z_]\w+)(?:\(\))?`", text_of(page)):
        assert owner in CLASSES and name in WORDS, f"{owner}.{name}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ("loadtest.md", "performance.md")], ids=by_name)
def test_flags_are_there(page: Path) -> None:
    """Of `baton`'s commands, servers by hand and benchmarks. `loadtest.md` has other tools and a test of its own."""
    text = re.sub(r"^\s*(?:pip|git|curl|locust|vllm|grpcurl) .*$", "", text_of(page), flags=re.MULTILINE)
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
    assert not used - FLAGS


def test_metrics_that_pages_dashboards_and_charts_name_are_in_the_tables() -> None:
    """The tables are held to what processes show by the tests of `observability.md` and `kvstore.md`."""
    tables = [documented(text_of(REPOSITORY / "docs" / name)) for name in ("observability.md", "kvstore.md")]
    known = set(itertools.chain(*tables))
    known |= {f"{metric}_{part}" for metric in known for part in ("bucket", "sum", "count")}
    others = [*(REPOSITORY / "deploy" / "dashboards").glob("*.*"), REPOSITORY / "router" / "page" / "page.js"]
    labels = {"baton_cluster", "baton_component", "baton_role", "baton_name"}  # of --metrics-targets
    for page in [*PAGES, *others]:
        named = set(re.findall(r"\bbaton_[a-z_]*[a-z]\b(?!\.)", text_of(page)))
        assert not named - known - labels, by_name(page)


def test_the_map_has_each_package_and_folder() -> None:
    text = text_of(REPOSITORY / "docs" / "architecture.md").partition("## The folders")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)
    assert sorted(named) == sorted(FOLDERS)


def test_the_tree_names_what_is_there() -> None:
    text = text_of(REPOSITORY / "docs" / "tree.md")
    for package in ("engine", "kvstore", "node", "router", "deploy"):
        [part] = re.findall(rf"^{package}/.*?(?=^\w)", text, re.MULTILINE | re.DOTALL)
        for name in re.findall(r"[\w*]+\.py\b", part):
            assert list((REPOSITORY / package).glob(name)), f"{package}/{name}"


# Limits of what clients may send: a row's first words -> the numbers in its second column.
LIMITS: dict[str, list[int]] = {
    "an HTTP body": [RouterConfig.max_message_bytes, http_body.MAX_OBJECTS, http_body.MAX_LISTS, http_body.MAX_NAMES],
    "prompts x `n`": [http_requests.MAX_CHOICES, http_models.MAX_MESSAGES, http_models.MAX_PROMPT_TOKENS],
    "a message": [RouterConfig.max_message_bytes],
    "a prompt's text": [RouterConfig.max_prompt_bytes],
    "answers to one request": [validate.MAX_ANSWERS],
    "tools of a chat": [validate_chat.MAX_TOOLS, validate_chat.MAX_CALLS],
    "tokens to make text of": [validate.MAX_TOKEN_IDS],
    "a grammar": [
        *(source.MAX_TEXT_BYTES, source.MAX_LARK_BYTES, source.MAX_CHOICES, source.MAX_CHOICE_CHARS),
    ],
    "requests": [RouterConfig.max_concurrent_requests],
}


@pytest.mark.parametrize("row", LIMITS)
def test_limits_are_those_that_there_are(row: str) -> None:
    text = text_of(REPOSITORY / "docs" / "architecture.md").partition("## Limits of what")[2]
    (column,) = re.findall(rf"^\| {re.escape(row)}[^|]*\| ([^|]*)\|", text, re.MULTILINE)
    units = {"": 1, " KiB": 2**10, " MiB": 2**20}
    found = re.findall(r"(?<![\w-])(\d[\d,]*)( KiB| MiB|)\b", column)
    assert [int(number.replace(",", "")) * units[unit] for number, unit in found] == LIMITS[row]


def test_grpcs_own_limits_are_those_that_there_are() -> None:
    text = text_of(REPOSITORY / "docs" / "grpc.md")
    largest = grpc_door.TRANSPORT_FACTOR * RouterConfig.max_message_bytes
    assert f"messages beyond {largest >> 20} MiB" in text
    assert f"more than {grpc_door.max_calls(RouterConfig.max_concurrent_requests):,} calls" in text
