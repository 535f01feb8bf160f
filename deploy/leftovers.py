"""What a killed launcher's cluster leaves on other machines, and who removes it there.

Ray ends the servers of such a launcher, and none of them can clean up: each time an arena would stay in shared memory.
So each server holds a lock in its machine's folder, which the kernel takes away with its process, and a store that
starts removes the folders beside its own where nobody holds one any more. The files are named after the machine's boot:
what another machine put on a file system that both see is not for this one to judge.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import stat
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
FOLDER = re.compile(r"baton-[0-9a-f]{8}-[0-9a-f]{8}")  # see `deploy.config.machine_dir`


def hold(folder: Path, name: str) -> IO[str] | None:
    """A server's lock on its folder, until it is closed. None where there can be none: a full disk stops no server."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        held = (folder / f"{name}{_suffix()}").open("w")
        fcntl.flock(held, fcntl.LOCK_SH)
    except OSError as error:
        logger.warning("event=folder_not_held folder=%s error=%s", folder, error)
        return None
    return held


def sweep(base: Path, own: Path | None = None) -> list[Path]:
    """Removes the folders in `base`, but for `own`, in which servers of this boot and user lived and none does."""
    try:
        found = [path for path in base.glob("baton-*") if path != own and FOLDER.fullmatch(path.name)]
    except OSError:
        return []
    gone = [folder for folder in found if _is_left(folder)]
    for folder in gone:
        logger.info("event=leftover_removed folder=%s", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return gone


def _is_left(folder: Path) -> bool:
    try:
        about = folder.lstat()
        is_own = stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid()
        locks = [*folder.glob("*.alive")] if is_own else []
        return bool(locks) and all(map(_was_of_this_boot, locks))
    except OSError:  # somebody holds one, or was quicker
        return False


def _was_of_this_boot(lock: Path) -> bool:
    """Raises `BlockingIOError` where it still is held."""
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock.name.endswith(_suffix())


def _suffix() -> str:
    return f".{BOOT_ID.read_text()[:8]}.alive"
