"""The wire format: what is sent is what is read, and bytes of any origin are a message or a BadFrame."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.arena import Fill, Reservation, Written
from kvstore.errors import BadFrame
from kvstore.frames import (
    MAX_BLOCKS,
    MAX_FRAME_BYTES,
    MAX_TOLD_BYTES,
    VERSION,
    Ask,
    BlockInfo,
    Commit,
    Committed,
    Filled,
    Get,
    Got,
    Message,
    Reserve,
    Reserved,
    Status,
    Told,
    Verb,
    decode,
)
from kvstore.quotas import Owner

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
keys = st.binary(min_size=16, max_size=16)
ids = keys.map(bytes.hex)
statuses = st.sampled_from(Status)
owners = st.builds(Owner, keys, st.none() | st.integers(0, 2**32 - 2))
prefixes = st.text("0123456789abcdef", max_size=32)
reservations = st.none() | st.builds(Reservation, st.integers(0, 2**32 - 2), u64)
fills = st.builds(Fill, keys, st.none() | st.builds(Written, st.integers(0, 2**32 - 2), u64, u64))

messages = st.one_of(
    st.builds(Reserve, u64, ids, ids, st.lists(keys, max_size=5), owners),
    st.builds(Reserved, u64, statuses, st.lists(reservations, max_size=5)),
    st.builds(Commit, u64, ids, ids, st.lists(st.builds(Written, u32, u64, u64), max_size=5)),
    st.builds(Committed, u64, statuses, u32),
    st.builds(Get, u64, st.lists(keys, max_size=5)),
    st.builds(Got, u64, st.lists(st.builds(BlockInfo, keys, u32, u64), max_size=5)),
    st.builds(Ask, u64, st.sampled_from(Verb), st.lists(keys, max_size=5), prefixes, u32, u32),
    st.builds(Told, u64, u32),
    st.builds(Filled, u64, ids, ids, st.lists(fills, max_size=5), u32, keys),
)


@given(messages)
def test_round_trip(message: Message) -> None:
    assert decode(message.encode()) == message
    assert decode(memoryview(message.encode())) == message


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(data)


@given(messages, st.data())
def test_damaged_message(message: Message, data: st.DataObject) -> None:
    frame = bytearray(message.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(decode(bytes(frame)), Message)
    except BadFrame:
        pass


@given(messages, st.data())
def test_message_cut_or_longer(message: Message, data: st.DataObject) -> None:
    frame = message.encode()
    cut = data.draw(st.integers(0, len(frame) - 1))
    for wrong in (frame[:cut], frame + bytes(data.draw(st.integers(1, 30)))):
        with pytest.raises(BadFrame):
            decode(wrong)


def test_other_version_and_kind() -> None:
    frame = bytearray(Get(1, []).encode())
    for at, value in ((0, 0), (4, VERSION - 1), (4, VERSION + 1), (5, 0), (5, 10)):
        wrong = frame.copy()
        wrong[at] = value
        with pytest.raises(BadFrame):
            decode(wrong)


def test_limits() -> None:
    for message in (
        Commit(1, "00" * 16, "00" * 16, [Written(1, 1, 1)] * MAX_BLOCKS),
        Filled(1, "00" * 16, "00" * 16, [Fill(bytes(16), Written(1, 1, 1))] * MAX_BLOCKS, MAX_BLOCKS),
        Reserve(1, "00" * 16, "00" * 16, [bytes(16)] * MAX_BLOCKS, Owner(b"t" * 16, 1 << 40)),
    ):
        assert len(message.encode()) <= MAX_FRAME_BYTES
        decode(message.encode())
    with pytest.raises(ValueError, match="at most"):
        Get(1, [bytes(16)] * (MAX_BLOCKS + 1)).encode()
    frame = bytearray(Get(1, [bytes(16)] * MAX_BLOCKS).encode() + bytes(16))
    struct.pack_into("<I", frame, 8, MAX_BLOCKS + 1)  # a sender with other limits
    with pytest.raises(BadFrame):
        decode(frame)


def test_count_that_lies_costs_nothing() -> None:
    frame = bytearray(Get(1, []).encode())
    struct.pack_into("<I", frame, 8, 0xFFFFFFFF)
    with pytest.raises(BadFrame):
        decode(frame)


@pytest.mark.parametrize("verb_and_digits", [(0, 0), (8, 0), (1, 33), (255, 255)])
def test_what_no_operator_asks(verb_and_digits: tuple[int, int]) -> None:
    frame = bytearray(Ask(1, Verb.LIST, prefix="ab").encode())
    struct.pack_into("<BB", frame, 20, *verb_and_digits)
    with pytest.raises(BadFrame, match="verb"):
        decode(frame)


def test_what_is_told_passes_where_frames_do() -> None:
    assert MAX_TOLD_BYTES <= MAX_FRAME_BYTES, "or a channel would cut the connection"
