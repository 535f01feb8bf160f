"""The control socket: questions and answers over a unix stream, and what becomes of those who misuse it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from hypothesis import given
from hypothesis import strategies as st
from kvstore_support import ControlPeer, chain, store_config

from kvstore.control import MAX_PEERS, MAX_QUESTIONS, ControlChannel, ControlDoor
from kvstore.errors import ArenaUnavailable, BadFrame
from kvstore.frames import MAX_FRAME_BYTES, Ask, Commit, Get, Message, Reserve, Reserved, Status, Told, Verb
from kvstore.server import StoreServer
from kvstore.stream import Unpacker, pack

ARENA_ID, WRITER_ID = "ab" * 16, "cd" * 16
MESSAGES: list[tuple[Message, bytes]] = [
    (Reserve(1, ARENA_ID, WRITER_ID, chain(0, 3)), b""),
    (Told(2, 5), b"[1,2]"),
    (Commit(3, ARENA_ID, WRITER_ID, []), b""),
]


def question(request_id: int) -> Message:
    return Reserve(request_id, ARENA_ID, WRITER_ID, [])


def answered(message: Message) -> bytes:
    return pack(Reserved(message.request_id, Status.STALE))


# --- the pure part ---


@given(st.lists(st.integers(1, 60), min_size=1))
def test_messages_are_the_same_however_they_are_cut(steps: list[int]) -> None:
    stream = b"".join(pack(*item) for item in MESSAGES * 3)
    unpacker, found, at = Unpacker(100), list[tuple[Message, bytes]](), 0
    for step in [*steps, len(stream)]:
        unpacker.feed(stream[at : at + step])
        at += step
        while (taken := unpacker.take()) is not None:
            found.append(taken)
    assert found == MESSAGES * 3


@pytest.mark.parametrize(
    "stream",
    [
        b"GET / HTTP/1.1\r\n",
        struct.pack("<II", MAX_FRAME_BYTES + 1, 0),  # known by its length, before any of it came
        struct.pack("<II", 30, 101),
        struct.pack("<II", 0, 0),
        pack(question(1))[:8] + b"x" * 200,
    ],
)
def test_what_is_no_message(stream: bytes) -> None:
    unpacker = Unpacker(100)
    unpacker.feed(stream)
    with pytest.raises(BadFrame):
        unpacker.take()


@given(st.binary(max_size=300))
def test_any_bytes_are_messages_or_refused(stream: bytes) -> None:
    unpacker = Unpacker()
    unpacker.feed(stream)
    try:
        while unpacker.take() is not None:
            pass
    except BadFrame:
        pass


# --- a channel and what is at its other end ---


class Door:
    """A door that answers as a test likes, and what it refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refused: list[BadFrame] = []
        self.answer: Any = answered
        self.door = ControlDoor(lambda message: self.answer(message), self.refused.append)

    async def __aenter__(self) -> Door:
        await self.door.open(self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.door.close()

    async def peer(self) -> ControlPeer:
        return await ControlPeer(self.path.parent).open()


@pytest.fixture
async def door(short_dir: Path) -> AsyncIterator[Door]:
    async with Door(short_dir / "control") as door:
        yield door


@pytest.fixture
async def channel(door: Door) -> AsyncIterator[ControlChannel]:
    channel = ControlChannel(door.path)
    yield channel
    channel.close()


async def test_many_questions_at_once_find_their_answers(door: Door, channel: ControlChannel) -> None:
    """More than may be under way take turns."""

    async def slowly(message: Message) -> bytes:
        await asyncio.sleep(0.001 * (message.request_id % 3))
        return answered(message)

    door.answer = slowly
    asked: list[int] = []

    def ask(request_id: int) -> Message:
        asked.append(request_id)
        return question(request_id)

    answers = await asyncio.gather(*(channel.request(ask, 10.0) for _ in range(5 * MAX_QUESTIONS)))
    assert sorted(answer.message.request_id for answer in answers) == sorted(asked) and len(set(asked)) == len(answers)
    assert not door.refused and not channel.is_broken and len(door.door.peers) == 1


async def test_a_late_answer_is_dropped_and_others_are_not(door: Door, channel: ControlChannel) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def late(message: Message) -> bytes:
        begun.set()
        await may_end.wait()
        return answered(message)

    door.answer = late
    with pytest.raises(ArenaUnavailable, match="no answer within"):
        await channel.request(question, 0.05)
    door.answer = answered
    may_end.set()
    assert (await channel.request(question, 10.0)).message == Reserved(2, Status.STALE, [])


async def test_a_cancelled_question_leaves_the_channel_as_it_was(door: Door, channel: ControlChannel) -> None:
    door.answer = lambda message: asyncio.sleep(600)
    for wait_s in (0.0, 0.02):  # before it is connected, and while the question is under way
        asking = asyncio.create_task(channel.request(question, 60.0))
        await asyncio.sleep(wait_s)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    door.answer = answered
    await channel.request(question, 10.0)


async def test_nobody_listens(short_dir: Path) -> None:
    channel = ControlChannel(short_dir / "control")
    for _ in range(2):
        with pytest.raises(ArenaUnavailable):
            await channel.request(question, 60.0)
    assert channel.is_broken
    channel.close()


async def test_a_store_that_lets_nobody_in_costs_the_time_out(short_dir: Path) -> None:
    """As one that is stopped does. What waits before its door is no connection yet."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(short_dir / "control"))
    listener.listen(0)
    channels = [ControlChannel(short_dir / "control") for _ in range(3)]
    asking = [asyncio.create_task(channel.request(question, 0.2)) for channel in channels]
    for task in asking:
        with pytest.raises(ArenaUnavailable, match="no answer within"):
            await task
    late = asyncio.create_task(channels[-1].request(question, 60.0))
    await asyncio.sleep(0.02)
    listener.close()
    with pytest.raises(ArenaUnavailable):
        await late
    for channel in channels:
        channel.close()


async def test_all_questions_fail_at_once_when_the_store_goes(door: Door, channel: ControlChannel) -> None:
    door.answer = lambda message: asyncio.sleep(600)
    asking = [asyncio.create_task(channel.request(question, 60.0)) for _ in range(5)]
    await eventually(lambda: any(peer._under_way for peer in door.door.peers))
    await door.door.close()
    for task in asking:
        with pytest.raises(ArenaUnavailable, match="gone"):
            await task
    assert channel.is_broken
    with pytest.raises(ArenaUnavailable):
        await channel.request(question, 60.0)


async def test_close_ends_all_questions(door: Door, channel: ControlChannel) -> None:
    door.answer = lambda message: asyncio.sleep(600)
    early = ControlChannel(door.path)
    asking = [asyncio.create_task(one.request(question, 60.0)) for one in (channel, early)]
    await eventually(lambda: len(door.door.peers) == 2)
    channel.close()
    early.close()
    channel.close()
    for task in asking:
        with pytest.raises(ArenaUnavailable):
            await task
    unused = ControlChannel(door.path)
    asking = [asyncio.create_task(unused.request(question, 60.0))]
    await asyncio.sleep(0)
    unused.close()  # while it connects
    with pytest.raises(ArenaUnavailable):
        await asking[0]
    await eventually(lambda: not door.door.peers, what="the door knows")


@pytest.mark.parametrize(
    "answer",
    [
        b"x" * 100,
        struct.pack("<II", 2**32 - 1, 0),
        struct.pack("<II", 30, 2**32 - 1),
        pack(question(1))[:8] + b"\xff" * 100,
    ],
)
async def test_what_is_no_answer_ends_the_connection(door: Door, channel: ControlChannel, answer: bytes) -> None:
    door.answer = lambda message: answer
    with pytest.raises(ArenaUnavailable):
        await channel.request(question, 60.0)
    assert channel.is_broken


async def test_a_store_that_does_not_read_is_given_up(short_dir: Path) -> None:
    listener = await asyncio.start_unix_server(lambda reader, writer: asyncio.sleep(600), short_dir / "control")
    channel = ControlChannel(short_dir / "control")
    big = lambda request_id: Reserve(request_id, ARENA_ID, WRITER_ID, chain(0, 4096))  # noqa: E731
    asking = [asyncio.create_task(channel.request(big, 60.0)) for _ in range(MAX_QUESTIONS)]
    for task in asking:
        with pytest.raises(ArenaUnavailable):
            await task
    listener.close()


# --- who misuses the door ---


@pytest.mark.parametrize(
    "garbage", [b"x" * 20, struct.pack("<II", 2**31, 0), struct.pack("<II", 40, 1), pack(Told(1, 0), b"y")]
)
async def test_garbage_is_counted_and_its_sender_cut_off(door: Door, garbage: bytes) -> None:
    good = await door.peer()
    await good.ask(question(1))
    bad = await door.peer()
    bad.send(question(7), garbage, question(8))
    assert (await bad.receive())[0].request_id == 7, "what came before it is answered"
    assert await bad.is_cut_off()
    assert len(door.refused) == 1 and len(door.door.peers) == 1
    assert (await good.ask(question(2)))[0].request_id == 2
    good.close()


async def test_who_asks_too_much_at_a_time_is_cut_off(door: Door) -> None:
    door.answer = lambda message: asyncio.sleep(600)
    peer = await door.peer()
    peer.send(*(question(number) for number in range(MAX_QUESTIONS + 1)))
    assert await peer.is_cut_off()
    assert "at a time" in str(door.refused[0])
    assert not door.door.peers


async def test_who_does_not_read_is_cut_off(door: Door) -> None:
    door.answer = lambda message: pack(Told(message.request_id, 0)) + pack(Told(0, 60_000), bytes(60_000))
    peer = await door.peer()
    peer._writer.transport.pause_reading()
    peer.send(*(question(number) for number in range(MAX_QUESTIONS)))
    await eventually(lambda: not door.door.peers, what="the door has let go")


async def test_who_leaves_takes_his_questions_along(door: Door) -> None:
    cancelled = asyncio.Event()

    async def answer(message: Message) -> bytes:
        try:
            await asyncio.sleep(600)
        finally:
            cancelled.set()
        return b""

    door.answer = answer
    peer = await door.peer()
    peer.send(question(1))
    await eventually(lambda: any(peer._under_way for peer in door.door.peers))
    peer.close()
    async with asyncio.timeout(10):
        await cancelled.wait()
    assert not door.refused


async def test_more_peers_than_there_may_be(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PEERS > 100
    monkeypatch.setattr("kvstore.control.MAX_PEERS", 3)
    peers = [await door.peer() for _ in range(3)]
    for number, peer in enumerate(peers):
        await peer.ask(question(number))
    stranger = await door.peer()
    stranger.send(question(9))
    assert await stranger.is_cut_off()
    peers[0].close()
    await eventually(lambda: len(door.door.peers) == 2)
    await peers[1].ask(question(10))
    for peer in peers:
        peer.close()


async def test_a_question_that_fails_ends_its_connection_alone(door: Door) -> None:
    good, bad = await door.peer(), await door.peer()

    def fail(message: Message) -> bytes:
        raise ZeroDivisionError

    door.answer = fail
    bad.send(question(1))
    assert await bad.is_cut_off() and not door.refused
    door.answer = answered
    await good.ask(question(2))
    good.close()


# --- a store's own ---


async def test_a_store_hears_writers_and_operators_there_and_nobody_else(redis_url: str, short_dir: Path) -> None:
    store = StoreServer(store_config(short_dir / "store", redis_url))
    await store.start()
    control = Path(store.config.dir) / "control"
    assert control.stat().st_mode & 0o777 == 0o600 and control.is_socket()
    for message, is_heard in (
        (Reserve(1, ARENA_ID, WRITER_ID, chain(0, 1)), True),
        (Ask(1, Verb.STATS), True),
        (Get(1, chain(0, 1)), False),
        (Reserved(1, Status.OK), False),
        (Told(1, 0), False),
    ):
        peer = await ControlPeer(store.config.dir).open()
        peer.send(message)
        if is_heard:
            assert (await peer.receive())[0].request_id == 1
        else:
            assert await peer.is_cut_off()
        peer.close()
    assert store._tally.refused_frames == {"control": 3, "data": 0}
    peer = await ControlPeer(store.config.dir).open()
    await store.stop()
    assert await peer.is_cut_off() and not control.exists()
