"""`docs/faults.md` names tests that exist, each at least once."""

from __future__ import annotations

import re

from conftest import REPOSITORY


def test_the_tests_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (REPOSITORY / "docs" / "faults.md").read_text()))
    code = "\n".join(path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py"))
    assert len(named) > 30
    assert not named - set(re.findall(r"def (test_\w+)\(", code))
