"""An HTTP server for Prometheus: `GET /metrics` on the event loop, and nothing else."""

from __future__ import annotations

import asyncio
import logging

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 1 << 13
_PATIENCE_S = 5.0  # with one who asks
_MAX_VISITORS = 16


class ScrapeDoor:
    """Serves what a collector collects, from `open` to `close`, both on one event loop."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._visitors: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self, collector: Collector, bind_host: str, advertise_host: str, port: int = 0) -> str:
        """Listens; port 0 lets the kernel choose. Returns "ip:port", or "" with a log line if it cannot listen."""
        self._registry.register(collector)
        host = None if bind_host == "*" else bind_host.strip("[]")
        try:
            self._server = await asyncio.start_server(self._visit, host, port, limit=_MAX_HEAD_BYTES)
        except OSError as error:
            logger.warning("event=no_metrics host=%s port=%d error=%r", bind_host, port, str(error))
            return ""
        return f"{advertise_host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            for task in self._visitors:
                task.cancel()
            await asyncio.gather(*self._visitors, return_exceptions=True)
            await server.wait_closed()

    def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._visitors) >= _MAX_VISITORS:
            writer.close()
            return
        visitor = asyncio.create_task(self._answer(reader, writer))
        self._visitors.add(visitor)
        visitor.add_done_callback(self._visitors.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                writer.write(self._response(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError) as error:
            logger.debug("event=scrape_cut_short error=%r", error)
        except Exception:
            logger.exception("event=scrape_failed")
        finally:
            writer.close()

    def _response(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or words[0] != b"GET" or words[1].split(b"?")[0] != b"/metrics":
            return _http("404 Not Found", "text/plain", b"GET /metrics\n")
        return _http("200 OK", CONTENT_TYPE_LATEST, generate_latest(self._registry))


def _http(status: str, content_type: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
