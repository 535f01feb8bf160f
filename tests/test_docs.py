"""The pages hang together: each link leads somewhere, and what the tree names is there."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY

PAGES = sorted(
    str(page.relative_to(REPOSITORY))
    for folder in (".", "docs", "examples", "models/pocket")
    for page in (REPOSITORY / folder).glob("*.md")
)
PACKAGES = ("engine", "kvstore", "node", "router", "deploy")


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        found = (REPOSITORY / page).parent / target if target else REPOSITORY / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_the_tree_names_what_is_there() -> None:
    text = (REPOSITORY / "docs" / "tree.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        [part] = re.findall(rf"^{package}/.*?(?=^\w)", text, re.MULTILINE | re.DOTALL)
        for name in re.findall(r"[\w*]+\.py\b", part):
            assert list((REPOSITORY / package).glob(name)), f"{package}/{name}"
