"""Whether an arena can lie in a folder: what keeps it from that is named, and nothing is left there."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.store_dir import unusable

SLOT_BYTES = 1 << 16


def test_a_folder_that_will_do(tmp_path: Path) -> None:
    assert unusable(tmp_path, 1 << 20, SLOT_BYTES) == ""
    assert unusable(tmp_path / "not" / "there" / "yet", 1 << 20, SLOT_BYTES) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/in"])
def test_a_file_is_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    problem = unusable(tmp_path / name, 1 << 20, SLOT_BYTES)
    assert problem == f"--store-dir {tmp_path / name}: cannot be written to: Not a directory"


def test_a_folder_that_nobody_may_write_to() -> None:
    problem = unusable(Path("/proc/self"), 1 << 20, SLOT_BYTES)
    assert problem.startswith("--store-dir /proc/self: cannot be written to: ")


def test_too_little_space(tmp_path: Path) -> None:
    problem = unusable(tmp_path, 1 << 60, SLOT_BYTES)
    assert problem.startswith(f"--store-dir {tmp_path}: ")
    assert " MiB are free there, and --store-memory takes 10995116277" in problem
