"""Copies of a block's bytes that bypass the CPU caches, with a checksum computed on the way if wanted.

They are compiled from `kvstore/csrc/copies.c`. If nothing was compiled at installation, plain copies do the same.
Python's lock is released meanwhile.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Buffer = memoryview | NDArray[np.uint8]

_MIN_STREAM_BYTES = 1 << 16  # smaller copies may well be read again while they are in the cache


def copy(destination: Buffer, source: Buffer) -> None:
    """Copies `source` into `destination`. Raises ValueError when their lengths differ."""
    target, bytes_ = _pair(destination, source)
    if _library is None or len(bytes_) < _MIN_STREAM_BYTES:
        np.copyto(target, bytes_)
    else:
        _library.baton_copy(target.ctypes.data, bytes_.ctypes.data, len(bytes_))


def copy_and_sum(destination: Buffer, source: Buffer) -> int:
    """The same; returns xxh3_64 of the bytes."""
    target, bytes_ = _pair(destination, source)
    if _library is None or len(bytes_) < _MIN_STREAM_BYTES:
        np.copyto(target, bytes_)
        return xxhash.xxh3_64_intdigest(target.data)
    return int(_library.baton_copy_and_sum(target.ctypes.data, bytes_.ctypes.data, len(bytes_)))


def _pair(destination: Buffer, source: Buffer) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    target, bytes_ = np.frombuffer(destination, np.uint8), np.frombuffer(source, np.uint8)
    if len(target) != len(bytes_):
        raise ValueError(f"{len(bytes_)} bytes do not fill a destination of {len(target)}")
    if not target.flags.writeable:
        raise ValueError("the destination cannot be written to")
    return target, bytes_


def _load() -> Any:
    spec = importlib.util.find_spec("kvstore._copies")
    if spec is None or spec.origin is None:
        logger.info("event=no_compiled_copies")
        return None
    library = ctypes.CDLL(spec.origin)
    library.baton_copy_and_sum.restype = ctypes.c_uint64
    for function in (library.baton_copy, library.baton_copy_and_sum):
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return library


_library = _load()
