"""Watches files that may be replaced while a router runs (keys, certificates), and reloads them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

POLL_S = 1.0

logger = logging.getLogger(__name__)


class FileWatch:
    """To be created before the files are first read, so that no change is missed."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._stamps = self._look()

    async def run(self, read: Callable[[], T], swap: Callable[[T], object]) -> None:
        """Reads changed files on a thread and swaps on the event loop, until cancelled. Bad files change nothing."""
        names = ",".join(map(str, self._files))
        while True:
            await asyncio.sleep(POLL_S)
            stamps = self._look()
            if stamps == self._stamps:
                continue
            self._stamps = stamps
            try:
                swap(await asyncio.to_thread(read))
            except Exception as error:  # whatever it is, access stays as it was
                logger.error("event=reload_failed files=%s kept=old error=%s", names, error)
            else:
                logger.warning("event=reloaded files=%s", names)

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Changes whenever a file is written or replaced, also through a link. None: there is no such file."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
