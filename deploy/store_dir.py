"""Whether an arena can lie where `--store-dir` says, on this machine: asked before anything is started."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kvstore.arena_map import arena_bytes, slots_within

MIB = 2**20


def unusable(base: Path, memory_bytes: int, slot_bytes: int) -> str:
    """Why no arena of so many bytes can be made in a folder of `base`, in words; "" where one can. Leaves nothing."""
    try:
        there = next(folder for folder in (base, *base.parents) if folder.exists())  # a store makes what is missing
        with tempfile.TemporaryDirectory(prefix="baton-", dir=there):
            status = os.statvfs(there)
    except OSError as error:
        return f"--store-dir {base}: cannot be written to: {error.strerror}"
    free_bytes = status.f_bavail * status.f_frsize
    wanted_bytes = arena_bytes(slots_within(memory_bytes, slot_bytes), slot_bytes)
    if status.f_blocks and free_bytes < wanted_bytes:  # some file systems do not say
        sizes = f"{free_bytes / MIB:.0f} MiB are free there, and --store-memory takes {wanted_bytes / MIB:.0f} MiB"
        return f"--store-dir {base}: {sizes}"
    return ""
