"""How the client of benchmarks/serving.py reaches a set-up: loadtest's HTTP client, once for each server behind it.

All send token ids; sglang-router takes text alone, and gets the words of the same tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import replace
from typing import Any, cast

import aiohttp

from benchmarks.serving_model import text_of, tokens_of
from loadtest.exchange import Ask, Content, Message, ModelInfo, SendError, Stream, Target
from loadtest.http_client import HttpClient

MODEL_NAME = "model"  # of all set-ups
TIMEOUT_S = 120.0
NIXL_ASKS = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class OneServer(HttpClient):
    """One server. Answers are read back as tokens, so that conversations go on with them."""

    def __init__(self, address: str, as_text: bool = False) -> None:
        super().__init__(Target(address, timeout_s=TIMEOUT_S), chat=False)
        self._as_text = as_text

    async def get_model(self, wait_s: float = 10.0) -> ModelInfo:
        info = await super().get_model(wait_s)
        self._model = MODEL_NAME  # sglang-router says that its workers' is unknown
        return info

    def encode(self, ask: Ask) -> bytes:
        tokens = cast("list[int]", [token for message in ask.messages for token in message.content])
        content: Content = text_of(tokens) if self._as_text else tuple(tokens)
        return super().encode(replace(ask, messages=(Message("user", content),)))

    async def send(self, request: bytes, stream: Stream) -> None:
        await super().send(request, stream)
        stream.token_ids = list(tokens_of("".join(stream.texts)))
        if len(stream.token_ids) != stream.num_tokens:
            raise SendError(f"{stream.num_tokens} tokens were answered, the text has {len(stream.token_ids)}")


class _Several:
    """Several servers of one model, open together."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._servers = [OneServer(address) for address in addresses]
        self.target = self._servers[0].target

    async def __aenter__(self) -> Any:
        async with AsyncExitStack() as stack:
            for server in self._servers:
                await stack.enter_async_context(server)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def get_model(self, wait_s: float = 10.0) -> ModelInfo:
        models = [await server.get_model(wait_s) for server in self._servers]
        return models[0]

    def encode(self, ask: Ask) -> bytes:
        return self._servers[0].encode(ask)

    def encode_malformed(self) -> bytes:
        return self._servers[0].encode_malformed()

    def encode_oversized(self, num_bytes: int) -> bytes:
        return self._servers[0].encode_oversized(num_bytes)


class RoundRobin(_Several):
    """Each request goes to the next server."""

    def __init__(self, addresses: Sequence[str]) -> None:
        super().__init__(addresses)
        self._next = itertools.cycle(self._servers)

    async def send(self, request: bytes, stream: Stream) -> None:
        await next(self._next).send(request, stream)


class PrefillThenDecode(_Several):
    """A disaggregated pair: the first server makes one token, then the second answers, with the KV of the first.

    With `asks` (NIXL) the prefill's answer says where its blocks are; else both look into one store. TTFT has both
    calls in it. What was cached is what the first one had, as the second finds all that the first has made.
    `while_open` is entered with the client.
    """

    def __init__(
        self, addresses: Sequence[str], asks: bool, while_open: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        super().__init__(addresses)
        self._asks, self._while_open = asks, while_open

    async def __aenter__(self) -> PrefillThenDecode:
        await super().__aenter__()
        self._stack.enter_context(self._while_open())
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        self._session = await self._stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        return self

    async def send(self, request: bytes, stream: Stream) -> None:
        body = json.loads(request)
        url = f"http://{self.target.address}/v1/completions"
        try:
            async with self._session.post(url, json=prefill_body(body, self._asks)) as response:
                answer = await response.json()
                if response.status != 200:
                    raise SendError(f"prefill: HTTP {response.status}: {str(answer)[:300]}")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise SendError(f"prefill: {type(error).__name__}: {error}") from None
        if self._asks:
            body["kv_transfer_params"] = answer["kv_transfer_params"]
        await self._servers[1].send(json.dumps(body).encode(), stream)
        details = answer["usage"].get("prompt_tokens_details") or {}
        stream.cached_tokens = details.get("cached_tokens") or 0


def prefill_body(body: dict[str, Any], asks: bool) -> dict[str, Any]:
    """The first call of a pair: the same prompt, one token, at once."""
    first = {name: value for name, value in body.items() if name != "stream_options"}
    first |= {"max_tokens": 1, "stream": False}
    return first | ({"kv_transfer_params": NIXL_ASKS} if asks else {})
