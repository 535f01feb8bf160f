"""The folder of a store on its machine, as the store process sees it: taken over, cleaned, and removed at the end.

Its contents are described in `kvstore.local`.
"""

from __future__ import annotations

import logging
import shutil

from kvstore.errors import ArenaUnavailable
from kvstore.local import Description, FileLock, StorePaths

logger = logging.getLogger(__name__)


class StoreFolder:
    """Held from `take` to `leave`; the kernel releases it when the process dies."""

    def __init__(self, paths: StorePaths) -> None:
        self.paths = paths
        self._lock: FileLock | None = None

    def take(self) -> str:
        """Takes the folder over, and removes what a killed store left there; returns that store's arena id, or "".

        Raises `ArenaUnavailable` while the folder belongs to a living store.
        """
        self.paths.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.paths.lock.touch(mode=0o600)
        lock = FileLock.take(self.paths.lock)
        if lock is None:
            raise ArenaUnavailable(f"{self.paths.dir} belongs to a store that is running")
        self._lock = lock
        predecessor = _arena_left_in(self.paths)
        self._remove_files()
        self.paths.writers.mkdir(mode=0o700)
        return predecessor

    def leave(self) -> None:
        """Removes all files, then the folder."""
        self._remove_files()
        if self._lock is not None:
            self._lock.remove()
        try:
            self.paths.dir.rmdir()
        except OSError as error:  # somebody else has files there
            logger.info("event=dir_kept dir=%s error=%r", self.paths.dir, error)

    def dead_writers(self, known: set[str]) -> list[str]:
        """Writers in `known`, or with a file, whose lock is free. A writer that is merely stopped keeps its lock."""
        dead = []
        for writer_id in known | {path.stem for path in self.paths.writers.glob("*.lock")}:
            try:
                lock = FileLock.take(self.paths.writer(writer_id))
            except FileNotFoundError:
                dead.append(writer_id)
                continue
            if lock is not None:
                lock.remove()
                dead.append(writer_id)
        return dead

    def _remove_files(self) -> None:
        self.paths.description.unlink(missing_ok=True)
        for path in self.paths.dir.glob("arena-*.mem"):
            path.unlink(missing_ok=True)
        self.paths.control.unlink(missing_ok=True)
        shutil.rmtree(self.paths.writers, ignore_errors=True)


def _arena_left_in(paths: StorePaths) -> str:
    try:
        return Description.read(paths.description).arena_id
    except (OSError, ValueError):
        return ""
