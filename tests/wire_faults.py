"""A bad wire: a TCP proxy in front of a store that flips, loses, cuts off or holds up what passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from kvstore.client import Match
from kvstore.records import ArenaRecord

Fault = Callable[[int, bytes], bytes | None]
"""Gets the bytes that come next and how many came before them on this connection; returns what goes on, or None to
hang up. Those that let nothing pass any more return b""."""


def nothing(offset: int, data: bytes) -> bytes:
    return data


def flip(at: int, bit: int) -> Fault:
    """One bit of the byte at that offset."""

    def fault(offset: int, data: bytes) -> bytes:
        if not offset <= at < offset + len(data):
            return data
        damaged = bytearray(data)
        damaged[at - offset] ^= 1 << bit
        return bytes(damaged)

    return fault


def lose(at: int, count: int) -> Fault:
    """So many bytes from that offset on; what follows moves up."""

    def fault(offset: int, data: bytes) -> bytes:
        return data[: max(0, at - offset)] + data[max(0, at + count - offset) :]

    return fault


def hang_up(at: int) -> Fault:
    def fault(offset: int, data: bytes) -> bytes | None:
        return data if offset + len(data) <= at else None

    return fault


def hang(at: int) -> Fault:
    """Nothing goes on after that offset, and nobody is told."""

    def fault(offset: int, data: bytes) -> bytes:
        return data[: max(0, at - offset)]

    return fault


class Wire:
    """The proxy. `answers` and `questions` are the faults of the two directions; change them at any time."""

    def __init__(self, address: str) -> None:
        self._host, port = address.removeprefix("tcp://").split(":")
        self._port = int(port)
        self._streams: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.answers: Fault = nothing
        self.questions: Fault = nothing
        self.passes = asyncio.Event()  # while it is not set, answers wait
        self.passes.set()
        self.num_connections = 0

    async def start(self) -> str:
        """Returns its address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for stream in self._streams:
            stream.close()

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        store_reader, store = await asyncio.open_connection(self._host, self._port)
        self._streams += [client, store]
        for coroutine in (self._pass(client_reader, store, False), self._pass(store_reader, client, True)):
            task = asyncio.create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_answer: bool) -> None:
        offset = 0
        try:
            while data := await reader.read(1 << 16):
                if is_answer:
                    await self.passes.wait()
                passed = (self.answers if is_answer else self.questions)(offset, data)
                offset += len(data)
                if passed is None:
                    break
                writer.write(passed)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


def through(match: Match, address: str) -> Match:
    """The match, with all its arenas at another address: the one that blocks are read from."""
    arenas = {
        arena_id: replace(record, **{"tcp_address" if record.tcp_address else "address": address})
        for arena_id, record in match.arenas.items()
    }
    return replace(match, arenas=arenas)


def block_address(record: ArenaRecord) -> str:
    """Where a client without a key reads blocks from, and one with a key where the store has one too."""
    return record.tcp_address or record.address
