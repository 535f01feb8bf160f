"""The store as a node sees it: match, fetch, publish. Every failure is a miss within a bounded time, never an error.

One `KVClient` per process. The arena of its own machine is mapped and read without any call; other arenas are read
over a wire (`kvstore/wire.py`), many blocks per transfer.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvstore.arena import Reservation
from kvstore.blocks import BlockHash, Payload
from kvstore.copier import Copier, Todo, Write, fill_here
from kvstore.directory import ON_DISK, ArenaRecord, Cover, Directory
from kvstore.errors import ArenaDraining, ArenaFull, ArenaUnavailable, DirectoryUnavailable
from kvstore.frames import MAX_BLOCKS
from kvstore.links import Links, link_of
from kvstore.local import LocalArena, StorePaths, to_end
from kvstore.quotas import SHARED, Owner
from kvstore.wire import Outcome, State, Wire
from kvstore.wires import default_wire

logger = logging.getLogger(__name__)

_HERE_BYTES = 4 << 20  # what a single thread would copy alone: waking one takes longer than copying 1 MiB
_MIN_BYTES_PER_S = 1e6  # a slower transfer counts as broken, if no limit was given
_AVOID_S = 5.0  # how long a store that did not answer is avoided
_FAIR_S = 0.2  # an arena that had less time than this, and sent nothing, may still be one that answers


@dataclass(frozen=True)
class Match:
    """The leading run of blocks that can be fetched, over all arenas together, and where each block is."""

    hashes: tuple[BlockHash, ...] = ()
    places: tuple[tuple[str, int], ...] = ()  # (arena id, slot), one a hash
    arenas: Mapping[str, ArenaRecord] = field(default_factory=dict)  # where to call them; the mapped one may be missing

    @property
    def num_blocks(self) -> int:
        return len(self.hashes)

    def head(self, num_blocks: int) -> Match:
        """Its first `num_blocks`."""
        return replace(self, hashes=self.hashes[:num_blocks], places=self.places[:num_blocks])


class KVClient:
    """Reads and writes blocks of `slot_bytes`. `local_dir` is the directory of this machine's store; if None, all goes
    over the wire and nothing is published. `timeout_s` bounds each wait for a store that sends nothing. Without a
    `wire`, stores with the same `wire_key` are read; "" (no encryption) is a key like any other (`kvstore/wires.py`).
    """

    def __init__(  # noqa: PLR0913
        self,
        directory: Directory,
        slot_bytes: int,
        local_dir: Path | None,
        timeout_s: float = 2.0,
        wire_key: str = "",
        wire: Wire | None = None,
    ) -> None:
        self._directory = directory
        self._slot_bytes = slot_bytes
        self._paths = None if local_dir is None else StorePaths(local_dir)
        self._timeout_s = timeout_s
        self._wire = wire or default_wire(slot_bytes, wire_key)
        self.links = Links(slot_bytes, time.monotonic)
        self._copier = Copier(slot_bytes)
        self._local: LocalArena | None = None
        self._local_stamp: tuple[int, int] | None = None  # of the description that self._local came from
        self._publish_after_s = 0.0
        self._publishing: set[asyncio.Task[int]] = set()
        self._avoided: dict[str, float] = {}  # arena id -> until when
        self._troubles: set[str] = set()  # problems that were logged and have not ended

    @property
    def local_arena_id(self) -> str:
        """Id of the mapped arena; "" while there is none."""
        local = self._mapped()
        return "" if local is None else local.arena_id

    @property
    def can_publish(self) -> bool:
        """Whether there is an arena to publish into, as far as is known."""
        return self._mapped() is not None and time.monotonic() >= self._publish_after_s

    async def open(self) -> None:
        """Maps the arena if the store is up; a store that comes up later is found by later calls."""
        self._mapped()

    async def close(self) -> None:
        """Waits for running copies, then releases everything."""
        await asyncio.gather(*self._publishing, return_exceptions=True)
        await asyncio.to_thread(self._copier.close)
        self._retire()
        await self._wire.close()

    def match_local(self, hashes: Sequence[BlockHash]) -> Match:
        """The leading run of `hashes` in this machine's arena, according to its headers. No call; never raises."""
        local = self._mapped()
        places = () if local is None else tuple((local.arena_id, slot) for slot in local.index.run(hashes))
        return Match(tuple(hashes[: len(places)]), places)

    async def match(self, hashes: Sequence[BlockHash]) -> Match:
        """The leading run of `hashes` that can be fetched: in this machine's arena, then in those the directory names.

        Never raises; without Redis the run ends where this machine's arena does.
        """
        here = self.match_local(hashes)
        if here.num_blocks == len(hashes):
            return here
        cover = await self._cover(hashes[here.num_blocks :])
        places = here.places + cover.places
        return Match(tuple(hashes[: len(places)]), places, cover.arenas)

    async def fetch(
        self, match: Match, limit_s: float = math.inf, into: Sequence[memoryview] | None = None
    ) -> list[Payload]:
        """Payloads of the leading run of `match` that arrived, in order. Never raises; failures shorten the run.

        What other machines have not sent within `limit_s` is a miss: a caller who can compute the blocks by then need
        not find out whether a hanging wire will ever move again. A store that sent nothing is avoided for a while; one
        that is only slow is not, as `links` knows its speed, nor is one that was asked too late to answer in time.

        `into` has each block's final place. A wire that can receives blocks there, and the payload's view is that
        place. Nothing is written there any more once `fetch` has ended, even by a cancellation.
        """
        deadline_s = time.monotonic() + limit_s
        found: dict[int, Payload] = {}
        remote: dict[tuple[str, bool], list[int]] = {}  # blocks in memory do not wait for those on disk
        local = self._mapped()
        for index, (arena_id, slot) in enumerate(match.places):
            if local is None or arena_id != local.arena_id or slot == ON_DISK:
                if arena_id not in match.arenas:
                    break  # this machine's arena was given up meanwhile
                remote.setdefault((arena_id, slot == ON_DISK), []).append(index)
                continue
            payload = local.map.read(slot, match.hashes[index], time.monotonic_ns())
            if payload is None:
                break  # the run ends here, even if others hold the rest
            found[index] = payload
        runs = [
            self._fetch_from(match.arenas[name], match, part, deadline_s, into) for (name, _), part in remote.items()
        ]
        if len(runs) == 1:
            found.update(await runs[0])
        elif runs:
            async with asyncio.TaskGroup() as group:  # it ends after the last of them, as all write to `into`
                tasks = [group.create_task(run) for run in runs]
            for task in tasks:
                found.update(task.result())
        payloads: list[Payload] = []
        while len(payloads) in found:
            payloads.append(found[len(payloads)])
        return payloads

    async def publish(self, hashes: Sequence[BlockHash], write: Write, owner: Owner = SHARED) -> int:
        """Stores blocks, within their owner's quota; returns how many were committed (not counting those present).

        `write(indices, views)` gets the indices into `hashes` of the blocks to write, and as many writable views of
        `slot_bytes`; it returns the xxh3_64 of each block that it wrote. For many blocks, two threads call it at the
        same time, each for some of them; for up to 4 MiB it may be called on the event loop itself. `publish` does
        not end before `write` has, even when cancelled, so what `write` reads may be freed afterwards. Only errors
        of `write` itself are raised.
        """
        num_committed = self._publish_here(hashes, write, owner)
        if num_committed is not None:
            return num_committed
        task = asyncio.create_task(self._publish(hashes, write, owner))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)
        await to_end([task])
        return task.result()

    async def _cover(self, hashes: Sequence[BlockHash]) -> Cover:
        now = time.monotonic()
        self._avoided = {arena_id: until for arena_id, until in self._avoided.items() if until > now}
        try:
            cover = await self._directory.cover(hashes, self.local_arena_id, self._avoided.keys())
        except DirectoryUnavailable as error:
            self._begin_trouble("directory", error)
            return Cover()
        self._troubles.discard("directory")
        return cover

    async def _publish(self, hashes: Sequence[BlockHash], write: Write, owner: Owner) -> int:
        num_done = num_committed = 0
        while num_done < len(hashes):
            if self._local is not None and self._local.is_broken:
                self._retire()  # it may be back
            local = self._mapped()
            if local is None or time.monotonic() < self._publish_after_s:
                break
            try:
                part = range(num_done, min(num_done + MAX_BLOCKS, len(hashes)))
                done, committed = await self._publish_part(local, hashes, part, write, owner)
                num_done, num_committed = num_done + done, num_committed + committed
                self._troubles.discard("publish")
            except ArenaFull as error:
                self._begin_trouble("publish", error)
                if isinstance(error, ArenaDraining):  # meanwhile `can_publish` is False, and nobody waits for blocks
                    self._publish_after_s = time.monotonic() + self._timeout_s
                break
            except ArenaUnavailable as error:
                self._begin_trouble("publish", error)
                self._publish_after_s = time.monotonic() + self._timeout_s
                break
        return num_committed

    async def _publish_part(
        self, local: LocalArena, hashes: Sequence[BlockHash], part: range, write: Write, owner: Owner
    ) -> tuple[int, int]:
        """Slots, copy, commit. Returns how many leading blocks of `part` that covered, and how many were committed.

        A failure in between retires `local`: its slots go back once no copy is running.
        """
        is_whole, names = False, hashes[part.start : part.stop]
        try:
            slots = local.take(names, owner)
            if slots:
                written = await self._copier.fill(local, _todo(part, slots, names), write)
                local.tell(names[: len(slots)], slots, written, owner)
                num_committed = len(written)
            else:
                slots = await local.reserve(names, owner)
                todo = _todo(part, slots)
                num_committed = await local.commit(await self._copier.fill(local, todo, write)) if todo else 0
                local.borrow(len(todo))
            is_whole = True
            return len(slots), num_committed
        except ArenaFull:
            is_whole = True
            raise
        finally:
            if not is_whole:
                self._retire(local)

    def _publish_here(self, hashes: Sequence[BlockHash], write: Write, owner: Owner) -> int | None:
        """Publishes a few blocks on this thread, without waiting for anything. None: that is not possible now."""
        if len(hashes) * self._slot_bytes > _HERE_BYTES or not self.can_publish or self._local is None:
            return None
        local, is_whole = self._local, False
        slots = local.take(hashes, owner, all_or_none=True)
        if not slots:
            return None
        try:
            written = fill_here(local, _todo(range(len(hashes)), slots, hashes), write)
            local.tell(hashes, slots, written, owner)
            is_whole = True
        except ArenaUnavailable as error:
            self._begin_trouble("publish", error)
            return 0
        finally:
            if not is_whole:
                self._retire(local)
        return len(written)

    def _mapped(self) -> LocalArena | None:
        """This machine's arena, mapped anew when the store has another one. Costs one stat."""
        if self._paths is None:
            return None
        try:
            status = self._paths.description.stat()
            stamp = (status.st_ino, status.st_mtime_ns)
            if self._local is None or stamp != self._local_stamp:
                self._retire()
                self._local = self._open_local(self._paths)
                self._local_stamp = stamp
        except (OSError, ValueError, ArenaUnavailable) as error:
            self._begin_trouble("map", error)
            self._retire()
        return self._local

    def _open_local(self, paths: StorePaths) -> LocalArena:
        local = LocalArena(paths, self._timeout_s)
        if local.map.slot_bytes != self._slot_bytes:
            local.retire()
            raise ValueError(f"the store's slots have {local.map.slot_bytes} bytes, blocks {self._slot_bytes}")
        self._troubles.discard("map")
        logger.info("event=arena_mapped arena=%s slots=%d", local.arena_id, local.map.num_slots)
        return local

    def _retire(self, local: LocalArena | None = None) -> None:
        """Gives up the mapped arena, or `local`. The next call maps whatever arena exists then."""
        local = local or self._local
        if local is not None:
            local.retire()
        if local is self._local:
            self._local = None

    async def _fetch_from(
        self,
        record: ArenaRecord,
        match: Match,
        indices: Sequence[int],
        deadline_s: float,
        into: Sequence[memoryview] | None,
    ) -> dict[int, Payload]:
        """Blocks that come over one link, by index; the leading run of `indices` that could be had."""
        found: dict[int, Payload] = {}
        step = self._wire.capabilities.num_blocks(self._slot_bytes)
        for start in range(0, len(indices), step):
            if deadline_s - time.monotonic() <= (_FAIR_S if start else 0.0):
                break
            part = indices[start : start + step]
            hashes = [match.hashes[index] for index in part]
            views = None if into is None else [into[index] for index in part]
            outcome = await self._transfer(record, link_of(match.places[part[0]]), hashes, deadline_s, views)
            found.update(zip(part, outcome.payloads, strict=False))
            if outcome.state is not State.COMPLETED or len(outcome.payloads) < len(part):
                break
        return found

    async def _transfer(
        self,
        record: ArenaRecord,
        link: str,
        hashes: Sequence[BlockHash],
        deadline_s: float,
        into: Sequence[memoryview] | None,
    ) -> Outcome:
        """Fetches the leading run of `hashes`. An arena that failed, or sent nothing, is avoided for a while.

        Not so if the transfer spent its time waiting behind others: a busy arena would be avoided for being busy.
        """
        began_s, outcome = time.monotonic(), Outcome(State.PENDING)
        longest_s = self._timeout_s + len(hashes) * self._slot_bytes / _MIN_BYTES_PER_S
        limit_s = max(0.0, min(longest_s, deadline_s - began_s))
        transfer = self.links.begin(link, len(hashes))
        ticket = self._wire.submit(record, hashes, min(self._timeout_s, limit_s), into)
        try:
            outcome = await self._wire.poll(ticket, limit_s)
        finally:
            self._wire.cancel(ticket)
            transfer.end(len(outcome.payloads), began_s, time.monotonic())
        if outcome.state is State.COMPLETED:
            return outcome
        had_s = time.monotonic() - max(began_s, outcome.begun_at_s)  # negative where its turn never came
        is_at_fault = had_s >= 0.0 if outcome.state is State.FAILED else had_s >= _FAIR_S and not outcome.payloads
        if is_at_fault:
            reason = outcome.reason or f"no answer within {limit_s:.1f} s"
            logger.warning("event=fetch_failed arena=%s error=%r", record.arena_id, reason)
            self._avoided[record.arena_id] = time.monotonic() + _AVOID_S
        else:
            came, asked = len(outcome.payloads), len(hashes)
            logger.info("event=fetch_slow arena=%s blocks=%d of=%d limit_s=%.2f", record.arena_id, came, asked, limit_s)
        return outcome

    def _begin_trouble(self, name: str, error: Exception) -> None:
        """Logs a problem when it begins, not each time it shows."""
        if name not in self._troubles:
            self._troubles.add(name)
            logger.warning("event=store_trouble what=%s error=%r", name, str(error))


def _todo(part: range, slots: Sequence[Reservation | None], names: Sequence[BlockHash] | None = None) -> Todo:
    """What is to be written of the leading blocks of `part`; with their `names` where the slots were lent."""
    todo = [(index, slot) for index, slot in zip(part, slots, strict=False) if slot is not None]
    return [(index, slot, names[index - part.start] if names else None) for index, slot in todo]
