"""Which requests enter this node's engine, and when; and that each leaves nothing behind. Knows no gRPC and no store.

A leg is one request's stay in the engine. However it ends (done, cancelled, deadline, error), its blocks are freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator

from engine.engine import Engine
from engine.errors import NoRoom
from engine.loop import EngineLoop, OutputStream
from engine.request import EngineLoad, Request, RequestStatus
from node.errors import Busy, Draining

POLL_S = 0.01


class Admission:
    """One node's admission, shared by both of its workers."""

    def __init__(self, loop: EngineLoop, max_queued_requests: int = 256, room_wait_s: float = 10.0) -> None:
        self.is_draining = False
        self.requests: set[Request] = set()  # one per leg in progress
        self._loop = loop
        self._max_queued_requests = max_queued_requests
        self._room_wait_s = room_wait_s
        self._queue: set[Request] = set()  # the legs that wait for room
        self._turn = asyncio.Lock()  # serves waiting legs in order of arrival

    @contextlib.contextmanager
    def leg(self, request: Request) -> Iterator[OutputStream]:
        """A request's stay in the engine, with its outputs. Holding and releasing are up to the caller.

        Leaving the context does not wait, so a cancelled task cannot be prevented from it. Raises `Draining`.
        """
        if self.is_draining:
            raise Draining("this node is draining")
        outputs = self._loop.subscribe(request.request_id)
        self.requests.add(request)
        try:
            yield outputs
        finally:
            self.requests.discard(request)
            self._loop.abort(request.request_id)
            outputs.close()

    async def hold(self, request: Request) -> int:
        """Takes blocks for the whole request, at once; returns how many are left. Raises `InvalidRequest`, `NoRoom`.

        Queued requests are not overtaken: they hold room on other nodes while they wait for this one.
        """
        if self._queue:
            raise NoRoom(f"{len(self._queue)} requests wait for room here")
        return await self._loop.call(lambda engine: _hold(engine, request))

    async def hold_in_turn(self, request: Request) -> int:
        """Like `hold`, but waits for room, first come first served. Raises `InvalidRequest`, or `Busy` after a while.

        The wait is bounded: two nodes that serve both legs could be full of decode legs whose prefill legs queue at
        the other node.
        """
        if not self._queue:
            with contextlib.suppress(NoRoom):
                return await self.hold(request)
        if len(self._queue) >= self._max_queued_requests:
            raise Busy(f"{len(self._queue)} requests wait for room here, and no more may")
        self._queue.add(request)
        try:
            async with asyncio.timeout(self._room_wait_s), self._turn:
                return await self._hold_when_there_is_room(request)
        except TimeoutError:
            raise Busy(f"no room for {request.num_tokens} tokens within {self._room_wait_s} s") from None
        finally:
            self._queue.discard(request)

    async def load(self) -> EngineLoad:
        """The engine's load, as a router needs it.

        Requests that wait for room count too. Prompts of held requests do not: it is not known yet how much of them the
        engine will have to compute, and usually it is only the tail.
        """
        load = await self._loop.call(lambda engine: engine.load())
        held = [request for request in self.requests if request.status is RequestStatus.HELD]
        queued_tokens = sum(request.num_tokens for request in self._queue)
        queued_tokens -= sum(max(0, request.num_prompt_tokens - request.num_computed_tokens) for request in held)
        return dataclasses.replace(
            load,
            num_waiting=load.num_waiting + len(self._queue),
            queued_prefill_tokens=max(0, load.queued_prefill_tokens + queued_tokens),
        )

    async def idle(self) -> None:
        """Waits until every leg is over."""
        while self.requests:
            await asyncio.sleep(POLL_S)

    async def _hold_when_there_is_room(self, request: Request) -> int:
        # Only the first in the queue polls. Room comes when other legs end and when blocks are unpinned.
        while True:
            try:
                return await self._loop.call(lambda engine: _hold(engine, request))
            except NoRoom:
                await asyncio.sleep(POLL_S)


def _hold(engine: Engine, request: Request) -> int:
    engine.add(request, hold=True)
    return engine.load().free_blocks
