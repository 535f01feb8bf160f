"""100,000 malformed frames: each is refused and nothing else happens. No crash, no leak, and the books balance.

All seeds are fixed, so that what fails once fails again.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zmq
import zmq.asyncio
from conftest import eventually
from hypothesis import given
from hypothesis import strategies as st
from kvstore_support import REPOSITORY, ControlPeer, chain, lingerless_context, store_config

from kvstore.arena import Fill, Reservation, Written
from kvstore.channel import Answer
from kvstore.curve import Curve, new_wire_key
from kvstore.errors import BadFrame
from kvstore.frames import (
    MAX_BLOCKS,
    MAX_FRAME_BYTES,
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
from kvstore.server import decode_question
from kvstore.zmq_wire import check_blocks

NUM_DECODED = 100_000
NUM_ANSWERS = 8_000
NUM_SENT = 27_000  # to each of the two sockets of a store with keys, and of one without; over 100,000 malformed
NUM_STREAMS = 250  # of raw bytes, to each of these
MAX_GROWTH_BYTES = 16 << 20

ARENA_ID, WRITER_ID = "ab" * 16, "cd" * 16
EDGES = (0, 1, 2**16, MAX_BLOCKS, MAX_BLOCKS + 1, 2**31, 2**32 - 1)


def seeds_of(arena_id: str) -> list[Message]:
    """Messages of all kinds that a store or a reader understands."""
    hashes = chain(0, 5)
    return [
        Reserve(1, arena_id, WRITER_ID, hashes),
        Reserve(2, ARENA_ID, WRITER_ID, []),
        Reserve(2, arena_id, WRITER_ID, hashes, Owner(b"t" * 16, 3)),
        Reserved(3, Status.OK, [Reservation(1, 3), None]),
        Commit(4, arena_id, WRITER_ID, [Written(slot, 1, 7) for slot in range(5)]),
        Commit(5, arena_id, WRITER_ID, [Written(2**32 - 1, 2**64 - 1, 0)] * 3),
        Committed(6, Status.FULL, 9),
        Get(7, hashes),
        Get(8, []),
        Got(9, [BlockInfo(block_hash, 64, 5) for block_hash in hashes]),
        Ask(10, Verb.STATS),
        Ask(11, Verb.LIST, prefix="abc", offset=3, limit=10),
        Ask(12, Verb.INSPECT, hashes),
        Ask(13, Verb.EVICT, hashes),
        Told(14, 100),
        Filled(15, arena_id, WRITER_ID, [Fill(block_hash, None) for block_hash in hashes], 3),
        Filled(16, arena_id, WRITER_ID, [Fill(hashes[0], Written(2, 1, 7)), Fill(hashes[1], Written(3, 1, 7))]),
    ]


def flip(rng: random.Random, frame: bytearray) -> None:
    for _ in range(rng.randint(1, 6)):
        if frame:
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, frame: bytearray) -> None:
    del frame[rng.randrange(len(frame) + 1) :]


def lengthen(rng: random.Random, frame: bytearray) -> None:
    frame += rng.randbytes(rng.randint(1, 300))


def lie_about_count(rng: random.Random, frame: bytearray) -> None:
    if len(frame) >= 12:
        struct.pack_into("<I", frame, 8, rng.choice(EDGES))


def overwrite(rng: random.Random, frame: bytearray) -> None:
    at = rng.randrange(len(frame) + 1)
    frame[at : at + rng.randint(1, 20)] = rng.randbytes(rng.randint(0, 20))


def replace_all(rng: random.Random, frame: bytearray) -> None:
    frame[:] = rng.randbytes(rng.randint(0, 200))


HARMS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    flip,
    flip,
    cut,
    lengthen,
    lie_about_count,
    overwrite,
    replace_all,
)


def damaged(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    frame = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 3)):
        rng.choice(HARMS)(rng, frame)
    return bytes(frame)


def is_malformed(frame: bytes) -> bool:
    """Anything but a message or a `BadFrame` fails the test."""
    try:
        assert isinstance(decode(frame), Message)
    except BadFrame:
        return True
    return False


# --- the pure parts ---


def test_every_damaged_frame_is_a_message_or_a_bad_frame() -> None:
    rng = random.Random(1)
    seeds = [message.encode() for message in seeds_of(ARENA_ID)]
    num_malformed = 0
    while num_malformed < NUM_DECODED:
        num_malformed += is_malformed(damaged(rng, seeds))


@given(st.lists(st.binary(max_size=120), max_size=6))
def test_questions_of_any_frames(frames: list[bytes]) -> None:
    with pytest.raises(BadFrame):
        decode_question(frames)


SLOT = 64
CONTENTS = {block_hash: (block_hash * 4)[:SLOT] for block_hash in chain(0, 5)}


def test_every_damaged_answer_ends_in_blocks_that_are_right() -> None:
    """What is kept of an answer is a leading run of the blocks that were asked for, byte for byte."""
    rng = random.Random(2)
    hashes = list(CONTENTS)
    infos = [BlockInfo(key, SLOT, xxhash.xxh3_64_intdigest(data)) for key, data in CONTENTS.items()]
    seed = Got(1, infos).encode()
    num_whole = 0
    for _ in range(NUM_ANSWERS):
        frames = [seed, *CONTENTS.values()]
        at = rng.randrange(len(frames))
        action = rng.random()
        if action < 0.7:
            frames[at] = damaged(rng, [frames[at]])
        elif action < 0.8:
            del frames[at]
        elif action < 0.9:
            frames.insert(at, rng.choice(frames))
        else:
            rng.shuffle(frames)
        try:
            answer = Answer(decode(frames[0] if frames else b""), [memoryview(frame) for frame in frames[1:]])
            payloads = check_blocks(answer, hashes, SLOT)
        except BadFrame:
            continue
        assert [bytes(payload.view) for payload in payloads] == [CONTENTS[key] for key in hashes[: len(payloads)]]
        num_whole += len(payloads) == len(hashes)
    assert num_whole < NUM_ANSWERS / 10, "these were to be damaged"


# --- a store that runs ---

# Answers each line with what it holds, and what it has logged.
FUZZED_STORE = """
import asyncio, collections, gc, json, logging, resource, sys
from kvstore.server import StoreConfig, StoreServer
tally = collections.Counter()
class Tally(logging.Handler):
    def emit(self, record):
        tally[record.getMessage().split()[0]] += 1
logging.basicConfig(level="WARNING", handlers=[Tally()])
async def main():
    store = StoreServer(StoreConfig(**json.loads(sys.argv[1])))
    record = await store.start()
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
    print(json.dumps([record.arena_id, record.address]), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        gc.collect()
        store.arena.check_integrity()
        refused = sum(store._tally.refused_frames.values())
        print(json.dumps({"writers": len(store.arena.writers()), "tally": tally, "refused": refused}), flush=True)
asyncio.run(main())
"""


class FuzzedStore:
    """A store process of its own, so that descriptors and memory are its alone."""

    def __init__(self, process: asyncio.subprocess.Process, folder: str, wire_key: str) -> None:
        self._process = process
        self.control = f"{folder}/control"
        self.wire_key = wire_key

    @classmethod
    async def start(cls, folder: Path, redis_url: str, wire_key: str, max_descriptors: int = 0) -> FuzzedStore:
        config = store_config(folder, redis_url, num_slots=64, wire_key=wire_key)
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-c", FUZZED_STORE, json.dumps(asdict(config))]
        command += [str(max_descriptors)] if max_descriptors else []
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=REPOSITORY)
        store = cls(process, config.dir, wire_key)
        store.arena_id, store.address = json.loads(await store._line())
        return store

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 60)
        assert line, "the store has ended"
        return line

    async def books(self) -> dict[str, Any]:
        """Checked by the store itself before it answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        return dict(json.loads(await self._line()))

    def num_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * 4096

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def send(self, place: str, messages: Sequence[list[bytes]]) -> None:
        """All `messages` by who is what a peer should be, then a question, which has to be answered."""
        if place == "control":
            await self._send_to_control(messages)
            return
        context = lingerless_context()
        peer = context.socket(zmq.DEALER)
        peer.setsockopt(zmq.SNDHWM, 0)
        if self.wire_key:
            Curve(self.wire_key).identify(peer)
        peer.connect(self.address)
        for message in messages:
            await peer.send_multipart(message)
        last = 2**64 - 1
        await peer.send(Get(last, chain(0, 2)).encode())
        async with asyncio.timeout(60):
            while decode((await peer.recv_multipart())[0]).request_id != last:
                pass
        context.destroy(linger=0)

    async def _send_to_control(self, messages: Sequence[list[bytes]]) -> None:
        """One connection a message: what is malformed is the last that is heard of a peer."""
        for frame, *more in messages:
            tail = b"".join(more)
            self.stream("control", struct.pack("<II", len(frame), len(tail)) + frame + tail)
        peer = await ControlPeer(Path(self.control).parent).open()
        answer, _ = await peer.ask(Reserve(5, ARENA_ID, WRITER_ID, []))
        assert answer == Reserved(5, Status.STALE, [])
        peer.close()

    def stream(self, place: str, data: bytes) -> None:
        """Raw bytes, by who may not even speak the language."""
        if place == "control":
            with socket.socket(socket.AF_UNIX) as unix:
                unix.connect(self.control)
                unix.sendall(data)
            return
        host, port = self.address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), 10) as tcp:
            tcp.sendall(data)


@pytest.fixture(params=["with_keys", "without_keys"])
async def store(request: pytest.FixtureRequest, short_dir: Path, redis_url: str) -> AsyncIterator[FuzzedStore]:
    wire_key = new_wire_key() if request.param == "with_keys" else ""
    store = await FuzzedStore.start(short_dir / "a", redis_url, wire_key)
    yield store
    await store.stop()


def messages_of(rng: random.Random, arena_id: str, count: int) -> Iterator[list[bytes]]:
    seeds = [message.encode() for message in seeds_of(arena_id)]
    for _ in range(count):
        frames = [damaged(rng, seeds)]
        while rng.random() < 0.1:
            frames.append(rng.choice([b"", damaged(rng, seeds)]))
        yield frames


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
CURVE_GREETING = GREETING.replace(b"NULL\0", b"CURVE")
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
HELLO = b"\x04\xc8\x05HELLO\x01\x00" + bytes(192)
QUESTION = Get(1, chain(0, 1)).encode()
STREAMS = [
    GREETING + READY + b"\x00" + bytes([len(QUESTION)]) + QUESTION,
    GREETING + READY + b"\x02" + struct.pack(">Q", 2**63) + b"x" * 100,
    GREETING + READY + b"\x02" + struct.pack(">Q", MAX_FRAME_BYTES) + b"x" * 100,
    GREETING + READY + b"\x01\x01x" * 100,
    GREETING + b"\x04\xff\x05READY" + b"\xff" * 250,
    CURVE_GREETING + HELLO,
    CURVE_GREETING + b"\x06" + struct.pack(">Q", 2**40) + b"\x08INITIATE",
    b"GET / HTTP/1.1\r\nHost: store\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"",
]


async def attack(store: FuzzedStore, rng: random.Random, num_messages: int, num_streams: int) -> None:
    for place in ("control", "data"):
        await store.send(place, list(messages_of(rng, store.arena_id, num_messages)))
        for index in range(num_streams):
            store.stream(place, STREAMS[index] if index < len(STREAMS) else damaged(rng, STREAMS))
        await store.send(place, [])


async def test_a_store_under_attack_goes_on_and_leaks_nothing(store: FuzzedStore) -> None:
    rng = random.Random(3)
    await attack(store, rng, 500, 50)  # so that what a store needs once is there before it is measured
    await eventually(lambda: _is_quiet(store))
    descriptors, resident = store.num_descriptors(), store.resident_bytes()
    await attack(store, rng, NUM_SENT, NUM_STREAMS)
    await eventually(lambda: _is_quiet(store), what="slots of writers that never were come back")
    await eventually(lambda: store.num_descriptors() <= descriptors, what="descriptors come back")
    assert store.resident_bytes() - resident < MAX_GROWTH_BYTES
    books = await store.books()
    assert not {"event=message_failed", "event=ask_failed"} & books["tally"].keys(), "it reached what it should not"
    assert books["refused"] > 50_000
    assert 0 < books["tally"]["event=bad_frame"] < 1_000, "one line a second in the log, not one a frame"


async def _is_quiet(store: FuzzedStore) -> bool:
    return (await store.books())["writers"] == 0


async def test_a_store_without_descriptors_comes_back(short_dir: Path, redis_url: str) -> None:
    """More strangers than it has descriptors for: those inside go on, and it is well when they are gone."""
    key = new_wire_key()
    store = await FuzzedStore.start(short_dir / "a", redis_url, key, max_descriptors=64)
    host, port = store.address.removeprefix("tcp://").split(":")
    strangers = []
    try:
        descriptors = store.num_descriptors()
        await store.send("data", [])
        for _ in range(100):
            strangers.append(socket.create_connection((host, int(port)), 10))
        await eventually(lambda: store.num_descriptors() >= 64, what="it has no more")
        await asyncio.sleep(1.0)
        await store.books()
        for stranger in strangers:
            stranger.close()
        await store.send("data", [])
        await store.send("control", [])
        await eventually(lambda: store.num_descriptors() <= descriptors, what="descriptors come back")
        await store.books()
    finally:
        for stranger in strangers:
            stranger.close()
        await store.stop()
