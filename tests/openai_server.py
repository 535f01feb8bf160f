"""An OpenAI server over a real socket that streams by script: fixed delays, faults, pieces cut at odd borders."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Script:
    """How to answer."""

    first_pause_s: float = 0.0  # before the first token
    pause_s: float = 0.0  # before each further one
    piece_bytes: int = 0  # write so many bytes at a time; 0: an event at a time
    newline: str = "\n"
    status: int = 200
    body: str = ""  # of an error
    fault: str = ""  # "cut", "no-done", "no-usage", "no-finish", "error-event", "nonsense", "no-token", "bad-utf8"
    bundle: int = 1  # tokens in each message
    max_model_len: int = 2048


@dataclass
class OpenAiServer:
    """Serves on an event loop of its own, for callers that run one themselves."""

    script: Script = field(default_factory=Script)
    tls: ssl.SSLContext | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    in_flight: int = 0
    most_in_flight: int = 0
    num_dropped: int = 0  # answers whose reader went away
    base_url: str = ""

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 20)
        app.add_routes([web.get("/v1/models", self._models), web.get("/health", self._health)])
        app.add_routes([web.post("/v1/completions", self._serve), web.post("/v1/chat/completions", self._serve)])
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self.tls)
        await site.start()
        port = self._runner.addresses[0][1]
        self.base_url = f"{'https' if self.tls else 'http'}://127.0.0.1:{port}"

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        model = {"id": "fake", "object": "model", "max_model_len": self.script.max_model_len}
        return web.json_response({"object": "list", "data": [model]})

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.keys.add(request.headers.get("Authorization"))
        try:
            body = json.loads(await request.read())
        except ValueError:
            return web.json_response({"error": {"message": "not JSON", "code": 400}}, status=400)
        self.bodies.append(body)
        self.paths.append(request.path)
        if self.script.status != 200:
            return web.Response(status=self.script.status, text=self.script.body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._stream(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.num_dropped += 1
            raise
        finally:
            self.in_flight -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        script, is_chat, count = self.script, "messages" in body, num_tokens_of(body)
        if is_chat:
            await self._send(response, self._event({"role": "assistant", "content": ""}, None, is_chat))
        await asyncio.sleep(script.first_pause_s)
        for sent in range(0, 0 if script.fault == "no-token" else count, script.bundle):
            if sent:
                await asyncio.sleep(script.pause_s)
            if await self._break(response, request, sent):
                return response
            text = " é" * min(script.bundle, count - sent)
            await self._send(response, self._event({"content": text} if is_chat else text, None, is_chat))
        if script.fault != "no-finish":
            await self._send(response, self._event({} if is_chat else "", "length", is_chat))
        if body.get("stream_options", {}).get("include_usage") and script.fault != "no-usage":
            await self._send(response, self._event("", None, is_chat) | {"choices": [], "usage": usage_of(body)})
        if script.fault != "no-done":
            await self._write(response, f"data: [DONE]{script.newline * 2}".encode())
        await response.write_eof()
        return response

    async def _break(self, response: web.StreamResponse, request: web.Request, sent: int) -> bool:
        """Whether the fault ends the answer behind `sent` tokens."""
        fault = self.script.fault
        if sent != 2 or fault not in ("cut", "error-event", "nonsense", "bad-utf8"):
            return False
        if fault == "cut":
            assert request.transport is not None
            request.transport.close()
            return True
        pieces = {
            "error-event": b'data: {"error": {"message": "the node is gone", "code": 500}}\n\n',
            "nonsense": b"data: {not json\n\n",
            "bad-utf8": b"data: \xff\xfe\n\n",
        }
        await response.write(pieces[fault])
        await response.write_eof()
        return True

    def _event(self, content: Any, finish_reason: str | None, is_chat: bool) -> dict[str, Any]:
        choice = {"index": 0, "delta" if is_chat else "text": content, "finish_reason": finish_reason}
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        return {"id": "x", "object": kind, "created": 0, "model": "fake", "choices": [choice]}

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        words = json.dumps(event, ensure_ascii=False)
        await self._write(response, f"data: {words}{self.script.newline * 2}".encode())

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        step = self.script.piece_bytes or len(data)
        for start in range(0, len(data), step):
            await response.write(data[start : start + step])
            if self.script.piece_bytes:
                await asyncio.sleep(0)


def usage_of(body: dict[str, Any]) -> dict[str, Any]:
    """Tokens as this server counts them: ids, or words; half of a prompt is cached."""
    prompt = body.get("prompt")
    if prompt is None:
        num_prompt = sum(len(message["content"].split()) for message in body["messages"])
    else:
        num_prompt = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
    details = {"cached_tokens": num_prompt // 2}
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens_of(body),
        "prompt_tokens_details": details,
    }


def num_tokens_of(body: dict[str, Any]) -> int:
    """How long the answer is to be, by either of its names."""
    return int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
