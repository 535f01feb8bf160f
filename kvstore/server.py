"""The store: one process on each machine that owns an arena in shared memory and the two sockets in front of it.

Writers of this machine reserve and commit over a unix socket; readers of other machines get blocks over TCP, sent
from the slots without a copy. It knows nothing of what the bytes mean, and no message can make it fail.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from kvstore.announcer import Announcer
from kvstore.arena import Arena, ArenaMap, arena_bytes, slots_within
from kvstore.blocks import BlockHash
from kvstore.curve import CURVE_BYTES, Curve, Doorkeeper, is_loopback
from kvstore.directory import ArenaRecord, Directory
from kvstore.errors import ArenaFull, ArenaUnavailable, BadFrame, DirectoryUnavailable
from kvstore.eviction import POLICIES
from kvstore.frames import MAX_FRAME_BYTES, BlockInfo, Commit, Committed, Get, Got, Message, Reserve, Reserved, Status
from kvstore.frames import decode as decode_frame
from kvstore.local import MAX_SOCKET_PATH, Description, FileLock, StorePaths
from kvstore.memory import create_memory
from kvstore.ssd import BlockFile
from kvstore.tiers import DiskTier

logger = logging.getLogger(__name__)

_REAP_S = 0.5
_HANDSHAKE_MS = 5_000  # who connects and does not say who he is holds a descriptor for so long


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How to run a store. `dir` is its own, short (a unix socket lives in it), and best under /dev/shm."""

    dir: str
    redis_url: str
    slot_bytes: int  # block_bytes of the model
    memory_bytes: int  # of the arena, taken whole at the start
    eviction: str = "s3fifo"  # or "lru"
    disk_bytes: int = 0  # for blocks that the arena has no room for; 0: none
    disk_dir: str = ""  # kept from one start to the next; no two stores may share it
    disk_root: str = ""  # hex of KVLayout.root(): blocks of other models that lie there are not taken over
    cluster: str = "default"
    advertise_host: str = "127.0.0.1"  # where other machines find it
    bind_host: str = ""  # "": advertise_host
    host: str = ""  # label of the machine; "": its host name
    wire_key: str = field(default="", repr=False)  # see kvstore/curve.py; "": readers are not asked who they are
    trusts_network: bool = False  # without a wire_key, only this allows an address that other machines reach
    heartbeat_s: float = 1.0
    ttl_s: float = 5.0


class StoreServer:
    """A store process's one object. Everything happens on the event loop that `start` is called on."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self._paths = StorePaths(Path(config.dir))
        self._arena_id = uuid.uuid4().hex
        self._num_slots = slots_within(config.memory_bytes, config.slot_bytes)
        self._tasks: set[asyncio.Task[None]] = set()
        self._directory = Directory(config.redis_url, config.cluster)
        self._disk: DiskTier | None = None
        self._curve = Curve(config.wire_key) if config.wire_key else None

    async def start(self) -> ArenaRecord:
        """Makes the arena, opens the sockets, announces itself; works without Redis, and announces when it comes.

        ValueError for a config that cannot work, OSError when there is not enough memory or an address cannot be
        bound, `ArenaUnavailable` when the directory belongs to another store that is alive, `OtherScheme` when the
        cluster names blocks in another way.
        """
        self._check()
        self._take_directory()
        self._context = zmq.asyncio.Context()
        try:
            memory = await asyncio.to_thread(create_memory, self._paths.memory(self._arena_id), self._arena_bytes)
            self._map = ArenaMap(memory, self._num_slots, self.config.slot_bytes)
            self.arena = Arena(self._map, POLICIES[self.config.eviction](self._num_slots))
            self._announcer = Announcer(
                self._directory, self._inventory, self.record, self.config.heartbeat_s, self.config.ttl_s
            )
            if self.config.disk_bytes:
                file = partial(BlockFile, Path(self.config.disk_dir), self.config.disk_bytes, self.config.slot_bytes)
                root = bytes.fromhex(self.config.disk_root)
                self._disk = await DiskTier.open(partial(file, root), self.arena, self._map, self._announcer.changed)
            self._open_sockets()
            Description(self._arena_id, self._num_slots, self.config.slot_bytes).write(self._paths.description)
            await self._forget_predecessor()
            with suppress(DirectoryUnavailable):  # then it is told when it comes, and readers check each record
                await self._directory.check_scheme()
            await self._announcer.round()
        except BaseException:
            if self._disk is not None:
                await self._disk.stop()
            self._leave_directory()
            raise
        for loop in (self._announcer.run(), self._serve_writers(), self._serve_readers(), self._reap()):
            self._spawn(loop)
        if self._curve is not None:
            self._spawn(self._doorkeeper.run())
        logger.info("event=store_up arena=%s slots=%d address=%s", self._arena_id, self._num_slots, self._address)
        return self.record()

    async def stop(self) -> None:
        """Leaves the directory and removes all files."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._disk is not None:
            await self._disk.stop()
        try:
            await self._directory.remove_arena(self._arena_id)
        except DirectoryUnavailable as error:
            logger.warning("event=leave_failed arena=%s error=%r", self._arena_id, error)
        await self._directory.close()
        self._leave_directory()

    def record(self) -> ArenaRecord:
        """The arena as it is now."""
        return ArenaRecord(
            arena_id=self._arena_id,
            address=self._address,
            host=self.config.host or socket.gethostname(),
            slot_bytes=self.config.slot_bytes,
            num_slots=self._num_slots,
            free_slots=self.arena.num_free,
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

    def _take_directory(self) -> None:
        """Takes the directory over, and removes what a store that was killed has left there."""
        self._paths.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._paths.lock.touch(mode=0o600)
        lock = FileLock.take(self._paths.lock)
        if lock is None:
            raise ArenaUnavailable(f"{self._paths.dir} belongs to a store that is running")
        self._lock = lock
        self._predecessor = _arena_left_in(self._paths)
        self._remove_files()
        self._paths.writers.mkdir(mode=0o700)

    async def _forget_predecessor(self) -> None:
        """The arena of a store that was killed is gone now, not only when its time to live ends."""
        try:
            if self._predecessor:
                await self._directory.remove_arena(self._predecessor)
        except DirectoryUnavailable as error:
            logger.info("event=predecessor_not_removed arena=%s error=%r", self._predecessor, error)

    def _leave_directory(self) -> None:
        self._context.destroy(linger=0)
        self._remove_files()
        self._lock.remove()
        try:
            self._paths.dir.rmdir()
        except OSError as error:  # somebody else keeps files there
            logger.info("event=dir_kept dir=%s error=%r", self._paths.dir, error)

    def _remove_files(self) -> None:
        self._paths.description.unlink(missing_ok=True)
        for path in self._paths.dir.glob("arena-*.mem"):
            path.unlink(missing_ok=True)
        self._paths.control.unlink(missing_ok=True)
        shutil.rmtree(self._paths.writers, ignore_errors=True)

    def _open_sockets(self) -> None:
        self._control = self._router(f"ipc://{self._paths.control}")
        self._paths.control.chmod(0o600)  # the folder may be older than this store, and open
        if self._curve is not None:
            self._doorkeeper = Doorkeeper(self._context, self._curve)
        self._data = self._router(f"tcp://{self._bind_host}:*", self._curve)
        port = str(self._data.getsockopt_string(zmq.LAST_ENDPOINT)).rsplit(":", 1)[1]
        self._address = f"tcp://{self.config.advertise_host}:{port}"

    def _router(self, address: str, curve: Curve | None = None) -> zmq.asyncio.Socket:
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES + CURVE_BYTES)
        router.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        if curve is not None:
            curve.guard(router)
        try:
            router.bind(address)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"{address}: {error}") from error
        return router

    def _inventory(self) -> list[tuple[BlockHash, int]]:
        return [*self.arena.blocks(), *(self._disk.inventory() if self._disk else ())]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_writers(self) -> None:
        while True:
            frames = await self._control.recv_multipart()
            try:
                sender, question = decode_question(frames)
                if isinstance(question, Reserve):
                    await self._control.send_multipart([sender, self._reserve(question).encode()])
                elif isinstance(question, Commit):
                    self._spawn(self._commit(sender, question))
            except BadFrame as error:
                logger.warning("event=bad_frame socket=control error=%r", error)
            except Exception:  # whatever one message does, the next one is served
                logger.exception("event=message_failed socket=control")

    async def _serve_readers(self) -> None:
        while True:
            frames = await self._data.recv_multipart()
            try:
                sender, question = decode_question(frames)
                if isinstance(question, Get) and self._disk and self._disk.is_needed(question.hashes):
                    self._spawn(self._answer_from(self._disk, sender, question))
                elif isinstance(question, Get):
                    await self._answer(sender, question)
            except BadFrame as error:
                logger.warning("event=bad_frame socket=data error=%r", error)
            except Exception:
                logger.exception("event=message_failed socket=data")

    async def _answer_from(self, disk: DiskTier, sender: bytes, question: Get) -> None:
        await disk.promote(question.hashes)
        await self._answer(sender, question)

    async def _answer(self, sender: bytes, question: Get) -> None:
        answer, payloads = self._get(question)
        await self._data.send_multipart([sender, answer.encode(), *payloads], copy=False)

    def _reserve(self, question: Reserve) -> Reserved:
        if question.arena_id != self._arena_id:
            return Reserved(question.request_id, Status.STALE)
        try:
            reservations = self.arena.reserve(question.hashes, question.writer_id)
        except ArenaFull:
            return Reserved(question.request_id, Status.FULL)
        evicted = self.arena.take_evicted()
        if self._disk is not None:
            self._disk.demote(evicted)
        else:
            self._announcer.changed((), [block.block_hash for block in evicted])
        return Reserved(question.request_id, Status.OK, reservations)

    async def _commit(self, sender: bytes, question: Commit) -> None:
        if question.arena_id != self._arena_id:
            answer = Committed(question.request_id, Status.STALE)
        else:
            blocks = self.arena.commit(question.writer_id, question.written)
            self._announcer.changed(blocks)
            await self._announcer.flushed()  # who hears that it is committed may tell others to look for it
            answer = Committed(question.request_id, Status.OK, len(blocks))
        await self._control.send_multipart([sender, answer.encode()])

    def _get(self, question: Get) -> tuple[Got, list[memoryview]]:
        """The blocks as they are. One that is evicted while it is on its way fails the reader's check of the bytes."""
        infos, payloads = [], []
        for block_hash in question.hashes:
            slot = self.arena.find(block_hash)
            if slot is None:
                infos.append(BlockInfo(block_hash, 0, 0))
                continue
            infos.append(BlockInfo(block_hash, self.config.slot_bytes, self._map.header(slot).checksum))
            payloads.append(self._map.view(slot))
        return Got(question.request_id, infos), payloads

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(_REAP_S)
            try:
                for writer_id in self._dead_writers():
                    num_slots = self.arena.abandon(writer_id)
                    logger.info("event=writer_gone writer=%s slots=%d", writer_id, num_slots)
            except OSError:
                logger.exception("event=reap_failed")

    def _dead_writers(self) -> list[str]:
        """Writers whose lock is gone. One that is merely stopped keeps its lock, and its slots."""
        known = self.arena.writers() - ({self._disk.writer_id} if self._disk else set())
        known.update(path.stem for path in self._paths.writers.glob("*.lock"))
        dead = []
        for writer_id in known:
            try:
                lock = FileLock.take(self._paths.writer(writer_id))
            except FileNotFoundError:
                dead.append(writer_id)
                continue
            if lock is not None:
                lock.remove()
                dead.append(writer_id)
        return dead


def _arena_left_in(paths: StorePaths) -> str:
    try:
        return Description.read(paths.description).arena_id
    except (OSError, ValueError):
        return ""


def decode_question(frames: list[bytes]) -> tuple[bytes, Message]:
    """Sender and message of what a ROUTER received. `BadFrame` unless it is exactly one frame."""
    if len(frames) != 2:
        raise BadFrame(f"{len(frames)} frames")
    return frames[0], decode_frame(frames[1])
