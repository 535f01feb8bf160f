"""One call over HTTP: what its headers say, its body as a request, and plain JSON as an answer to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from aiohttp import web

from router.errors import InvalidRequest
from router.frontend import Caller
from router.http_body import INLINE_BYTES, parse_object, read_body
from router.http_ids import REQUEST_ID, id_in
from router.http_json import encode, encode_large
from router.http_models import Sampled, read
from router.http_scores import Json
from router.tenants import EVERYBODY, Tenant
from router.traces import NO_TRACE, TRACERESPONSE, Trace

TIMEOUT = "X-Request-Timeout-Ms"  # what a call's deadline is over gRPC
MAX_TIMEOUT_MS = 2**31
AskedT = TypeVar("AskedT")
SampledT = TypeVar("SampledT", bound=Sampled)


@dataclass
class Call:
    """One call to an endpoint. `renamed` is for the errors of the core; see `Asked`."""

    request: web.BaseRequest
    request_id: str  # of the headers; else of the body, and until that is read the router's own
    received_s: float  # monotonic
    tenant: Tenant = EVERYBODY
    renamed: Mapping[str, str] = field(default_factory=dict)
    trace: Trace = NO_TRACE

    @property
    def headers(self) -> dict[str, str]:
        traced = {TRACERESPONSE: self.trace.context} if self.trace.context else {}
        return {REQUEST_ID: self.request_id} | traced

    async def ask(self, max_bytes: int, make: Callable[[Json], AskedT]) -> AskedT:
        """What the body asks for. A large one is looked at on a thread, so that nobody's stream waits for it."""
        body = await read_body(self.request, max_bytes)
        if len(body) <= INLINE_BYTES:
            return make(parse_object(body))
        return await asyncio.to_thread(lambda: make(parse_object(body)))

    def read(self, kind: type[SampledT], body: Json) -> SampledT:
        """The request in a JSON object, which may have the call's id. Raises `InvalidRequest`."""
        asked = read(kind, body)
        given = id_in(asked)
        if given is not None and not self.request.headers.get(REQUEST_ID):
            self.request_id = given
        return asked

    def caller(self) -> Caller:
        """Raises `InvalidRequest` for a time limit that is none."""
        text = self.request.headers.get(TIMEOUT)
        if text is None:
            return Caller(self.tenant, self.received_s, trace=self.trace)
        is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_TIMEOUT_MS))
        if not (is_number and 1 <= int(text) <= MAX_TIMEOUT_MS):
            raise InvalidRequest(TIMEOUT, f"must be an integer in [1, {MAX_TIMEOUT_MS}]")
        return Caller(self.tenant, self.received_s, self.received_s + int(text) / 1000, self.trace)


def json_answer(value: object) -> web.Response:
    return web.Response(body=encode(value), content_type="application/json")


async def large_json_answer(make: Callable[[], object]) -> web.Response:
    """The same of what `make` makes, on a thread."""
    body = await asyncio.to_thread(lambda: encode_large(make()))
    return web.Response(body=body, content_type="application/json")
