"""Server-sent events, cut anywhere."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.sse import BadEvent, EventParser

text = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r\n"), max_size=20)


def parse(data: bytes, cuts: list[int]) -> list[str]:
    parser = EventParser()
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = [data[a:b] for a, b in itertools.pairwise(borders)]
    return [event for piece in pieces for event in parser.feed(piece)]


@given(
    events=st.lists(st.lists(text, min_size=1, max_size=3), max_size=6),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    comment=st.sampled_from(["", ": ping", "event: x", "id: 1", "retry"]),
    bom=st.booleans(),
    cuts=st.lists(st.integers(0, 10_000), max_size=30),
)
def test_events_are_the_same_wherever_they_are_cut(
    events: list[list[str]], newline: str, comment: str, bom: bool, cuts: list[int]
) -> None:
    stream = "\ufeff" if bom else ""
    for lines in events:
        stream += comment + newline if comment else ""
        stream += "".join(f"data: {line}{newline}" for line in lines) + newline
    expected = ["\n".join(lines) for lines in events]
    data = stream.encode()
    assert parse(data, cuts) == expected
    assert parse(data, list(range(len(data)))) == expected  # a byte at a time


def test_the_grammar() -> None:
    assert parse(b"data:no space\n\ndata:  two\n\ndata\n\n: c\n\nevent: x\n\n", []) == ["no space", " two", ""]
    assert parse(b"data: half an event\n", []) == []


@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=10))
def test_any_bytes_give_events_or_a_named_error(data: bytes, cuts: list[int]) -> None:
    try:
        parse(data, cuts)
    except BadEvent:
        pass


@pytest.mark.parametrize("piece", [b"x" * 10, b"data: x\n", b"data:\n"])
def test_an_endless_event_is_not_kept(piece: bytes) -> None:
    parser = EventParser(max_event_bytes=1000)
    with pytest.raises(BadEvent, match="more than 1000 bytes"):
        for _ in range(2000):
            parser.feed(piece)
