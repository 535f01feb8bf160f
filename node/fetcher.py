"""Brings the blocks of a held request from the store into its engine: match, fetch, import. Knows no gRPC.

Any failure here just means a shorter hit: the engine computes what did not come.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Sequence

from engine.engine import Engine
from engine.errors import UnknownRequest
from engine.loop import EngineLoop
from engine.request import Request
from kvstore.arena_map import MappedPayload
from kvstore.blocks import Payload, piece_hashes
from kvstore.client import Match
from kvstore.quotas import SHARED, Owner
from node.intake import Intake
from node.landing import landing

logger = logging.getLogger(__name__)

MAX_FETCH_BYTES = 64 * 2**20  # per round: bounds the memory between the wire and the engine
# Per call on the engine's thread: bounds how long running requests wait for it. Each call waits for the end of a
# step, so a chunk should be imported by a single one.
MAX_IMPORT_BYTES = 32 * 2**20
COMING_POLL_S = 0.001
# Announced blocks usually come within the time of a copy. An event loop's timers have millisecond resolution, so for
# that long the thread itself sleeps, with Python's lock released, and polls in between.
NEAR_POLL_S, NEAR_WAIT_S = 0.0001, 0.002


class Pace:
    """When to poll again for something that comes in chunks: the longer it has taken, the less a delay matters.

    So a chunk is noticed late by at most `share` of its own time, and at most `max_s`.
    """

    def __init__(self, share: float, min_s: float, max_s: float) -> None:
        self._share = share
        self._min_s = min_s
        self._max_s = max_s

    def pause_s(self, waited_s: float) -> float:
        return min(max(self._share * waited_s, self._min_s), self._max_s)


LOCAL_PACE = Pace(1 / 8, 0.002, 0.05)  # polling mapped memory
DIRECTORY_PACE = Pace(1 / 4, 0.002, 0.2)  # a round trip to Redis


class Fetcher:
    """Fetches blocks for one held request; they belong to `owner`."""

    def __init__(self, loop: EngineLoop, intake: Intake, request: Request, owner: Owner = SHARED) -> None:
        self._loop = loop
        self._intake = intake
        self._store = intake.store
        self._request = request
        self._owner = owner
        self._num_pieces = len(intake.pieces)  # that come for each block
        self._max_fetch_blocks = max(1, MAX_FETCH_BYTES // (intake.block_bytes * self._num_pieces))
        self._max_import_blocks = max(1, MAX_IMPORT_BYTES // (intake.block_bytes * self._num_pieces))
        self._is_declined = False  # computing is faster than fetching what was found last
        self._progress_s = time.monotonic()  # the last block came, or the fetcher did
        self._ask_directory_s = 0.0  # not before
        self._release_at_blocks: int | None = None  # the request may be released once it has this many
        self._is_released = False
        self._is_near = False  # the last blocks came from this machine, so the rest probably will, too

    @property
    def num_missing_blocks(self) -> int:
        """Blocks that could still be fetched; never the one with the last token, so that a token is computed.

        0 for a request with prompt logprobs, whose whole prompt is computed.
        """
        request = self._request
        if request.is_scoring:
            return 0
        return (request.num_tokens - 1) // request.block_size - self._num_blocks

    async def fetch(self) -> int:
        """Imports the leading run of missing blocks that the store has now, as far as that is faster than computing.

        Returns how many came; never raises.
        """
        num_fetched_blocks = 0
        try:
            while self.num_missing_blocks > 0:
                num_blocks = await self._fetch_round()
                num_fetched_blocks += num_blocks
                if num_blocks == 0 or self._is_declined or self._is_released:
                    break
        except UnknownRequest:
            pass  # aborted meanwhile: nobody waits for these blocks
        except Exception:  # whatever it is, treat it as a miss
            logger.exception("event=fetch_failed request=%s", self._request.request_id)
        if num_fetched_blocks:
            self._progress_s = time.monotonic()
        return num_fetched_blocks

    async def follow(self, stop: asyncio.Event) -> None:
        """Fetches blocks as they are published elsewhere, until all are here or `stop` is set."""
        while self.num_missing_blocks > 0 and not stop.is_set() and not self._is_declined:
            await self.fetch()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOCAL_PACE.pause_s(self._waited_s)):
                    await stop.wait()

    async def release(self, num_coming_blocks: int) -> None:
        """Fetches what is available, waits for those of the first `num_coming_blocks` that are on their way, and then
        lets the request run.

        Raises `UnknownRequest`.
        """
        self._release_at_blocks = num_coming_blocks
        await self._fetch_coming(num_coming_blocks)
        if not self._is_released:
            await self._loop.call(lambda engine: engine.release(self._request.request_id))

    async def _fetch_coming(self, num_blocks: int) -> None:
        """Waits for coming blocks, but no longer than computing them would take: their publisher may have died."""
        if not self._is_near:
            self._ask_directory_s = 0.0
        self._progress_s = time.monotonic()  # expect blocks soon: poll the directory often again
        await self.fetch()
        self._progress_s = time.monotonic()
        while not self._is_released and not self._is_declined and (num_coming := self._num_coming(num_blocks)) > 0:
            if self._waited_s > self._intake.patience_s(num_coming):
                logger.info("event=blocks_late request=%s missing=%d", self._request.request_id, num_coming)
                return
            await self._pause()
            await self.fetch()

    async def _pause(self) -> None:
        if self._waited_s < NEAR_WAIT_S and self._store.local_arena_id:
            time.sleep(NEAR_POLL_S)
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(COMING_POLL_S)

    @property
    def _num_blocks(self) -> int:
        return self._request.num_computed_tokens // self._request.block_size

    @property
    def _waited_s(self) -> float:
        return time.monotonic() - self._progress_s

    def _num_coming(self, num_blocks: int) -> int:
        return min(self.num_missing_blocks, num_blocks - self._num_blocks)

    async def _fetch_round(self) -> int:
        match = await self._match()
        if match.num_blocks == 0:
            return 0
        chosen = self._intake.choose(match)
        self._is_declined = chosen.num_blocks < match.num_blocks
        if chosen.arenas and self._num_pieces == 1 and self._intake.ranks is None:
            return await self._land(chosen)
        payloads = await self._fetch_chosen(chosen)
        num_imported_blocks = await self._import(payloads)
        self._intake.keep(chosen, payloads, self._owner, {})
        self._intake.arrived(chosen, num_imported_blocks)
        return num_imported_blocks

    async def _land(self, chosen: Match) -> int:
        """Fetches blocks that are not mapped straight into the request's own blocks, if those can be lent."""
        limit_s = self._intake.wire_limit_s(chosen.num_blocks)
        with landing(self._loop, self._request, chosen.num_blocks) as strip:
            payloads = await self._store.fetch(chosen, limit_s, strip.views)
            num_imported_blocks = await self._import(payloads)
            strip.keep(self._intake, chosen, payloads[:num_imported_blocks], self._owner)
        self._intake.arrived(chosen, num_imported_blocks)
        return num_imported_blocks

    async def _fetch_chosen(self, chosen: Match) -> Sequence[Payload]:
        """The leading run that all ranks could fetch."""
        num_blocks, ranks = chosen.num_blocks // self._num_pieces, self._intake.ranks
        limit_s = self._intake.wire_limit_s(num_blocks)
        if ranks is None or num_blocks == 0:
            return await self._store.fetch(chosen, limit_s)
        hashes = self._request.block_hashes[self._num_blocks : self._num_blocks + num_blocks]
        theirs = ranks.fetch(self._request, hashes, self._owner, limit_s)
        payloads, num_good_blocks = await asyncio.gather(self._store.fetch(chosen, limit_s), theirs)
        return payloads[: num_good_blocks * self._num_pieces]

    async def _match(self) -> Match:
        """What this machine's arena holds; if nothing, periodically what the directory knows of."""
        first, num_blocks = self._num_blocks, min(self.num_missing_blocks, self._max_fetch_blocks)
        hashes = piece_hashes(self._request.block_hashes[first : first + num_blocks], self._intake.pieces)
        here = self._intake.whole(self._store.match_local(hashes))
        if here.num_blocks or time.monotonic() < self._ask_directory_s:
            return here
        match = self._intake.whole(await self._store.match(hashes))
        self._ask_directory_s = time.monotonic() + DIRECTORY_PACE.pause_s(self._waited_s)
        return match

    async def _import(self, payloads: Sequence[Payload]) -> int:
        """Copies payloads into the engine, part by part; for mapped payloads this is the transfer itself."""
        num_imported_blocks = 0
        starts = range(0, len(payloads) // self._num_pieces * self._num_pieces, self._num_pieces)
        blocks = [payloads[start : start + self._num_pieces] for start in starts]
        for is_mapped, run in itertools.groupby(blocks, _is_mapped):
            batch = list(run)
            self._is_near = is_mapped
            for start in range(0, len(batch), self._max_import_blocks):
                part = batch[start : start + self._max_import_blocks]
                num_blocks = await self._import_part(part, is_mapped)
                num_imported_blocks += num_blocks
                if num_blocks < len(part):
                    return num_imported_blocks
        return num_imported_blocks

    async def _import_part(self, blocks: Sequence[Sequence[Payload]], is_mapped: bool) -> int:
        request_id = self._request.request_id
        payloads = [payload for pieces in blocks for payload in pieces]

        def copy(engine: Engine) -> tuple[int, float, float, float]:
            began_s = time.monotonic()
            num_blocks = engine.import_blocks(request_id, payloads)
            ended_s = time.monotonic()
            if self._release_at_blocks is not None and self._num_blocks >= self._release_at_blocks > 0:
                engine.release(request_id)  # at once, as another call would wait for another step
                self._is_released = True
            return num_blocks, began_s, ended_s, engine.long_prefill_tokens_per_s

        if not is_mapped:
            num_blocks, _, _, self._intake.prefill_tokens_per_s = await self._loop.call(copy)
            return num_blocks
        transfer = self._store.links.begin(self._store.local_arena_id, len(payloads), is_local=True)
        num_blocks, began_s, ended_s = 0, 0.0, 0.0
        try:
            num_blocks, began_s, ended_s, self._intake.prefill_tokens_per_s = await self._loop.call(copy)
        finally:
            transfer.end(num_blocks * self._num_pieces, began_s, ended_s)
        return num_blocks


def _is_mapped(pieces: Sequence[Payload]) -> bool:
    return all(isinstance(payload, MappedPayload) for payload in pieces)
