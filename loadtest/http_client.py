"""Requests to any OpenAI server (Baton, vLLM, SGLang): `/v1/completions` and `/v1/chat/completions`, streamed.

A message counts as one with tokens if it brings text, or an empty text that neither opens nor ends the answer (half of
a character). The number of tokens is taken from `usage`, which is requested and must come.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from loadtest.exchange import (
    CONNECTION_LOST,
    DEFAULT_SAMPLING,
    Ask,
    ModelInfo,
    Sampling,
    SendError,
    Stream,
    Target,
    Tls,
)
from loadtest.sse import BadEvent, EventParser

_ASK_AGAIN_S = 0.1
_KEEP_ALIVE_S = 4.0  # less than servers keep an idle connection (uvicorn: 5), or one of the two would be surprised
_MAX_ERROR_BYTES = 1 << 16
_MAX_ERROR_CHARACTERS = 300
_MAX_MODELS_BYTES = 1 << 22


def base_url_of(address: str, is_tls: bool = False) -> str:
    """The API's URL without /v1; HOST:PORT is plain HTTP unless `is_tls`. Raises ValueError for an invalid URL."""
    url = address if "://" in address else f"{'https' if is_tls else 'http'}://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"must be HOST:PORT or http(s)://HOST:PORT, got {address!r}")
    if is_tls and parts.scheme == "http":
        raise ValueError(f"over TLS it must be HOST:PORT or https://HOST:PORT, got {address!r}")
    return url.rstrip("/").removesuffix("/v1")


class HttpClient:
    """Connections to one server. `chat` chooses the endpoint; `model` "" takes the first that the server names."""

    def __init__(self, target: Target, chat: bool, model: str = "", sampling: Sampling = DEFAULT_SAMPLING) -> None:
        """Raises ValueError for an invalid address, OSError for an unusable TLS file."""
        self.target = target
        self._base_url = base_url_of(target.address, is_tls=target.tls is not None)
        self._url = f"{self._base_url}/v1/{'chat/completions' if chat else 'completions'}"
        self._chat = chat
        self._model = model
        self._sampling = sampling
        self._headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        self._tls = True if target.tls is None else _context_of(target.tls)
        self._server_name = (target.tls.server_name or None) if target.tls else None

    async def __aenter__(self) -> HttpClient:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self.target.timeout_s or None),
            connector=aiohttp.TCPConnector(limit=0, ssl=self._tls, keepalive_timeout=_KEEP_ALIVE_S),
            read_bufsize=1 << 18,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def get_model(self, wait_s: float = 10.0) -> ModelInfo:
        """Waits for a server that is still starting. Raises `SendError`."""
        deadline_s = time.perf_counter() + wait_s
        while True:
            try:
                return await self._ask_for_model(max(_ASK_AGAIN_S, deadline_s - time.perf_counter()))
            except SendError as error:
                if error.refused or time.perf_counter() + _ASK_AGAIN_S > deadline_s:
                    raise
            await asyncio.sleep(_ASK_AGAIN_S)

    async def _ask_for_model(self, timeout_s: float) -> ModelInfo:
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            url = f"{self._base_url}/v1/models"
            async with self._session.get(url, timeout=timeout, server_hostname=self._server_name) as response:
                await _raise_for_status(response)
                body = await _read_at_most(response, _MAX_MODELS_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _error(error, timeout_s) from None
        info = _choose_model(body, self._model)
        self._model = info.name
        return info

    def encode(self, ask: Ask) -> bytes:
        """The body. Token ids go as they are, to `/v1/completions` only, where they must be the whole conversation."""
        body: dict[str, Any] = {"model": self._model}
        if self._chat:
            body["messages"] = [{"role": message.role, "content": message.content} for message in ask.messages]
        elif isinstance(ask.messages[0].content, str):
            body["prompt"] = "".join(str(message.content) for message in ask.messages)
        else:
            body["prompt"] = [token for message in ask.messages for token in message.content]
        body |= {"max_tokens": ask.output_tokens, "temperature": self._sampling.temperature, "seed": ask.seed}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self._sampling.ignore_eos:
            body["ignore_eos"] = True  # vLLM's, SGLang's and Baton's; a server that is strict wants --no-ignore-eos
        return json.dumps(body, separators=(",", ":")).encode()

    def encode_malformed(self) -> bytes:
        """Truncated JSON."""
        return b'{"model": "' + self._model.encode() + b'", "prompt": ['

    def encode_oversized(self, num_bytes: int) -> bytes:
        """A body with a text of `num_bytes`."""
        text = "x" * num_bytes
        prompt = {"messages": [{"role": "user", "content": text}]} if self._chat else {"prompt": text}
        return json.dumps({"model": self._model, "max_tokens": 1, "stream": True} | prompt).encode()

    async def send(self, request: bytes, stream: Stream) -> None:
        """Raises `SendError`, also for an incomplete answer."""
        answer = _Answer(self._chat, stream)
        headers = {"Content-Type": "application/json"}
        try:
            post = self._session.post(self._url, data=request, headers=headers, server_hostname=self._server_name)
            async with post as response:
                await _raise_for_status(response)
                parser = EventParser()
                async for piece in response.content.iter_any():
                    for data in parser.feed(piece):
                        answer.take(data)
                    if stream.enough:
                        response.close()  # the connection with it: so the server hears of it
                        return
                    await stream.pause()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _error(error, self.target.timeout_s) from None
        except (BadEvent, ValueError, RecursionError) as error:
            raise SendError(f"the answer is broken: {error}") from None
        answer.finish()


def _context_of(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.cert is not None:
        context.load_cert_chain(tls.cert, tls.key)
    return context


class _Answer:
    """One streamed answer, event by event."""

    def __init__(self, chat: bool, stream: Stream) -> None:
        self._chat = chat
        self._stream = stream
        self._finish_reason = ""
        self._usage: dict[str, Any] = {}
        self._is_done = False

    def take(self, data: str) -> None:
        """Raises `SendError` for an error that the server reports, ValueError for an invalid answer."""
        if self._is_done:
            return
        if data == "[DONE]":
            self._is_done = True
            return
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError(f"an event must be an object, got {type(event).__name__}")
        if error := event.get("error"):
            raise SendError(f"in the stream: {_words_of(error)}")
        usage, choices = event.get("usage"), event.get("choices")
        if isinstance(usage, dict):
            self._usage = usage
        if isinstance(choices, list) and choices:
            self._take_choice(choices[0])

    def _take_choice(self, choice: Any) -> None:
        if not isinstance(choice, dict):
            raise ValueError(f"a choice must be an object, got {type(choice).__name__}")
        opens = False
        if self._chat:
            delta = choice.get("delta")
            delta = delta if isinstance(delta, dict) else {}
            text = delta.get("content")
            brings = bool(text or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"))
            opens = "role" in delta
        else:
            text = choice.get("text")
            brings = bool(text)
        ends = bool(choice.get("finish_reason"))
        if brings or not (opens or ends) or (ends and not self._stream.token_times_s):
            self._stream.add(1, text if isinstance(text, str) else "")
        if ends:
            self._finish_reason = str(choice["finish_reason"])

    def finish(self) -> None:
        """Takes the counts of `usage`; raises `SendError` if the answer is inconsistent."""
        if not self._finish_reason:
            raise SendError("the stream ended without a finish reason")
        if not self._is_done:
            raise SendError("the stream ended without [DONE]")
        if not self._usage:
            raise SendError("the stream ended without usage (the server must know stream_options.include_usage)")
        stream, details = self._stream, self._usage.get("prompt_tokens_details")
        stream.prompt_tokens = _count(self._usage, "prompt_tokens")
        stream.num_tokens = _count(self._usage, "completion_tokens")
        if isinstance(details, dict):
            stream.cached_tokens = _count(details, "cached_tokens")
        if not stream.num_tokens or not stream.token_times_s:
            raise SendError("the stream ended without a token")


def _count(data: dict[str, Any], field: str) -> int:
    value = data.get(field)
    return value if type(value) is int and value >= 0 else 0


def _choose_model(body: bytes, wanted: str) -> ModelInfo:
    try:
        models = [model for model in json.loads(body)["data"] if isinstance(model["id"], str)]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise SendError("/v1/models is no list of models", refused=True) from None
    for model in models:
        if wanted in ("", model["id"]):
            return ModelInfo(model["id"], _count(model, "max_model_len"), _count(model, "vocab_size"))
    names = ", ".join(model["id"] for model in models) or "none"
    raise SendError(f"there is no model {wanted or 'at all'}; there are: {names}", refused=True)


async def _raise_for_status(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    body = await _read_at_most(response, _MAX_ERROR_BYTES)
    try:
        content = json.loads(body)
        words = _words_of(content["error"] if isinstance(content, dict) and "error" in content else content)
    except (ValueError, RecursionError):
        words = body.decode("utf-8", "replace")
    words = " ".join(words.split())[:_MAX_ERROR_CHARACTERS]
    raise SendError(f"HTTP {response.status}: {words}", refused=400 <= response.status < 500)


async def _read_at_most(response: aiohttp.ClientResponse, num_bytes: int) -> bytes:
    pieces: list[bytes] = []
    async for piece in response.content.iter_any():
        pieces.append(piece)
        num_bytes -= len(piece)
        if num_bytes <= 0:
            break
    return b"".join(pieces)


def _words_of(error: Any) -> str:
    """What an error object says; OpenAI's has a `message`."""
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])[:_MAX_ERROR_CHARACTERS]
    return json.dumps(error)[:_MAX_ERROR_CHARACTERS]


def _error(error: Exception, timeout_s: float) -> SendError:
    if isinstance(error, TimeoutError):
        return SendError(f"timeout: no end within {timeout_s:g} s")
    if isinstance(error, aiohttp.ClientOSError | aiohttp.ServerDisconnectedError | ConnectionError):
        return SendError(f"{CONNECTION_LOST}: {error}")
    return SendError(f"{type(error).__name__}: {error}")
