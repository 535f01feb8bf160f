"""Brings the blocks of a held request from the store into its engine: match, fetch, import. Knows no gRPC.

Whatever goes wrong here is a shorter hit: the engine computes what did not come.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from engine.errors import UnknownRequest
from engine.loop import EngineLoop
from engine.request import Request
from kvstore.blocks import Payload
from kvstore.client import KVClient

logger = logging.getLogger(__name__)

MAX_FETCH_BYTES = 64 * 2**20  # of one round: bounds what lies in memory between the wire and the engine
MAX_IMPORT_BYTES = 8 * 2**20  # of one call on the engine thread: bounds how long running requests wait for it
MIN_POLL_S, MAX_POLL_S = 0.01, 0.2


class Fetcher:
    """Fetches for one HELD request."""

    def __init__(self, loop: EngineLoop, store: KVClient, request: Request) -> None:
        self._loop = loop
        self._store = store
        self._request = request
        block_bytes = loop.engine.layout.block_bytes
        self._max_fetch_blocks = max(1, MAX_FETCH_BYTES // block_bytes)
        self._max_import_blocks = max(1, MAX_IMPORT_BYTES // block_bytes)

    @property
    def num_missing_blocks(self) -> int:
        """Blocks that could still be fetched; the one with the last token never is, so that a token is computed."""
        request = self._request
        return (request.num_tokens - 1) // request.block_size - request.num_computed_tokens // request.block_size

    async def fetch(self) -> int:
        """Imports the leading run of missing blocks that the store has now. Returns how many came; never raises."""
        num_fetched_blocks = 0
        try:
            while self.num_missing_blocks > 0:
                num_blocks = await self._fetch_round()
                num_fetched_blocks += num_blocks
                if num_blocks < self._max_fetch_blocks:
                    break
        except UnknownRequest:
            pass  # aborted meanwhile: nobody waits for these blocks
        except Exception:  # a miss, whatever it is
            logger.exception("event=fetch_failed request=%s", self._request.request_id)
        return num_fetched_blocks

    async def fetch_until(self, stop: asyncio.Event) -> None:
        """Fetches blocks as they are published elsewhere, until all are here or `stop` is set."""
        poll_s = MIN_POLL_S
        while self.num_missing_blocks > 0 and not stop.is_set():
            poll_s = MIN_POLL_S if await self.fetch() else min(2 * poll_s, MAX_POLL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(poll_s):
                    await stop.wait()

    async def _fetch_round(self) -> int:
        request = self._request
        first = request.num_computed_tokens // request.block_size
        last = min(first + self.num_missing_blocks, first + self._max_fetch_blocks)
        match = await self._store.match(request.block_hashes[first:last])
        if match.num_blocks == 0:
            return 0
        return await self._import(await self._store.fetch(match))

    async def _import(self, payloads: Sequence[Payload]) -> int:
        num_imported_blocks = 0
        for start in range(0, len(payloads), self._max_import_blocks):
            part = payloads[start : start + self._max_import_blocks]
            num_blocks = await self._import_part(part)
            num_imported_blocks += num_blocks
            if num_blocks < len(part):
                break
        return num_imported_blocks

    async def _import_part(self, payloads: Sequence[Payload]) -> int:
        return await self._loop.call(lambda engine: engine.import_blocks(self._request.request_id, payloads))
