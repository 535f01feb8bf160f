"""Blocks on disk: what survives a restart, what damage costs (a miss), and that the file keeps to its bound."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from kvstore.blocks import BlockHash
from kvstore.ssd import HEADER_BYTES, BlockFile, DiskIndex, Record, record_stride

SLOT_BYTES = 1000
STRIDE = record_stride(SLOT_BYTES)
ROOT = b"r" * 16
NUM_RECORDS = 4


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "little"))


def content(number: int) -> bytes:
    return bytes([number + 1]) * SLOT_BYTES


def open_file(
    folder: Path, num_records: int = NUM_RECORDS, slot_bytes: int = SLOT_BYTES, root: bytes = ROOT
) -> BlockFile:
    return BlockFile(folder, num_records * record_stride(slot_bytes), slot_bytes, root)


def write(file: BlockFile, number: int) -> Record:
    return file.write(number, name(number), xxhash.xxh3_64_intdigest(content(number)), content(number))


def read(file: BlockFile, record: Record) -> bytes | None:
    target = memoryview(bytearray(SLOT_BYTES))
    return bytes(target) if file.read(record, target) else None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    file = open_file(tmp_path)
    for number in range(NUM_RECORDS):
        assert read(file, write(file, number)) == content(number)
    file.close()
    yield tmp_path


def held(file: BlockFile) -> dict[BlockHash, bytes | None]:
    found = {block_hash: read(file, record) for block_hash, record in file.records()}
    file.close()
    return found


ALL = {name(number): content(number) for number in range(NUM_RECORDS)}


def damage(folder: Path, offset: int) -> None:
    with (folder / "blocks.kv").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_everything_survives_a_restart(folder: Path) -> None:
    assert held(open_file(folder)) == ALL
    assert (folder / "blocks.kv").stat().st_size <= NUM_RECORDS * STRIDE


def test_other_models_other_sizes_and_other_versions_are_never_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert held(open_file(folder, root=b"other")) == {}
    assert held(open_file(folder, slot_bytes=SLOT_BYTES + 1)) == {}
    assert held(open_file(folder, slot_bytes=100)) == {}
    monkeypatch.setattr("kvstore.ssd.VERSION", 2)
    assert held(open_file(folder)) == {}


@pytest.mark.parametrize("offset", [0, 9, 30, 50, 60, 70])
def test_a_flipped_bit_in_a_header_is_a_free_record(folder: Path, offset: int) -> None:
    damage(folder, STRIDE + offset)
    assert held(open_file(folder)) == {key: value for key, value in ALL.items() if key != name(1)}


@pytest.mark.parametrize("offset", [0, 500, SLOT_BYTES - 1])
def test_a_flipped_bit_in_a_block_is_a_miss(folder: Path, offset: int) -> None:
    damage(folder, STRIDE + HEADER_BYTES + offset)
    assert held(open_file(folder)) == ALL | {name(1): None}


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES, HEADER_BYTES + 10, STRIDE, 3 * STRIDE + HEADER_BYTES + 5])
def test_a_file_cut_short_has_what_is_left(folder: Path, size: int) -> None:
    os.truncate(folder / "blocks.kv", size)
    found = held(open_file(folder))
    assert {key for key, value in found.items() if value} == {name(number) for number in range(size // STRIDE)}
    assert all(value in (None, ALL[key]) for key, value in found.items())


def test_a_file_that_vanished_is_an_empty_one(folder: Path) -> None:
    (folder / "blocks.kv").unlink()
    assert held(open_file(folder)) == {}


def test_a_smaller_bound_cuts_the_file(folder: Path) -> None:
    assert set(held(open_file(folder, num_records=2))) == {name(0), name(1)}
    assert (folder / "blocks.kv").stat().st_size <= 2 * STRIDE
    with pytest.raises(ValueError, match="disk_bytes"):
        BlockFile(folder, STRIDE - 1, SLOT_BYTES, ROOT)


def test_a_write_that_was_cut_short_leaves_a_free_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = open_file(folder)
    calls = []
    real = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        return real(fd, data, offset) if len(calls) == 1 else 0

    monkeypatch.setattr("kvstore.ssd.os.pwrite", pwrite)
    with pytest.raises(OSError, match="space"):
        write(file, 2)
    monkeypatch.undo()
    file.close()
    assert set(held(open_file(folder))) == {name(0), name(1), name(3)}


def test_a_full_disk_is_an_oserror(tmp_path: Path) -> None:
    file = open_file(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (STRIDE + 300, limits[1]))
    try:
        record = write(file, 0)
        with pytest.raises(OSError):
            write(file, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(file, record) == content(0)
    file.close()


def test_one_store_a_folder(folder: Path) -> None:
    file = open_file(folder)
    with pytest.raises(BlockingIOError):
        open_file(folder)
    file.close()
    open_file(folder).close()


def test_the_later_of_two_writes_counts() -> None:
    index = DiskIndex(3)
    index.restore([(name(1), Record(0, 5, 9)), (name(2), Record(1, 6, 1)), (name(1), Record(2, 7, 3))])
    index.check_integrity()
    assert index.find(name(1)) == Record(0, 5, 9) and list(index) == [name(2), name(1)]
    assert index.begin(name(3)) == (2, None), "the other one's record is free"
    assert index.begin(name(4)) == (1, name(2)), "the least lately used goes"


def test_books_balance() -> None:
    generator, index = random.Random(0), DiskIndex(6)
    writing: list[tuple[BlockHash, int]] = []
    for _ in range(5000):
        block_hash = name(generator.randrange(12))
        action = generator.randrange(4)
        if action == 0:
            begun = index.begin(block_hash)
            if begun is not None:
                assert begun[1] not in index and begun[0] not in {number for _, number in writing}
                writing.append((block_hash, begun[0]))
        elif action == 1 and writing:
            done, number = writing.pop(generator.randrange(len(writing)))
            index.finish(done, Record(number, 1) if generator.random() < 0.8 else None)
        elif action == 2:
            index.drop(block_hash)
        else:
            assert (index.find(block_hash) is not None) == (block_hash in index)
        index.check_integrity()
