"""What the tests of the HTTP door share: a cluster of fakes that speaks, and plain HTTP without a client's kindness."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from router_fakes import FakeCluster, FakeNode, NextToken, running, saying

from batonpb import common_pb2, node_pb2

TALK = "Naïve 😀 façade, 日本 — and so on."


@asynccontextmanager
async def talking(
    redis_url: str, next_token: NextToken | None = None, max_model_len: int = 4096, **options: Any
) -> AsyncIterator[FakeCluster]:
    """Both legs on nodes of their own, which say `TALK` with a logprob for each token. `options` are the router's."""
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "decode0"):
            give_logprobs(await cluster.add(node_id, next_token or saying(TALK), max_model_len=max_model_len))
        await cluster.open(**options)
        yield cluster


def give_logprobs(node: FakeNode) -> None:
    """Each token has the logprob -token_id / 1000, and alternatives of -1, -2 and so on: the ids behind it."""
    plain = node._next

    def with_logprobs(request: node_pb2.NodeRequest, more: Sequence[int]) -> tuple[common_pb2.Token, int]:
        token, reason = plain(request, more)
        if request.sampling.HasField("logprobs"):
            token.logprobs.logprob = -token.token_id / 1000
            for rank in range(request.sampling.logprobs):
                token.logprobs.top.add(token_id=token.token_id + rank, logprob=-1.0 - rank)
        return token, reason

    node._next = with_logprobs  # type: ignore[method-assign]


async def post(url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Mapping[str, str], Any]:
    """(status, headers, JSON) of one POST; `body` is bytes, or what JSON is made of."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} | (headers or {})
    async with aiohttp.ClientSession() as session, session.post(url, data=data, headers=given) as answer:
        return answer.status, answer.headers, await answer.json()


async def get(
    url: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, Mapping[str, str], Any]:
    async with aiohttp.ClientSession() as session, session.request(method, url, headers=headers) as answer:
        text = await answer.text()
        is_json = answer.content_type == "application/json" and text
        return answer.status, answer.headers, json.loads(text) if is_json else text


async def events(url: str, body: Any) -> list[Any]:
    """The data of each event of a stream, [DONE] as the text that it is."""
    found: list[Any] = []
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        async for line in answer.content:
            if line.startswith(b"data: "):
                data = line[6:].strip()
                found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return found


async def open_raw(cluster: FakeCluster, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which one request was sent, and whose answer nobody reads yet."""
    host, _, port = cluster.http_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 16)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer
