"""The directory: which arena holds which block, and who is alive. A thin shell over Redis, and a hint, never the truth.

The holders of a block are one field of one Redis hash (`kvstore/scripts.py` has the layout). An arena's entries count
as long as its record lives; its heartbeat refreshes the record's time to live, so a dead arena's entries expire. The
hash has a marker for each arena that has announced everything: if Redis is emptied, the marker is lost, and the arena
announces everything again. Every failure is a `DirectoryUnavailable` within the time-out.

Each record carries its writer's probe (`kvstore.blocks.PROBE`). A record with a different probe comes from a process
that names blocks differently, and is not read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript

from kvstore import scripts
from kvstore.blocks import PROBE, BlockHash
from kvstore.cover import Cover, stitch
from kvstore.errors import DirectoryUnavailable, OtherScheme
from kvstore.inventory import Run, Slots, leading, pack_places, parse_counts, parse_places, with_holes
from kvstore.records import ArenaRecord, NodeRecord, RecordT, parse_record, parse_signed, sign

__all__ = ["ArenaRecord", "Cover", "Directory", "NodeRecord", "Run"]

logger = logging.getLogger(__name__)

ON_DISK = 2**32 - 1  # in place of a slot: the store has the block on disk, and promotes it on request
_PAUSE_S = 0.5  # after a time-out, look-ups fail at once for this long
_BATCH_BLOCKS = 1000  # announced in one round trip
_SWEPT_FIELDS = 200  # of the hash, swept with each heartbeat for entries of dead arenas
_MAX_PARSED = 1024  # parsed records that are cached


class Directory:
    """A client of the directory. The tasks of one event loop may share it.

    `url` is redis://host:port or unix:///path. All methods but `close` raise `DirectoryUnavailable` when Redis does
    not answer within `timeout_s`. `probe` is this process's; tests set another one.
    """

    def __init__(self, url: str, cluster: str = "default", timeout_s: float = 1.0, probe: str = PROBE) -> None:
        # One retry, and only for broken connections: after a restart of Redis every pooled one is dead.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=16,
            timeout=timeout_s,
            socket_timeout=None,  # `_bounded` limits the whole call; redis-py's own limit can lose a cancellation
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,)),
        )
        self._redis = redis.asyncio.Redis.from_pool(pool)
        self._prefix = f"baton:{cluster}:"
        self._timeout_s = timeout_s
        self._probe = probe
        self._strangers: set[str] = set()  # ids of those that were told of
        self._parsed: dict[bytes, ArenaRecord | None] = {}
        self._paused_until_s = 0.0
        self._swept_to: bytes | str = "0"
        self._count = self._redis.register_script(scripts.COUNT)
        self._locate = self._redis.register_script(scripts.LOCATE)
        self._beat = self._redis.register_script(scripts.BEAT)
        self._begin = self._redis.register_script(scripts.BEGIN)
        self._update = self._redis.register_script(scripts.UPDATE)
        self._sweep = self._redis.register_script(scripts.SWEEP)

    async def runs(self, hashes: Sequence[BlockHash]) -> dict[str, Run]:
        """How many leading blocks each living arena holds, in one round trip; arenas with none are left out."""
        counts = parse_counts(await self._look_up(self._count, hashes) or b"")
        found = [(self._arena(text), run) for text, run in counts]
        return {record.arena_id: run for record, run in found if record is not None}

    async def locate(self, hashes: Sequence[BlockHash], arena_ids: Sequence[str] | None = None) -> dict[str, list[int]]:
        """The slots of each living arena's leading run, in one round trip; arenas with none are left out."""
        runs = {
            record.arena_id: leading(slots)
            for record, slots in await self._places(hashes)
            if arena_ids is None or record.arena_id in arena_ids
        }
        return {arena_id: run for arena_id, run in runs.items() if run}

    async def cover(self, hashes: Sequence[BlockHash], prefer: str = "", avoid: Collection[str] = ()) -> Cover:
        """The longest leading run that can be assembled from all living arenas except those in `avoid`."""
        found = [(record, slots) for record, slots in await self._places(hashes) if record.arena_id not in avoid]
        places = stitch({record.arena_id: with_holes(slots) for record, slots in found}, prefer)
        used = {arena_id for arena_id, _ in places}
        return Cover(tuple(places), {record.arena_id: record for record, _ in found if record.arena_id in used})

    async def announce(
        self, arena_id: str, blocks: Sequence[tuple[BlockHash, int]], gone: Sequence[BlockHash] = ()
    ) -> bool:
        """Adds (hash, slot) pairs to an inventory and removes `gone`. False: the inventory is lost, announce all."""
        async with self._bounded():
            return bool(await self._update(args=[self._prefix, arena_id, "", b"".join(gone), pack_places(blocks)]))

    async def announce_all(
        self,
        arena_id: str,
        blocks: Sequence[tuple[BlockHash, int]],
        ttl_s: float,
        between: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        """Replaces the whole inventory of an arena that has a heartbeat. Until it is complete, it counts as lost.

        This may take longer than `ttl_s`: `between` is called before each part, to keep the arena alive.
        """
        ttl_ms = int(ttl_s * 1000)
        async with self._bounded():
            await self._begin(args=[self._prefix, arena_id, ttl_ms])
        for start in range(0, max(1, len(blocks)), _BATCH_BLOCKS):
            batch = pack_places(blocks[start : start + _BATCH_BLOCKS])
            last = [ttl_ms] if start + _BATCH_BLOCKS >= len(blocks) else []
            if between is not None:
                await between()
            async with self._bounded():
                is_there = await self._update(args=[self._prefix, arena_id, "?", b"", batch, *last])
            if not is_there:
                raise DirectoryUnavailable("Redis lost the inventory while it was announced")

    async def heartbeat_arena(self, record: ArenaRecord, ttl_s: float) -> bool:
        """Keeps an arena alive for `ttl_s`. False: the inventory is lost, announce all."""
        text = sign(record, self._probe)
        async with self._bounded():
            is_complete = await self._beat(args=[self._prefix, record.arena_id, text, int(ttl_s * 1000)])
            self._swept_to = await self._sweep(args=[self._prefix, self._swept_to, _SWEPT_FIELDS])
        return bool(is_complete)

    async def heartbeat_node(self, record: NodeRecord, ttl_s: float) -> None:
        """Keeps a node alive for `ttl_s`."""
        async with self._bounded(), self._redis.pipeline(transaction=True) as batch:
            batch.set(self._record("node", record.node_id), sign(record, self._probe), px=int(ttl_s * 1000))
            batch.sadd(self._set("node"), record.node_id)
            await batch.execute()

    async def remove_node(self, node_id: str, incarnation: str = "") -> None:
        """Forgets a node; with an incarnation, only if it is that one."""
        key = self._record("node", node_id)
        async with self._bounded():
            record = parse_record(NodeRecord, await self._redis.get(key)) if incarnation else None
            if record is None or record.incarnation == incarnation:
                await self._redis.delete(key)

    async def remove_arena(self, arena_id: str) -> None:
        """Forgets an arena and what it held."""
        async with self._bounded(), self._redis.pipeline(transaction=True) as batch:
            batch.delete(self._record("arena", arena_id))
            batch.srem(self._set("arena"), arena_id)
            await batch.execute()

    async def check_scheme(self) -> None:
        """To be called before joining. Raises `OtherScheme` when a living member names blocks differently."""
        for kind, is_there in (
            ("arena", await self._has_strangers("arena", ArenaRecord)),
            ("node", await self._has_strangers("node", NodeRecord)),
        ):
            if is_there:
                problem = f"their probe is not {self._probe}; use the same version, or another cluster name"
                raise OtherScheme(f"this cluster has {kind}s that name blocks in another way: {problem}")

    async def nodes(self) -> list[NodeRecord]:
        """All living nodes. A record that cannot be read is left out."""
        return await self._records("node", NodeRecord)

    async def arenas(self) -> list[ArenaRecord]:
        """All living arenas. A record that cannot be read is left out."""
        return await self._records("arena", ArenaRecord)

    async def ping(self) -> None:
        """Returns when Redis answers."""
        async with self._bounded():
            await self._redis.ping()

    async def close(self) -> None:
        """Closes the connections. Never raises."""
        try:
            await self._redis.aclose()
        except (redis.exceptions.RedisError, OSError) as error:
            logger.debug("event=directory_close error=%r", error)

    def _set(self, kind: str) -> str:
        return f"{self._prefix}{kind}s"

    def _record(self, kind: str, record_id: str) -> str:
        return f"{self._prefix}{kind}:{record_id}"

    def _parse(self, cls: type[RecordT], text: bytes | str | None) -> RecordT | None:
        """None for what is not a record, and, with a log line, for a record of another scheme."""
        record, probe = parse_signed(cls, text)
        if record is None or probe == self._probe:
            return record
        record_id = record.arena_id if isinstance(record, ArenaRecord) else record.node_id
        if record_id not in self._strangers:
            self._strangers.add(record_id)
            logger.warning("event=other_scheme id=%s probe=%r here=%s", record_id, probe, self._probe)
        return None

    async def _has_strangers(self, kind: str, cls: type[RecordT]) -> bool:
        texts = await self._texts(kind)
        return any(self._parse(cls, text) is None and parse_record(cls, text) is not None for text in texts)

    async def _records(self, kind: str, cls: type[RecordT]) -> list[RecordT]:
        return [record for text in await self._texts(kind) if (record := self._parse(cls, text)) is not None]

    async def _texts(self, kind: str) -> Sequence[bytes | str | None]:
        async with self._bounded():
            ids = sorted(_text(member) for member in await self._redis.smembers(self._set(kind)))
            texts = await self._redis.mget([self._record(kind, record_id) for record_id in ids]) if ids else []
            dead = [record_id for record_id, text in zip(ids, texts, strict=True) if text is None]
            if dead:  # expired; one that comes back adds itself again
                await self._redis.srem(self._set(kind), *dead)
        return texts

    def _arena(self, text: bytes) -> ArenaRecord | None:
        """The record; read once for each heartbeat rather than for each look-up."""
        if text not in self._parsed:
            if len(self._parsed) >= _MAX_PARSED:
                self._parsed.clear()
            self._parsed[text] = self._parse(ArenaRecord, text)
        return self._parsed[text]

    async def _places(self, hashes: Sequence[BlockHash]) -> list[tuple[ArenaRecord, Slots]]:
        """Each living arena, and the slots of the leading blocks that it has."""
        answer = await self._look_up(self._locate, hashes)
        found = [(self._arena(text), slots) for text, slots in parse_places(*answer)] if answer else []
        return [(record, slots) for record, slots in found if record is not None]

    async def _look_up(self, script: AsyncScript, hashes: Sequence[BlockHash]) -> Any:
        """The script's answer in one round trip; None, without a round trip, when there is nothing to look up."""
        if not hashes:
            return None
        if time.monotonic() < self._paused_until_s:
            raise DirectoryUnavailable("Redis timed out a moment ago")
        async with self._bounded():
            return await script(args=[self._prefix, b"".join(hashes)])

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        """Maps every failure of Redis to `DirectoryUnavailable`, within the time-out."""
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (TimeoutError, redis.exceptions.TimeoutError) as error:
            # A hanging Redis must not cost each request its time-out.
            self._paused_until_s = time.monotonic() + _PAUSE_S
            raise DirectoryUnavailable(f"Redis did not answer within {self._timeout_s} s") from error
        except (redis.exceptions.RedisError, OSError) as error:
            raise DirectoryUnavailable(f"Redis: {error}") from error


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
