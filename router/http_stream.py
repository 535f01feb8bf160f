"""Many answers at once, and server-sent events of them: bounded where clients read slowly, freed when they hang up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from aiohttp import web

from batonpb import inference_pb2
from router.frontend import Caller, Frontend
from router.http_json import encode, encode_large
from router.merge import merge

STALL_S = 60.0  # how long a stream waits for its client to read
HEADERS = {
    "Server": "baton",
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies that know it pass each event on at once
}
SMALL_BYTES = 1 << 14  # well below what a transport buffers before it makes its writer wait (64 KiB)
DONE = b"data: [DONE]\n\n"

Answers = AsyncGenerator[tuple[int, inference_pb2.GenerateResponse], None]


class ClientGone(Exception):
    """A client hung up, or reads nothing any more: nobody is there to be told."""


def answers(frontend: Frontend, messages: Sequence[inference_pb2.GenerateRequest], caller: Caller) -> Answers:
    """(which of the messages, its response) as they come. Close it to abandon them all; one error ends them all."""
    streams = [_numbered(index, frontend.generate(message, caller)) for index, message in enumerate(messages)]
    return streams[0] if len(streams) == 1 else merge(streams)


async def _numbered(index: int, stream: AsyncGenerator[inference_pb2.GenerateResponse, None]) -> Answers:
    async with aclosing(stream):
        async for response in stream:
            yield index, response


class EventStream:
    """One answer of server-sent events. `open` sends the status; after it, an error can only be an event."""

    def __init__(self, request: web.BaseRequest, headers: Mapping[str, str], stall_s: float) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={**HEADERS, **headers})
        self._stall_s = stall_s

    async def open(self) -> None:
        try:
            await self._response.prepare(self._request)
        except ConnectionError as error:
            raise ClientGone(str(error)) from None

    async def send(self, event: object, is_large: bool = False) -> None:
        """Raises `ClientGone`."""
        data = await asyncio.to_thread(encode_large, event) if is_large else encode(event)
        await self._write(b"data: " + data + b"\n\n")

    async def finish(self) -> web.StreamResponse:
        """The end of an answer that is whole. Raises `ClientGone`."""
        await self._write(DONE)
        return self._response

    async def fail(self, error: object) -> web.StreamResponse:
        """The end of one that is not: an event, and a connection that closes in the middle of its chunks."""
        try:
            await self.send(error)
        except ClientGone:
            return self.abandon()
        if self._request.transport is not None:
            self._request.transport.close()
        return self._response

    def abandon(self) -> web.StreamResponse:
        """The end of one that nobody reads; what is buffered for it is dropped."""
        if self._request.transport is not None:
            self._request.transport.abort()
        return self._response

    async def _write(self, data: bytes) -> None:
        transport = self._request.transport
        try:
            if transport is not None and len(data) <= SMALL_BYTES and not transport.get_write_buffer_size():
                await self._response.write(data)  # which cannot wait: a timer would cost more than it does
                return
            async with asyncio.timeout(self._stall_s):
                await self._response.write(data)
        except TimeoutError:
            raise ClientGone(f"has read nothing for {self._stall_s:g} s") from None
        except ConnectionError as error:
            raise ClientGone(str(error)) from None
