"""Who may come into this node's engine and when, and that each leaves nothing behind. Knows no gRPC and no store.

A leg is one request's stay in the engine. However it ends (done, cancelled, deadline, error), its blocks are freed.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from engine.engine import Engine
from engine.errors import NoRoom
from engine.loop import EngineLoop, OutputStream
from engine.request import EngineLoad, Request
from node.errors import Busy, Draining

POLL_S = 0.01


class Admission:
    """The door of one node, shared by both its workers."""

    def __init__(self, loop: EngineLoop, max_queued_requests: int = 256, room_wait_s: float = 10.0) -> None:
        self.is_draining = False
        self.num_legs = 0
        self._loop = loop
        self._max_queued_requests = max_queued_requests
        self._room_wait_s = room_wait_s
        self._num_queued_requests = 0
        self._num_queued_tokens = 0
        self._turn = asyncio.Lock()  # serves those who wait in the order in which they came

    @contextmanager
    def leg(self, request: Request) -> Iterator[OutputStream]:
        """A stay in the engine: what it will put out. To hold and to release are up to the caller. Raises `Draining`.

        Leaving waits for nothing, so that a cancelled task cannot be kept from it.
        """
        if self.is_draining:
            raise Draining("this node is draining")
        outputs = self._loop.subscribe(request.request_id)
        self.num_legs += 1
        try:
            yield outputs
        finally:
            self.num_legs -= 1
            self._loop.abort(request.request_id)
            outputs.close()

    async def hold(self, request: Request) -> int:
        """Takes blocks for the whole request, at once; returns how many are left. Raises `InvalidRequest`, `NoRoom`.

        Nobody overtakes those who queue: they hold room on other nodes while they wait for this one.
        """
        if self._num_queued_requests:
            raise NoRoom(f"{self._num_queued_requests} requests wait for room here")
        return await self._loop.call(lambda engine: _hold(engine, request))

    async def hold_in_turn(self, request: Request) -> int:
        """Like `hold`, but waits for room, first come first served. Raises `InvalidRequest`, and `Busy` in the end.

        The wait is bounded: two nodes that serve both legs could be full of decode legs whose prefill legs queue at
        the other one.
        """
        if self._num_queued_requests >= self._max_queued_requests:
            raise Busy(f"{self._num_queued_requests} requests wait for room here, and no more may")
        self._num_queued_requests += 1
        self._num_queued_tokens += request.num_tokens
        try:
            async with asyncio.timeout(self._room_wait_s), self._turn:
                return await self._hold_when_there_is_room(request)
        except TimeoutError:
            raise Busy(f"no room for {request.num_tokens} tokens within {self._room_wait_s} s") from None
        finally:
            self._num_queued_requests -= 1
            self._num_queued_tokens -= request.num_tokens

    async def load(self) -> EngineLoad:
        """The engine's load, and those who wait for room in front of it."""
        load = await self._loop.call(lambda engine: engine.load())
        return dataclasses.replace(
            load,
            num_waiting=load.num_waiting + self._num_queued_requests,
            queued_prefill_tokens=load.queued_prefill_tokens + self._num_queued_tokens,
        )

    async def idle(self) -> None:
        """Waits until every leg is over."""
        while self.num_legs:
            await asyncio.sleep(POLL_S)

    async def _hold_when_there_is_room(self, request: Request) -> int:
        # Only the first in the queue asks again and again. Room comes with the ends of other legs and with unpinning.
        while True:
            try:
                return await self._loop.call(lambda engine: _hold(engine, request))
            except NoRoom:
                await asyncio.sleep(POLL_S)


def _hold(engine: Engine, request: Request) -> int:
    engine.add(request, hold=True)
    return engine.load().free_blocks
