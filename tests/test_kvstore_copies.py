"""Copies past the caches: the right bytes and sums, nothing beside the destination, for odd lengths and places."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from kvstore import copies
from kvstore.copies import copy, copy_and_sum

LENGTHS = (1, 63, 240, 241, 1024, 65535, 65536, 65537, 65600, 66559, 66560, 66561, 100_003, 1 << 20)
MARGIN = 128


@pytest.fixture(params=["as installed", "without compiled code"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without compiled code":
        monkeypatch.setattr(copies, "_library", None)


def random_bytes(length: int) -> NDArray[np.uint8]:
    return np.frombuffer(random.Random(length).randbytes(length), np.uint8)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("source_at", [0, 1, 64])
@pytest.mark.parametrize("target_at", [0, 1, 8, 64])
def test_every_length_and_alignment(length: int, source_at: int, target_at: int) -> None:
    source = random_bytes(length + source_at)[source_at:]
    for is_summed in (False, True):
        room = np.full(length + 2 * MARGIN + 64, 7, np.uint8)
        start = MARGIN + -(room.ctypes.data + MARGIN) % 64 + target_at
        target = memoryview(room)[start : start + length]
        if is_summed:
            assert copy_and_sum(target, memoryview(source)) == xxhash.xxh3_64_intdigest(source.tobytes())
        else:
            copy(target, memoryview(source))
        assert target == source.tobytes()
        assert (room[:start] == 7).all() and (room[start + length :] == 7).all()


def test_what_does_not_fit_is_refused() -> None:
    big, small = bytearray(1 << 17), bytearray(1 << 16)
    with pytest.raises(ValueError, match="65536 bytes do not fill a destination of 131072"):
        copy(memoryview(big), memoryview(small))
    with pytest.raises(ValueError, match="131072 bytes"):
        copy_and_sum(memoryview(small), memoryview(big))
    with pytest.raises(ValueError, match="cannot be written"):
        copy(memoryview(bytes(big)), memoryview(big))
    assert big == bytes(1 << 17) and small == bytes(1 << 16)
