"""Reads /metrics as Prometheus does."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families


async def http(address: str, request: bytes) -> tuple[bytes, str]:
    """Status line and body."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    head, _, body = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")
    writer.close()
    return head.split(b"\r\n")[0], body.decode()


async def scrape(address: str) -> dict[tuple[str, ...], float]:
    """(name, label values) -> value; what Prometheus' own parser makes of the page."""
    status, body = await http(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == b"HTTP/1.1 200 OK"
    families = text_string_to_metric_families(body)
    return {(s.name, *map(s.labels.get, sorted(s.labels))): s.value for family in families for s in family.samples}
