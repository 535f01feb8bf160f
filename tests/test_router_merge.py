"""Several streams as one: everything arrives, the first error ends all, and a reader that leaves ends all, too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from router.merge import merge


class Streams:
    """Counts what is open, and how much was made."""

    def __init__(self) -> None:
        self.num_open = self.num_made = 0

    async def count(self, name: str, end: int, fails_at: int = -1) -> AsyncGenerator[tuple[str, int], None]:
        self.num_open += 1
        try:
            for number in range(end):
                await asyncio.sleep(0)
                if number == fails_at:
                    raise LookupError(name)
                self.num_made += 1
                yield name, number
        finally:
            await asyncio.sleep(0)  # what closes may take its time
            self.num_open -= 1


async def test_everything_arrives_each_stream_in_order() -> None:
    streams = Streams()
    items = [item async for item in merge([streams.count("a", 5), streams.count("b", 0), streams.count("c", 9)])]
    assert [number for name, number in items if name == "a"] == [*range(5)]
    assert [number for name, number in items if name == "c"] == [*range(9)]
    assert len(items) == 14 and streams.num_open == 0
    assert items[1][0] != items[0][0], "at once, not one after the other"


async def test_the_first_error_ends_all() -> None:
    streams, items = Streams(), []
    with pytest.raises(LookupError, match="b"):
        async for item in merge([streams.count("a", 10**9), streams.count("b", 9, fails_at=3)]):
            items.append(item)
    assert ("b", 2) in items and streams.num_open == 0


async def test_a_reader_that_leaves_closes_all() -> None:
    streams = Streams()
    async with aclosing(merge([streams.count("a", 10**9), streams.count("b", 10**9)])) as merged:
        async for _ in merged:
            break
        assert streams.num_open == 2
    assert streams.num_open == 0


async def test_a_reader_that_is_cancelled_closes_all() -> None:
    streams = Streams()

    async def read() -> None:
        async with aclosing(merge([streams.count("a", 10**9), streams.count("b", 10**9)])) as merged:
            async for _ in merged:
                pass

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert streams.num_open == 0


async def test_a_slow_reader_slows_the_streams_down() -> None:
    streams = Streams()
    async with aclosing(merge([streams.count(name, 10**9) for name in "abc"])) as merged:
        await anext(merged)
        await asyncio.sleep(0.02)
        assert streams.num_made <= 1 + 3 + 3  # read, held, and one each that waits to be
