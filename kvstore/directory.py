"""The directory: which arena holds which block, and who is alive. A thin shell over Redis, and a hint, never the truth.

Each arena's inventory is one hash with a time to live that its heartbeat refreshes, so what a dead arena held is
forgotten with it. The hash carries a marker while it is complete: a Redis that was emptied has lost the marker, and
the arena announces everything again. Every failure is a `DirectoryUnavailable` within the time-out.

Each record carries the probe of who wrote it (`kvstore.blocks.PROBE`). One with another probe names blocks in another
way, so nobody reads it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvstore import scripts
from kvstore.blocks import PROBE, BlockHash
from kvstore.errors import DirectoryUnavailable, OtherScheme
from kvstore.records import ArenaRecord, NodeRecord, RecordT, parse_record, parse_signed, sign

__all__ = ["ArenaRecord", "Cover", "Directory", "NodeRecord"]

logger = logging.getLogger(__name__)

ON_DISK = 2**32 - 1  # in place of a slot: the arena's store has the block, and brings it back when it is asked for it
_MARKER = b"complete"  # no block has a name of eight bytes
_MAX_DIGITS = 20  # a slot number has fewer
_PAUSE_S = 0.5  # after a time-out, look-ups fail at once for so long


@dataclass(frozen=True)
class Cover:
    """The leading run of blocks that all arenas hold together: for each block, one arena and the slot there."""

    places: tuple[tuple[str, int], ...] = ()  # (arena id, slot)
    arenas: Mapping[str, ArenaRecord] = field(default_factory=dict)  # those that occur in places


class Directory:
    """A client of the directory. Safe to share by the tasks of one event loop.

    `url` is redis://host:port or unix:///path. All methods but `close` raise `DirectoryUnavailable` when Redis does
    not answer within `timeout_s`. `probe` is this process's; tests set another one.
    """

    def __init__(self, url: str, cluster: str = "default", timeout_s: float = 1.0, probe: str = PROBE) -> None:
        # One retry, and only where the connection broke: after a restart of Redis every pooled one is dead.
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
        self._paused_until_s = 0.0
        self._locate = self._redis.register_script(scripts.LOCATE)
        self._beat = self._redis.register_script(scripts.BEAT)
        self._update = self._redis.register_script(scripts.UPDATE)

    async def locate(self, hashes: Sequence[BlockHash], arena_ids: Sequence[str] | None = None) -> dict[str, list[int]]:
        """The slots of each living arena's leading run, in one round trip; arenas with none are left out."""
        answer = await self._look_up(hashes, arena_ids, leading=True)
        runs = {arena_id: [slot for slot in run if slot is not None] for arena_id, (_, run) in answer.items()}
        return {arena_id: run for arena_id, run in runs.items() if run}

    async def cover(self, hashes: Sequence[BlockHash], prefer: str = "", avoid: Collection[str] = ()) -> Cover:
        """The longest leading run that can be put together from all living arenas but those of `avoid`."""
        answer = await self._look_up(hashes, None, leading=False)
        runs = {arena_id: run for arena_id, (_, run) in answer.items() if arena_id not in avoid}
        places = stitch(runs, prefer)
        return Cover(tuple(places), {arena_id: answer[arena_id][0] for arena_id in {place[0] for place in places}})

    async def announce(
        self, arena_id: str, blocks: Sequence[tuple[BlockHash, int]], gone: Sequence[BlockHash] = ()
    ) -> bool:
        """Adds (hash, slot) pairs to an inventory and drops `gone`. False: the inventory is lost, announce all."""
        pairs = [item for block_hash, slot in blocks for item in (block_hash, slot)]
        async with self._bounded():
            answer = await self._update(keys=[self._inventory(arena_id)], args=[_MARKER, len(gone), *gone, *pairs])
        return bool(answer)

    async def announce_all(self, arena_id: str, blocks: Sequence[tuple[BlockHash, int]], ttl_s: float) -> None:
        """Replaces an arena's whole inventory. The marker comes last: until then, it counts as lost."""
        key, ttl_ms = self._inventory(arena_id), int(ttl_s * 1000)
        async with self._bounded():
            await self._redis.delete(key)
        for start in range(0, len(blocks), 1000):
            async with self._bounded(), self._redis.pipeline(transaction=True) as batch:
                batch.hset(key, mapping={bytes(block_hash): slot for block_hash, slot in blocks[start : start + 1000]})
                batch.pexpire(key, ttl_ms)
                await batch.execute()
        async with self._bounded(), self._redis.pipeline(transaction=True) as batch:
            batch.hset(key, mapping={_MARKER: 1})
            batch.pexpire(key, ttl_ms)
            await batch.execute()

    async def heartbeat_arena(self, record: ArenaRecord, ttl_s: float) -> bool:
        """Keeps an arena alive for `ttl_s`. False: the inventory is lost, announce all."""
        key, inventory = self._record("arena", record.arena_id), self._inventory(record.arena_id)
        args: list[str | int | bytes] = [record.arena_id, sign(record, self._probe), int(ttl_s * 1000), _MARKER]
        async with self._bounded():
            return bool(await self._beat(keys=[key, inventory, self._set("arena")], args=args))

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
            batch.delete(self._record("arena", arena_id), self._inventory(arena_id))
            batch.srem(self._set("arena"), arena_id)
            await batch.execute()

    async def check_scheme(self) -> None:
        """To be called before joining. Raises `OtherScheme` when someone who lives names blocks in another way."""
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

    def _inventory(self, arena_id: str) -> str:
        return f"{self._prefix}arena:{arena_id}:blocks"

    def _parse(self, cls: type[RecordT], text: bytes | str | None) -> RecordT | None:
        """None for what is no record, and, with a word about it, for one of another scheme."""
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
            if dead:  # their time to live ran out; one that comes back adds itself again
                await self._redis.srem(self._set(kind), *dead)
        return texts

    async def _look_up(
        self, hashes: Sequence[BlockHash], arena_ids: Sequence[str] | None, leading: bool
    ) -> dict[str, tuple[ArenaRecord, list[int | None]]]:
        """Each living arena's record and slots from the first block on. One round trip, or none where that is vain."""
        if not hashes or arena_ids == []:
            return {}
        if time.monotonic() < self._paused_until_s:
            raise DirectoryUnavailable("Redis timed out a moment ago")
        ids = [-1] if arena_ids is None else [len(arena_ids), *arena_ids]
        async with self._bounded():
            answer = await self._locate(args=[self._prefix, int(leading), *ids, b"".join(hashes)])
        arenas = {}
        for text, run in zip(answer[1::3], answer[2::3], strict=True):
            record = self._parse(ArenaRecord, text)
            if record is not None:
                arenas[record.arena_id] = (record, parse_run(run))
        return arenas

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        """Maps every failure of Redis to `DirectoryUnavailable`, within the time-out."""
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (TimeoutError, redis.exceptions.TimeoutError) as error:
            # A Redis that hangs must not cost each request its time-out.
            self._paused_until_s = time.monotonic() + _PAUSE_S
            raise DirectoryUnavailable(f"Redis did not answer within {self._timeout_s} s") from error
        except (redis.exceptions.RedisError, OSError) as error:
            raise DirectoryUnavailable(f"Redis: {error}") from error


def parse_run(text: bytes) -> list[int | None]:
    """`b"3,,5"` -> `[3, None, 5]`; what is no slot number is a hole."""
    if not text:
        return []
    items = text.split(b",")
    lengths = [len(item) for item in items]
    if 0 < min(lengths) and max(lengths) < _MAX_DIGITS and text.replace(b",", b"").isdigit():
        return list(map(int, items))  # no hole, as in nearly every run
    return [int(item) if item.isdigit() and len(item) < _MAX_DIGITS else None for item in items]


def stitch(runs: Mapping[str, Sequence[int | None]], prefer: str = "") -> list[tuple[str, int]]:
    """For each block of the leading run of all arenas together, one arena and its slot.

    `runs[arena]` has a slot or None for each block. The preferred arena wherever it holds the block; else the one
    that was used for the block before; else the one that goes on longest from here: few arenas, few requests.
    """
    places: list[tuple[str, int]] = []
    current = prefer
    while True:
        at = len(places)
        for arena_id in (prefer, current):
            if _run_length(runs.get(arena_id, ()), at, 1):
                break
        else:
            arena_id = max(runs, key=lambda name: _run_length(runs[name], at), default="")
        slot = runs[arena_id][at] if _run_length(runs.get(arena_id, ()), at, 1) else None
        if slot is None:
            return places
        places.append((arena_id, slot))
        current = arena_id


def _run_length(run: Sequence[int | None], start: int, limit: int = 1 << 30) -> int:
    end = start
    while end < len(run) and end - start < limit and run[end] is not None:
        end += 1
    return end - start


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
