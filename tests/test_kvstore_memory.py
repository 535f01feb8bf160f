"""An arena's memory is all there, and zero, before anyone writes to it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from kvstore import memory as module
from kvstore.memory import create_memory, touch

SIZE = (9 << 20) + 4096


def resident_bytes(path: Path) -> int:
    return os.stat(path).st_blocks * 512


@pytest.mark.parametrize("is_old_kernel", [False, True])
def test_all_of_it_is_taken(short_dir: Path, monkeypatch: pytest.MonkeyPatch, is_old_kernel: bool) -> None:
    if is_old_kernel:
        monkeypatch.setattr(module, "_POPULATE_WRITE", 12345)
    view = create_memory(short_dir / "arena", SIZE)
    assert len(view) == SIZE and bytes(view) == bytes(SIZE) and not view.readonly
    assert resident_bytes(short_dir / "arena") >= SIZE


def test_touching_leaves_bytes_alone(short_dir: Path) -> None:
    view = create_memory(short_dir / "arena", SIZE)
    view[:] = b"x" * SIZE
    with (short_dir / "arena").open("r+b") as file:
        again = mmap.mmap(file.fileno(), SIZE)
    touch(again)
    assert again[:] == b"x" * SIZE


def test_too_much_is_refused_and_nothing_stays(short_dir: Path) -> None:
    with pytest.raises(OSError, match="memory_bytes"):
        create_memory(short_dir / "arena", 1 << 44)
    assert list(short_dir.iterdir()) == []
