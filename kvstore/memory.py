"""An arena's memory: a mapped file, allocated and touched at the start, in huge pages where the kernel grants them.

The first touch of a page costs far more than a copy into it, so it is not left to a request. Most kernels give files
in shared memory no huge pages unless the mount asks for them (`huge=advise`); asking costs nothing.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; faults pages in as if written to, and leaves their bytes alone
_STEP = 4 << 20  # bytes; Python's lock is held meanwhile
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MAX_HEAP_BLOCK_BYTES = 32 << 20  # the C library takes no more


def create_memory(path: Path, size: int) -> memoryview:
    """A new mapped file of `size` bytes. All of it is allocated now, so no write can ever find the mount full."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _check_room(path.parent, size)
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
        is_touched = touch(memory)  # before the file has pages, as existing ones would stay small
        os.posix_fallocate(fd, 0, size)
        if not is_touched:
            for start in range(0, size, _STEP):
                memory[start : start + _STEP] = bytes(min(_STEP, size - start))
    except OSError as error:
        path.unlink()
        problem = f"memory_bytes: {size} bytes in {path.parent}: {error.strerror}; ask for less, or for another folder"
        raise OSError(error.errno, problem) from error
    finally:
        os.close(fd)
    logger.info("event=memory_taken bytes=%d huge_bytes=%d touched=%s", size, _huge_bytes(path), is_touched)
    return memoryview(memory)


def touch(memory: mmap.mmap) -> bool:
    """Populates all pages of a mapping, huge ones if possible. False if the kernel is too old, or has no room."""
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, AttributeError) as error:  # a kernel without them
        logger.debug("event=no_huge_pages error=%r", error)
    try:
        for start in range(0, len(memory), _STEP):
            memory.madvise(_POPULATE_WRITE, start, min(_STEP, len(memory) - start))
    except OSError as error:
        logger.debug("event=not_touched error=%r", error)
        return False
    return True


def touch_behind(memory: mmap.mmap) -> None:
    """The same on a thread, for a process that maps an arena while it serves requests."""
    threading.Thread(target=touch, args=(memory,), name="kv-touch", daemon=True).start()


def reuse_freed_memory(kept_bytes: int) -> None:
    """Lets the C library keep up to `kept_bytes` of freed memory per thread, in this whole process, for reuse.

    Otherwise it returns large pieces to the kernel at once, and a process that receives block after block would touch
    new pages all the time, which takes longer than receiving. Does nothing if the C library has no such option.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _MAX_HEAP_BLOCK_BYTES)
    mallopt(_M_TRIM_THRESHOLD, kept_bytes)


def _check_room(folder: Path, size: int) -> None:
    """Raises if the file system reports too little room, before anything is allocated."""
    status = os.statvfs(folder)
    if status.f_blocks and status.f_bavail * status.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _huge_bytes(path: Path) -> int:
    """How much of a mapped file is in huge pages; 0 if unknown."""
    try:
        lines = Path("/proc/self/smaps").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    total, is_ours = 0, False
    for line in lines:
        name, *rest = line.split(maxsplit=5)
        if not name.endswith(":"):
            is_ours = bool(rest) and rest[-1] == str(path)
        elif is_ours and name in ("ShmemPmdMapped:", "FilePmdMapped:"):
            total += int(rest[0]) * 1024
    return total
