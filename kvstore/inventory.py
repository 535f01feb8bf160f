"""Parses the answers of the directory's scripts: who holds which blocks, and how many of them. Pure.

`kvstore/scripts.py` describes the packing. Slots are read by numpy, all at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks import BlockHash

NOWHERE = -1  # in place of a slot

_CAME = struct.Struct(">16sI")
_COUNTED = struct.Struct(">III")
_LOCATED = struct.Struct(">II")
_NUMBER_MASK = 0x7FFFFFFF  # without the bit that says "on disk"

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """The leading blocks that one arena holds."""

    num_blocks: int
    num_disk_blocks: int  # of them


def pack_places(blocks: Iterable[tuple[BlockHash, int]]) -> bytes:
    """Packs new blocks and their slots."""
    return b"".join([_CAME.pack(block_hash, slot) for block_hash, slot in blocks])


def parse_counts(answer: bytes) -> list[tuple[bytes, Run]]:
    """The record of each arena that holds the first block, and its run."""
    found, at = list[tuple[bytes, Run]](), 0
    while at + _COUNTED.size <= len(answer):
        num_blocks, num_disk_blocks, length = _COUNTED.unpack_from(answer, at)
        at += _COUNTED.size + length
        found.append((answer[at - length : at], Run(num_blocks, num_disk_blocks)))
    return found


def parse_places(arenas: bytes, values: bytes) -> list[tuple[bytes, Slots]]:
    """The record of each living arena, and the slots of the leading blocks there, with `NOWHERE` for holes."""
    records, numbers, at = list[bytes](), list[int](), 0
    while at + _LOCATED.size <= len(arenas):
        number, length = _LOCATED.unpack_from(arenas, at)
        at += _LOCATED.size + length
        records.append(arenas[at - length : at])
        numbers.append(number)
    return list(zip(records, _table(np.array(numbers, np.int64), values), strict=True))


def leading(slots: Slots) -> list[int]:
    """The slots up to the first hole."""
    holes = np.flatnonzero(slots == NOWHERE)
    run: list[int] = slots[: holes[0] if len(holes) else len(slots)].tolist()
    return run


def with_holes(slots: Slots) -> list[int | None]:
    """Each slot, or None."""
    found: list[int | None] = slots.tolist()
    return found if (slots != NOWHERE).all() else [None if slot == NOWHERE else slot for slot in found]


def _table(numbers: Slots, values: bytes) -> Slots:
    """`[i, j]`: the slot in which inventory `numbers[i]` has block j."""
    same = _of_same_holders(values)
    if same is not None:
        holders, slots = same
        columns = {number: slots[:, nth] for nth, number in enumerate(holders)}
        nothing = np.full(len(slots), NOWHERE, np.int64)
        return np.array([columns.get(number, nothing) for number in numbers.tolist()]).reshape(len(numbers), len(slots))
    words = np.frombuffer(values, ">u2", len(values) // 2).astype(np.int64)
    starts, counts = _values(words)
    table = np.full((len(numbers), len(starts)), NOWHERE, np.int64)
    if not len(numbers) or not len(starts):
        return table
    # One entry for each holder of each block: which block, and at which words its number and its slot are.
    block = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = starts[block] + 1 + 2 * nth
    holder = (words[at] << 16 | words[at + 1]) & _NUMBER_MASK
    at += 2 * counts[block]
    slot = words[at] << 16 | words[at + 1]
    order = np.argsort(numbers)
    row = order[np.minimum(np.searchsorted(numbers[order], holder), len(numbers) - 1)]
    is_known = numbers[row] == holder
    table[row[is_known], block[is_known]] = slot[is_known]
    return table


def _of_same_holders(values: bytes) -> tuple[list[int], Slots] | None:
    """If all blocks have the same holders, as in most runs: the holders, and the slots `[block, holder]`."""
    count = int.from_bytes(values[:2])
    if not count or len(values) % (2 + 8 * count):
        return None
    rows = np.frombuffer(values, np.dtype([("head", "V", 2 + 4 * count), ("slots", ">u4", (count,))]))
    heads = rows["head"]
    if not (heads == heads[0]).all():
        return None
    holders = np.frombuffer(values, ">u4", count, 2).astype(np.int64) & _NUMBER_MASK
    return holders.tolist(), rows["slots"].astype(np.int64)


def _values(words: Slots) -> tuple[Slots, Slots]:
    """The word at which each block's value begins, and its number of holders. Incomplete values are left out."""
    starts, ends, sizes, at = list[int](), list[int](), words.tolist(), 0
    while at < len(sizes) and (end := at + 1 + 4 * sizes[at]) <= len(sizes):
        starts.append(at)
        ends.append(end)
        at = end
    at_words = np.array(starts, np.int64)
    return at_words, (np.array(ends, np.int64) - at_words) // 4
