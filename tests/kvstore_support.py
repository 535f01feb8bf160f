"""What the store's tests share: real store and writer processes, and blocks whose bytes follow from their names."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import zmq.asyncio

from kvstore.blocks import BlockHash, Payload, hash_blocks
from kvstore.copies import copy_and_sum
from kvstore.frames import MAX_TOLD_BYTES, Message
from kvstore.local import StorePaths
from kvstore.server import StoreConfig, StoreServer
from kvstore.stream import Unpacker, pack

REPOSITORY = Path(__file__).resolve().parent.parent
SLOT_BYTES = 100_000  # over ZeroMQ's threshold, so that payloads are sent from the slots
ROOT = BlockHash(bytes(16))

STORE = """
import asyncio, json, sys
from kvstore.server import StoreConfig, StoreServer
from kvstore.stream import Unpacker, pack
async def main():
    record = await StoreServer(StoreConfig(**json.loads(sys.argv[1]))).start()
    print(record.arena_id, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""

# Publishes blocks, but stops for ever in the middle of the copy.
WRITER = """
import asyncio, json, sys, time
from pathlib import Path
from kvstore.client import KVClient
from kvstore.directory import Directory
config = json.loads(sys.argv[1])
def write(indices, views):
    for view in views:
        view[: len(view) // 2] = b"x" * (len(view) // 2)
    print("writing", flush=True)
    time.sleep(600)
async def main():
    client = KVClient(Directory(config["redis_url"]), config["slot_bytes"], Path(config["dir"]))
    await client.publish([bytes.fromhex(text) for text in config["hashes"]], write)
asyncio.run(main())
"""


class Process:
    """A Python process that has said its first line."""

    def __init__(self, process: asyncio.subprocess.Process, line: str) -> None:
        self._process = process
        self.line = line

    @classmethod
    async def start(cls, script: str, argument: dict[str, object]) -> Process:
        command = [sys.executable, "-c", script, json.dumps(argument)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY)
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
        assert line, "the process ended before its first line"
        return cls(process, line)

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    async def kill(self) -> None:
        """kill -9; does nothing the second time."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()


def store_config(folder: Path, redis_url: str, num_slots: int = 16, **options: object) -> StoreConfig:
    return StoreConfig(
        dir=str(folder),
        redis_url=redis_url,
        slot_bytes=SLOT_BYTES,
        memory_bytes=num_slots * (SLOT_BYTES + 128) + 4096,
        heartbeat_s=0.2,
        host="here",
        **options,  # type: ignore[arg-type]
    )


async def start_store(config: StoreConfig) -> Process:
    """A store in a process of its own."""
    return await Process.start(STORE, asdict(config))


def chain(first: int, num_blocks: int) -> list[BlockHash]:
    """The names of a prefix that begins with the token `first`."""
    return hash_blocks(ROOT, list(range(first, first + num_blocks)), 1)


def content(block_hash: BlockHash) -> bytes:
    return (block_hash * (SLOT_BYTES // 16 + 1))[:SLOT_BYTES]


def writer_of(hashes: Sequence[BlockHash]) -> Callable[[Sequence[int], Sequence[memoryview]], list[int]]:
    """What `publish` takes, for these hashes."""

    def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
        return [
            copy_and_sum(view, memoryview(content(hashes[index]))) for index, view in zip(indices, views, strict=True)
        ]

    return write


def lingerless_context() -> zmq.asyncio.Context:
    """A test that fails leaves sockets open: what they have not sent must not keep the process from ending."""
    context = zmq.asyncio.Context()
    context.linger = 0
    return context


async def announced(*stores: StoreServer) -> None:
    """Returns when the directory knows all that these stores have committed: they answer before."""
    for store in stores:
        await store._announcer.flushed()


class ControlPeer:
    """Says what it likes to a store's control socket."""

    def __init__(self, folder: str | Path) -> None:
        self._path = str(StorePaths(Path(folder)).control)

    async def open(self) -> ControlPeer:
        stream = socket.socket(socket.AF_UNIX)
        await asyncio.to_thread(stream.connect, self._path)  # which waits while others wait to be let in
        self._reader, self._writer = await asyncio.open_unix_connection(sock=stream)
        return self

    def send(self, *messages: Message | bytes) -> None:
        """Messages, or any bytes."""
        for message in messages:
            self._writer.write(message if isinstance(message, bytes) else pack(message))

    async def receive(self) -> tuple[Message, list[bytes]]:
        """`EOFError` when the store has closed the connection."""
        unpacker = Unpacker(MAX_TOLD_BYTES)
        async with asyncio.timeout(10):
            while (taken := unpacker.take()) is None:
                data = await self._reader.read(1)
                if not data:
                    raise EOFError
                unpacker.feed(data)
        return taken[0], [taken[1]] if taken[1] else []

    async def ask(self, message: Message) -> tuple[Message, list[bytes]]:
        self.send(message)
        return await self.receive()

    async def is_cut_off(self) -> bool:
        """Waits for it."""
        with suppress(EOFError, ConnectionError):
            while True:
                await self.receive()
        return True

    def close(self) -> None:
        self._writer.close()


def take(payloads: Sequence[Payload]) -> list[bytes]:
    """Copies payloads as an engine does: up to the first that is not valid after its copy."""
    taken = []
    for payload in payloads:
        copied = bytes(payload.view)
        if not payload.is_valid():
            break
        taken.append(copied)
    return taken
