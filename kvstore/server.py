"""The store: one process per machine that owns an arena in shared memory and the sockets in front of it.

Writers on this machine reserve and commit over a Unix stream (`kvstore/control.py`); readers on other machines get
blocks over ZeroMQ or plain TCP, sent from the slots without a copy. It does not know what the bytes mean, and no
message can make it fail.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from kvstore.admin import Admin
from kvstore.announcer import Announcer
from kvstore.arena import Arena
from kvstore.arena_map import ArenaMap, arena_bytes, slots_within
from kvstore.blocks import BlockHash
from kvstore.control import ControlDoor
from kvstore.curve import CURVE_BYTES, Curve, Doorkeeper, is_loopback
from kvstore.directory import ArenaRecord, Directory
from kvstore.errors import BadFrame, DirectoryUnavailable
from kvstore.eviction import ADMISSIONS, POLICIES, AdmitAll
from kvstore.flood import FloodGuard
from kvstore.folder import StoreFolder
from kvstore.frames import (
    MAX_FRAME_BYTES,
    MAX_QUESTIONS,
    Ask,
    Commit,
    Filled,
    Get,
    Got,
    Message,
    Reserve,
    Told,
    part_blocks,
)
from kvstore.frames import decode as decode_frame
from kvstore.inbox import Inbox, plain_socket
from kvstore.local import MAX_SOCKET_PATH, Description, StorePaths
from kvstore.memory import create_memory
from kvstore.metrics import StoreCollector
from kvstore.scrape import ScrapeDoor
from kvstore.service import StoreService
from kvstore.ssd import BlockFile
from kvstore.stream import pack
from kvstore.tally import CONTROL, DATA, StoreTally
from kvstore.tcp_door import TcpDoor
from kvstore.tiers import DiskTier

logger = logging.getLogger(__name__)

_REAP_S = 0.5
_MAX_KEPT_FRAMES = 1 << 16
_HANDSHAKE_MS = 5_000  # how long a peer that connects and does not authenticate holds a descriptor


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How to run a store. `dir` is its own folder, with a short path (it holds a Unix socket), best under /dev/shm."""

    dir: str
    redis_url: str = field(repr=False)  # may have a password in it
    slot_bytes: int  # block_bytes of the model
    memory_bytes: int  # of the arena, allocated in full at the start
    eviction: str = "s3fifo"  # or "lru"
    disk_bytes: int = 0  # for blocks that the arena has no room for; 0: none
    disk_dir: str = ""  # kept from one start to the next; no two stores may share it
    disk_admission: str = "all"  # which evicted blocks go to disk: "all" or "second-touch"
    disk_root: str = ""  # hex of KVLayout.root(): blocks of other models found there are not used
    cluster: str = "default"
    advertise_host: str = "127.0.0.1"  # where other machines find it
    bind_host: str = ""  # "": advertise_host
    host: str = ""  # label of the machine; "": its host name
    wire_key: str = field(default="", repr=False)  # see kvstore/curve.py; "": readers are not authenticated
    trusts_network: bool = False  # without a wire_key, only this allows an address that other machines reach
    tcp: bool = True  # without a wire_key, blocks can also be read over plain TCP, which is faster
    metrics: bool = True  # for Prometheus, over HTTP, at a port of their own on the data socket's address
    metrics_port: int = 0  # 0: the kernel chooses
    heartbeat_s: float = 1.0
    ttl_s: float = 5.0


class StoreServer:
    """A store process. Everything happens on the event loop that `start` is called on."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self._paths = StorePaths(Path(config.dir))
        self._folder = StoreFolder(self._paths)
        self._arena_id = uuid.uuid4().hex
        self._num_slots = slots_within(config.memory_bytes, config.slot_bytes)
        self._tasks: set[asyncio.Task[None]] = set()
        self._directory = Directory(config.redis_url, config.cluster)
        self._disk: DiskTier | None = None
        self._readers: Inbox | None = None
        self._flood_guard: FloodGuard | None = None
        self._frames: dict[int, zmq.Frame] = {}  # by slot
        self._tally = StoreTally(time.monotonic)  # the clock that readers of the mapping stamp slots by
        self._control_door = ControlDoor(self._answer_writer, partial(self._refuse, CONTROL))
        self._scrape_door, self._metrics_address = ScrapeDoor(), ""
        self._tcp_door: TcpDoor | None = None
        self._tcp_address = ""
        self._curve = Curve(config.wire_key) if config.wire_key else None

    async def start(self) -> ArenaRecord:
        """Creates the arena, opens the sockets, announces itself; if Redis is down, announces once it comes up.

        Raises ValueError for a config that cannot work, OSError when there is not enough memory or an address cannot
        be bound, `ArenaUnavailable` when `dir` belongs to another living store, `OtherScheme` when the cluster names
        blocks differently.
        """
        self._check()
        predecessor = self._folder.take()
        self._context = zmq.asyncio.Context()
        self._context.linger = 0  # for all its sockets: closing does not wait for a peer that went away
        try:
            memory = await asyncio.to_thread(create_memory, self._paths.memory(self._arena_id), self._arena_bytes)
            self._service = await self._make_service(memory)
            await self._open_sockets()
            if self.config.metrics:
                host = self.config.advertise_host
                self._metrics_address = await self._scrape_door.open(
                    self._metrics, self._bind_host, host, self.config.metrics_port
                )
            Description(self._arena_id, self._num_slots, self.config.slot_bytes).write(self._paths.description)
            await self._forget(predecessor)
            with suppress(DirectoryUnavailable):  # checked once Redis comes up; and readers check each record
                await self._directory.check_scheme()
            await self._announcer.round()
        except BaseException:
            if self._disk is not None:
                await self._disk.stop()
            await self._close_doors()
            self._leave()
            raise
        assert self._flood_guard is not None
        for loop in (self._announcer.run(), self._reap(), self._flood_guard.run()):
            self._spawn(loop)
        self._readers = Inbox(self._data, self._serve_reader)
        if self._curve is not None:
            self._spawn(self._doorkeeper.run())
        logger.info("event=store_up arena=%s slots=%d address=%s", self._arena_id, self._num_slots, self._address)
        return self.record()

    async def stop(self) -> None:
        """Leaves the directory and removes all files."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close_doors()
        if self._disk is not None:
            await self._disk.stop()
        try:
            await self._directory.remove_arena(self._arena_id)
        except DirectoryUnavailable as error:
            logger.warning("event=leave_failed arena=%s error=%r", self._arena_id, error)
        await self._directory.close()
        self._leave()

    async def _make_service(self, memory: memoryview) -> StoreService:
        config = self.config
        arena_map = self._map = ArenaMap(memory, self._num_slots, config.slot_bytes)
        admit = ADMISSIONS[config.disk_admission] if config.disk_bytes else AdmitAll
        self.arena = Arena(arena_map, POLICIES[config.eviction](self._num_slots), admit(self._num_slots))
        self._announcer = Announcer(
            self._directory, lambda: self._service.inventory(), self.record, config.heartbeat_s, config.ttl_s
        )
        if config.disk_bytes:
            root = bytes.fromhex(config.disk_root)
            make_file = partial(BlockFile, Path(config.disk_dir), config.disk_bytes, config.slot_bytes, root)
            self._disk = await DiskTier.open(make_file, self.arena, arena_map, self._announcer.changed, self._tally)
        service = StoreService(self._arena_id, self.arena, arena_map, self._announcer, self._disk, self._tally)
        self._admin = Admin(service, self.arena, arena_map, self._disk, self._tally)
        self._metrics = StoreCollector(self._admin, self._tally)
        return service

    def record(self) -> ArenaRecord:
        """The arena as it is now."""
        return ArenaRecord(
            arena_id=self._arena_id,
            address=self._address,
            host=self.config.host or socket.gethostname(),
            slot_bytes=self.config.slot_bytes,
            num_slots=self._num_slots,
            free_slots=self.arena.num_free,
            draining=self._service.is_draining,
            metrics_address=self._metrics_address,
            tcp_address=self._tcp_address,
        )

    @property
    def _bind_host(self) -> str:
        return self.config.bind_host or self.config.advertise_host

    @property
    def _arena_bytes(self) -> int:
        return arena_bytes(self._num_slots, self.config.slot_bytes)

    def _check(self) -> None:
        length = len(os.fsencode(self._paths.control))
        if length > MAX_SOCKET_PATH:
            raise ValueError(f"dir: the path {self._paths.control} has {length} bytes, a socket's at most 107")
        if self._curve is None and not self.config.trusts_network and not is_loopback(self._bind_host):
            problem = "needs a wire_key, or everybody who reaches it reads blocks; trusts_network allows that"
            raise ValueError(f"bind_host: {self._bind_host} {problem}")
        if self._num_slots < 1:
            raise ValueError(f"memory_bytes: {self.config.memory_bytes} hold no slot of {self.config.slot_bytes} bytes")
        if self.config.eviction not in POLICIES:
            raise ValueError(f"eviction: {self.config.eviction!r} is none of {', '.join(POLICIES)}")
        if self.config.disk_admission not in ADMISSIONS:
            raise ValueError(f"disk_admission: {self.config.disk_admission!r} is none of {', '.join(ADMISSIONS)}")

    async def _forget(self, predecessor: str) -> None:
        """Removes the arena of a killed store from the directory at once, without waiting for its time to live."""
        try:
            if predecessor:
                await self._directory.remove_arena(predecessor)
        except DirectoryUnavailable as error:
            logger.info("event=predecessor_not_removed arena=%s error=%r", predecessor, error)

    async def _close_doors(self) -> None:
        await self._control_door.close()
        await self._scrape_door.close()
        if self._tcp_door is not None:
            await self._tcp_door.close()

    def _leave(self) -> None:
        if self._readers is not None:
            self._readers.close()
        if self._flood_guard is not None:
            self._flood_guard.close()
        self._context.destroy(linger=0)
        self._frames.clear()
        self._folder.leave()

    async def _open_sockets(self) -> None:
        await self._control_door.open(self._paths.control)
        self._data = plain_socket(self._context, zmq.ROUTER)
        if self._curve is not None:
            self._doorkeeper = Doorkeeper(self._context, self._curve)
            self._curve.guard(self._data)
        self._data.setsockopt(zmq.SNDHWM, 2 * MAX_QUESTIONS)  # what a reader does not read is dropped beyond that
        self._flood_guard = FloodGuard(self._context, self._data)
        self._bind(self._data, f"tcp://{self._bind_host}:*")
        port = str(self._data.getsockopt_string(zmq.LAST_ENDPOINT)).rsplit(":", 1)[1]
        self._address = f"tcp://{self.config.advertise_host}:{port}"
        if self.config.tcp and self._curve is None:  # with a key no block is sent unencrypted
            self._tcp_door = TcpDoor(self._find, self._map.view, self.config.slot_bytes, partial(self._refuse, DATA))
            self._tcp_address = await self._tcp_door.open(self._bind_host, self.config.advertise_host)

    def _bind(self, router: zmq.Socket[Any], address: str) -> None:
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES + CURVE_BYTES)
        router.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        try:
            router.bind(address)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"{address}: {error}") from error

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _answer_writer(self, question: Message) -> bytes | Coroutine[Any, Any, bytes]:
        match question:
            case Reserve():
                return pack(self._service.reserve(question))
            case Commit():
                return pack(self._service.commit(question))
            case Filled():
                return pack(self._service.filled(question))
            case Ask():
                return self._tell_operator(question)
        raise BadFrame(f"{type(question).__name__} is no question to this socket")

    def _serve_reader(self, frames: list[zmq.Frame]) -> None:
        if self._flood_guard is not None:
            self._flood_guard.took(frames)
        try:
            sender, question = decode_question([frame.bytes for frame in frames])
            if isinstance(question, Get) and self._service.needs_disk(question):
                self._spawn(self._answer_from_disk(sender, question))
            elif isinstance(question, Get):
                self._answer(sender, question)
            elif isinstance(question, Ask) and self._curve is not None:  # only holders of the wire key got here
                self._spawn(self._tell_reader(sender, question))
            else:
                raise BadFrame(f"{type(question).__name__} is no question to this socket")
        except BadFrame as error:
            self._refuse(DATA, error)
        except Exception:
            logger.exception("event=message_failed socket=data")

    async def _answer_from_disk(self, sender: bytes, question: Get) -> None:
        self._answer(sender, question, await self._service.promote(question))

    def _answer(self, sender: bytes, question: Get, promoted: frozenset[BlockHash] = frozenset()) -> None:
        part = question.hashes[: part_blocks(self.config.slot_bytes)]
        answer, slots = self._service.get(Get(question.request_id, part), promoted)
        self._send([sender, answer.encode(), *map(self._frame, slots)])

    async def _find(self, question: Get) -> tuple[Got, list[int]]:
        needs_disk = self._service.needs_disk(question)
        return self._service.get(question, await self._service.promote(question) if needs_disk else frozenset())

    def _send(self, frames: list[bytes | zmq.Frame]) -> None:
        self._data.send_multipart(frames, zmq.NOBLOCK, copy=False)
        if self._readers is not None:
            self._readers.wake()

    def _frame(self, slot: int) -> zmq.Frame:
        """The slot's bytes. Cached, because releasing a frame costs a switch of threads and of Python's lock."""
        frame = self._frames.get(slot)
        if frame is None:
            frame = zmq.Frame(self._map.view(slot), copy=False, copy_threshold=0)
            if len(self._frames) < _MAX_KEPT_FRAMES:
                self._frames[slot] = frame
        return frame

    async def _tell_operator(self, question: Ask) -> bytes:
        return pack(*await self._told(question))

    async def _tell_reader(self, sender: bytes, question: Ask) -> None:
        told, text = await self._told(question)
        self._send([sender, told.encode(), text])

    async def _told(self, question: Ask) -> tuple[Told, bytes]:
        try:
            text = await self._admin.answer(question)
        except Exception:
            logger.exception("event=ask_failed verb=%s", question.verb.name)
            text = b'{"error": "the store failed to answer; its log says why"}'
        return Told(question.request_id, len(text)), text

    def _refuse(self, socket: str, error: BadFrame) -> None:
        num_frames = self._tally.refused(socket)
        if num_frames:
            logger.warning("event=bad_frame socket=%s frames=%d error=%r", socket, num_frames, error)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(_REAP_S)
            try:
                for writer_id in self._folder.dead_writers(self._service.writers()):
                    num_slots = self._service.abandon(writer_id)
                    logger.info("event=writer_gone writer=%s slots=%d", writer_id, num_slots)
            except OSError:
                logger.exception("event=reap_failed")


def decode_question(frames: list[bytes]) -> tuple[bytes, Message]:
    """Sender and message of what a ROUTER socket received. Raises `BadFrame` unless it is exactly one frame."""
    if len(frames) != 2:
        raise BadFrame(f"{len(frames)} frames")
    return frames[0], decode_frame(frames[1])
