"""The HTTP door: OpenAI's API on aiohttp's server, on the router's event loop. Errors become statuses here, once."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import time
import uuid

from aiohttp import web
from prometheus_client import CollectorRegistry

from router.errors import ClusterUnavailable, RouterError, said
from router.frontend import Frontend
from router.http_call import Call
from router.http_errors import Failure, RefusedCall, failure_of
from router.http_ids import REQUEST_ID, is_id, no_id
from router.http_page import StatusPage
from router.http_routes import Routes
from router.http_stream import STALL_S
from router.tenants import AUTHORIZATION

logger = logging.getLogger(__name__)

BACKLOG = 1024  # connections that wait to be taken
IDLE_S = 75.0  # how long a connection may wait between requests, or for its first one's headers
LARGE_BYTES = 1 << 16  # more than a transport buffers without a wait for its client
MIN_BYTES_PER_S = 1 << 16  # that a client reads of a large answer, beside `stall_s` for all of it
# A client that vanished without a word is found out, and what it asked for is freed.
KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


class HttpDoor:
    """Answers from `open` to `close`. `metrics` None: there is no /metrics; likewise `page`."""

    def __init__(
        self,
        frontend: Frontend,
        metrics: CollectorRegistry | None = None,
        stall_s: float = STALL_S,
        page: StatusPage | None = None,
    ) -> None:
        self._frontend = frontend
        self._stall_s = stall_s
        self._routes = Routes(frontend, metrics, stall_s, page)
        self._calls: set[asyncio.Task[object]] = set()
        self._runner: web.ServerRunner | None = None
        self._site: web.SockSite | None = None
        self._is_closing = False

    async def open(self, host: str, port: int, ssl_context: ssl.SSLContext | None = None) -> int:
        """Listens; returns the port. Raises `RuntimeError` where it is taken."""
        listener = _listen(host, port)
        server = _Server(
            self._handle,
            handler_cancellation=True,  # a client that hangs up cancels its request
            access_log=None,
            keepalive_timeout=IDLE_S,
            auto_decompress=False,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        self._site = web.SockSite(self._runner, listener, ssl_context=ssl_context, backlog=BACKLOG)
        await self._site.start()
        return int(listener.getsockname()[1])

    async def close(self, drain_s: float) -> None:
        """Takes no new calls, lets those that run end within `drain_s`, cuts off the others. Idempotent."""
        runner, self._runner = self._runner, None
        self._is_closing = True
        if runner is None or self._site is None:
            return
        await self._site.stop()
        if self._calls:
            await asyncio.wait(self._calls, timeout=drain_s)
        for task in self._calls:
            task.cancel()
        await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            response = await self._answer(request)
            if not response.prepared and (response.content_length or 0) > LARGE_BYTES:
                await self._send(request, response)
            return response
        finally:
            self._calls.discard(task)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        given = request.headers.get(REQUEST_ID, "")
        has_id = is_id(given)
        call = Call(request, given if has_id else uuid.uuid4().hex, time.monotonic())
        try:
            if self._is_closing:
                raise ClusterUnavailable("this router is stopping")
            if given and not has_id:
                raise no_id(REQUEST_ID, given)
            route = self._routes.find(request.method, request.path)
            if route.needs_key:
                call.tenant = self._frontend.authenticate(request.headers.getall(AUTHORIZATION, []))
            response = await route.endpoint(call)
        except RouterError as error:
            response = _refusal(failure_of(error, call.renamed))
            path = request.rel_url.raw_path  # whose spaces and line ends are still encoded
            logger.info("event=refused path=%s status=%d %s", path, response.status, said(error))
        except Exception as error:
            logger.exception("event=call_failed path=%s request_id=%s", request.rel_url.raw_path, call.request_id)
            response = _refusal(failure_of(error, call.renamed))
        if not response.prepared:
            response.headers.update(call.headers)
            response.headers["Server"] = "baton"
            if self._is_closing:
                response.force_close()
        return response

    async def _send(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """A large answer, which is not kept for ever for a client who does not read it."""
        size = response.content_length or 0
        try:
            async with asyncio.timeout(self._stall_s + size / MIN_BYTES_PER_S):
                await response.prepare(request)
                await response.write_eof()
        except ConnectionError:
            pass  # the client hung up, and the server sees that by itself
        except TimeoutError:
            logger.info("event=client_gone path=%s has not read %d bytes in time", request.rel_url.raw_path, size)
            if request.transport is not None:
                request.transport.abort()


class _Connection(web.RequestHandler):
    """What is no HTTP has an answer in the shape of all errors, and its bytes, which may be a key, are in no log."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        logger.info("event=bad_http remote=%s status=%d error=%s", request.remote, status, type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun")
        error = RefusedCall(status, "what was sent is no HTTP that is taken here", "bad_http")
        response = _refusal(failure_of(error, {}))
        _mark(response, uuid.uuid4().hex)
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


def _mark(response: web.StreamResponse, request_id: str) -> None:
    response.headers[REQUEST_ID] = request_id
    response.headers["Server"] = "baton"


def _refusal(failure: Failure) -> web.Response:
    body = json.dumps(failure.body).encode()
    return web.Response(
        body=body, status=failure.status, headers=dict(failure.headers), content_type="application/json"
    )


def _listen(host: str, port: int) -> socket.socket:
    """A socket whose connections inherit its options. `host` as gRPC has it: a name, an address, or [::]."""
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:
        listener = socket.create_server((name, port), family=family, backlog=BACKLOG, dualstack_ipv6=name == "::")
    except OSError as error:
        raise RuntimeError(f"cannot listen for HTTP at {host}:{port}: {error}") from None
    for option, value in KEEPALIVE.items():
        listener.setsockopt(socket.IPPROTO_TCP, option, value)
    return listener
