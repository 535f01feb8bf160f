"""What the directory's scripts answer, taken apart: true to what was packed, and no error for what nobody packed."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from kvstore.inventory import NOWHERE, Run, leading, parse_counts, parse_places, with_holes

NUMBERS = [1, 2, 3, 70_000, 0x7FFFFFFF]
slots = st.integers(0, 2**32 - 1)
held = st.lists(st.dictionaries(st.sampled_from(NUMBERS), slots, min_size=1), max_size=8)


def packed(holders: dict[int, int]) -> bytes:
    """A block's value, as the scripts write it."""
    items = sorted(holders.items())
    numbers = [number | (slot == 2**32 - 1) << 31 for number, slot in items]
    return struct.pack(f">H{2 * len(items)}I", len(items), *numbers, *(slot for _, slot in items))


def living(numbers: list[int]) -> bytes:
    return b"".join(struct.pack(">II", number, 4) + b"r%03d" % (number % 1000) for number in numbers)


@given(held, st.permutations(NUMBERS), st.integers(0, len(NUMBERS)))
def test_places_are_those_that_were_packed(blocks: list[dict[int, int]], order: list[int], num_living: int) -> None:
    numbers = order[:num_living]
    found = parse_places(living(numbers), b"".join(map(packed, blocks)))
    assert [record for record, _ in found] == [b"r%03d" % (number % 1000) for number in numbers]
    for number, (_, run) in zip(numbers, found, strict=True):
        expected = [holders.get(number) for holders in blocks]
        assert with_holes(run) == expected
        assert leading(run) == (expected[: expected.index(None)] if None in expected else expected)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_anything_else_is_no_error(arenas: bytes, values: bytes) -> None:
    for _, run in parse_places(arenas, values):
        assert all(NOWHERE <= slot < 2**32 for slot in run.tolist())
    parse_counts(values)


def test_counts() -> None:
    answer = struct.pack(">III", 9, 2, 3) + b"abc" + struct.pack(">III", 1, 0, 0)
    assert parse_counts(answer) == [(b"abc", Run(9, 2)), (b"", Run(1, 0))]
    assert parse_counts(b"") == []
