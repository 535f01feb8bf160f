"""The endpoints: each takes a call, asks the core, and shows what it says in the shape that OpenAI's or vLLM's has."""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import unquote

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from batonpb import inference_pb2
from router.errors import ClusterUnavailable, InvalidRequest
from router.frontend import Caller, Frontend
from router.http_answers import ChatChoice, Choice, CompletionChoice, Counts, Totals, whole_answer
from router.http_body import INLINE_BYTES, parse_object, read_body
from router.http_errors import RefusedCall, failure_of
from router.http_ids import REQUEST_ID, id_in
from router.http_models import ChatRequest, CompletionRequest, DetokenizeRequest, Sampled, TokenizeRequest, read
from router.http_openapi import openapi
from router.http_page import StatusPage
from router.http_requests import Asked, ask_chat, ask_completion, ask_tokens
from router.http_scores import Entries, Json
from router.http_stream import STALL_S, ClientGone, EventStream, answers
from router.tenants import EVERYBODY, Tenant
from router.traces import NO_TRACE, TRACEPARENT, TRACERESPONSE, TRACESTATE, Trace
from router.validate import check_model

logger = logging.getLogger(__name__)

MODELS = "/v1/models"
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


Endpoint = Callable[[Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Route:
    method: str
    endpoint: Endpoint
    needs_key: bool


class Routes:
    """All endpoints of one router. `metrics` None: it shows none; likewise `page`."""

    def __init__(
        self,
        frontend: Frontend,
        metrics: CollectorRegistry | None,
        stall_s: float = STALL_S,
        page: StatusPage | None = None,
    ) -> None:
        self._frontend = frontend
        self._metrics = metrics
        self._stall_s = stall_s
        self._created = int(time.time())
        self._routes = {
            "/v1/chat/completions": Route("POST", self._chat, True),
            "/v1/completions": Route("POST", self._complete, True),
            MODELS: Route("GET", self._models, True),
            "/tokenize": Route("POST", self._tokenize, True),
            "/detokenize": Route("POST", self._detokenize, True),
            "/health": Route("GET", self._health, False),
            "/ready": Route("GET", self._ready, False),
            "/version": Route("GET", self._version, False),
            "/openapi.json": Route("GET", self._openapi, False),
        }
        if metrics is not None:
            self._routes["/metrics"] = Route("GET", self._show_metrics, False)
        if page is not None:
            for path in page.paths:
                self._routes[path] = Route("GET", functools.partial(_show_page, page), False)

    def find(self, method: str, path: str) -> Route:
        """Raises `RefusedCall`: no such route, or none for the method."""
        route = self._routes.get(path)
        if route is None and path.startswith(f"{MODELS}/"):
            route = Route("GET", self._model, True)
        if route is None:
            raise RefusedCall(404, f"there is no {path[:128]!r} here", "unknown_url")
        if method != route.method and (method, route.method) != ("HEAD", "GET"):
            raise RefusedCall(405, f"{path[:128]} takes {route.method}", "method_not_allowed", {"Allow": route.method})
        return route

    # --- answers of the model ---

    async def _chat(self, call: Call) -> web.StreamResponse:
        with self._trace(call):
            return await self._traced_chat(call)

    async def _complete(self, call: Call) -> web.StreamResponse:
        with self._trace(call):
            return await self._traced_completion(call)

    def _trace(self, call: Call) -> Trace:
        headers = call.request.headers
        call.trace = self._frontend.traces.begin(headers.get(TRACEPARENT, ""), headers.get(TRACESTATE, ""))
        return call.trace

    async def _traced_chat(self, call: Call) -> web.StreamResponse:
        asked = await self._ask(call, lambda body: ask_chat(call.read(ChatRequest, body), call.request_id))
        choices = [
            ChatChoice(index, self._frontend.piece, asked.num_logprobs, asked.is_single_call, asked.shows_prompt)
            for index in range(asked.num_answers)
        ]
        return await self._answer(call, asked, choices, "chatcmpl", "chat.completion")

    async def _traced_completion(self, call: Call) -> web.StreamResponse:
        asked = await self._ask(call, lambda body: ask_completion(call.read(CompletionRequest, body), call.request_id))
        num_choices = len(asked.messages) * asked.num_answers
        is_text = self._frontend.is_text if asked.echoes_logprobs else None
        choices = [
            CompletionChoice(index, self._frontend.piece, asked.num_logprobs, is_text, asked.shows_prompt)
            for index in range(num_choices)
        ]
        return await self._answer(call, asked, choices, "cmpl", "text_completion")

    async def _ask(self, call: Call, make: Callable[[Json], AskedT]) -> AskedT:
        """What the body asks for. A large one is looked at on a thread, so that nobody's stream waits for it."""
        body = await read_body(call.request, self._frontend.limits.max_message_bytes)
        if len(body) <= INLINE_BYTES:
            return make(parse_object(body))
        return await asyncio.to_thread(lambda: make(parse_object(body)))

    async def _answer(
        self, call: Call, asked: Asked, choices: Sequence[Choice], prefix: str, kind: str
    ) -> web.StreamResponse:
        call.renamed = asked.renamed
        caller = call.caller()
        is_chunk = asked.is_stream and prefix == "chatcmpl"
        head: Json = {
            "id": f"{prefix}-{call.request_id}",
            "object": f"{kind}.chunk" if is_chunk else kind,
            "created": int(time.time()),
            "model": self._frontend.model().model,
        }
        if asked.is_stream:
            return await self._stream(call, caller, asked, choices, head)
        totals, entries = Totals(len(asked.messages)), Entries()
        num_finished = 0
        async with aclosing(answers(self._frontend, asked.messages, caller)) as responses:
            async for prompt, response in responses:
                choice = choices[prompt * asked.num_answers + response.index]
                if asked.is_scored and response.HasField("prompt_logprobs"):
                    entries.add(response.prompt_logprobs)
                    await asyncio.to_thread(choice.add, response)  # they may be many
                else:
                    choice.add(response)
                if response.finish_reason:
                    totals.add(prompt, response.usage)
                    num_finished += 1
        _check_whole(num_finished, choices)
        whole = whole_answer(head, choices, totals)
        if not asked.is_scored:
            return _json(whole)
        if prefix == "chatcmpl" and asked.shows_prompt:
            whole["prompt_logprobs"] = choices[0].prompt_logprobs
        return await asyncio.to_thread(_json, whole)

    async def _stream(
        self, call: Call, caller: Caller, asked: Asked, choices: Sequence[Choice], head: Json
    ) -> web.StreamResponse:
        """Until the first response, an error is a status; after it, an event."""
        events = EventStream(call.request, call.headers, self._stall_s)
        totals, counts = Totals(len(asked.messages)), Counts(len(choices))
        tail: Json = {"usage": None} if asked.includes_usage else {}
        num_finished, is_open = 0, False
        try:
            async with aclosing(answers(self._frontend, asked.messages, caller)) as responses:
                async for prompt, response in responses:
                    if not is_open:
                        await events.open()
                        is_open = True
                    index = prompt * asked.num_answers + response.index
                    show = choices[index].delta
                    is_long = asked.is_scored and response.HasField("prompt_logprobs")
                    delta = await asyncio.to_thread(show, response) if is_long else show(response)
                    counts.add(index, response)
                    if asked.counts_usage:
                        tail = {"usage": counts.usage(index)}
                    if response.finish_reason:
                        totals.add(prompt, response.usage)
                        num_finished += 1
                    if delta is not None:
                        await events.send({**head, "choices": [delta], **tail})
            _check_whole(num_finished, choices)
            if asked.includes_usage:
                await events.send({**head, "choices": [], "usage": totals.usage()})
            return await events.finish()
        except ClientGone as gone:
            logger.info("event=client_gone request_id=%s %s", call.request_id, gone)
            return events.abandon()
        except Exception as error:
            if not is_open:
                raise
            failure = failure_of(error, asked.renamed)
            logger.info("event=stream_failed request_id=%s %s", call.request_id, error, exc_info=failure.status == 500)
            return await events.fail(failure.body)

    # --- tokens ---

    async def _tokenize(self, call: Call) -> web.StreamResponse:
        def make(body: Json) -> tuple[str | None, inference_pb2.TokenizeRequest]:
            request = read(TokenizeRequest, body)
            return request.model, ask_tokens(request)

        model, message = await self._ask(call, make)
        check_model(model or "", self._frontend.model().model)
        call.renamed = {} if message.HasField("text") else {"prompt": "messages"}
        response = await self._frontend.tokenize(message, call.caller())
        token_ids = list(response.token_ids)
        about = {"count": len(token_ids), "max_model_len": response.max_model_len}
        return _json({**about, "tokens": token_ids, "token_strs": None})

    async def _detokenize(self, call: Call) -> web.StreamResponse:
        call.renamed = {"token_ids": "tokens", "tokens": "tokens"}
        request = await self._ask(call, lambda body: read(DetokenizeRequest, body))
        check_model(request.model or "", self._frontend.model().model)
        message = inference_pb2.DetokenizeRequest(token_ids=request.tokens)
        response = await self._frontend.detokenize(message, call.caller())
        return _json({"prompt": response.text})

    # --- what is served, and how it is ---

    async def _models(self, _call: Call) -> web.StreamResponse:
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, call: Call) -> web.StreamResponse:
        asked, card = unquote(call.request.path.removeprefix(f"{MODELS}/")), self._card()
        if not asked:
            raise RefusedCall(404, "there is no model without a name", "model_not_found")
        check_model(asked, card["id"])
        return _json(card)

    def _card(self) -> Json:
        model = self._frontend.model()
        card = {"id": model.model, "object": "model", "created": self._created, "owned_by": "baton"}
        return card | {"root": model.model, "parent": None, "max_model_len": model.max_model_len}

    async def _health(self, _call: Call) -> web.StreamResponse:
        return _json({"status": "ok"})

    async def _ready(self, _call: Call) -> web.StreamResponse:
        if not self._frontend.is_ready:
            raise ClusterUnavailable("no node serves now")
        return _json({"status": "ready"})

    async def _version(self, _call: Call) -> web.StreamResponse:
        return _json({"version": _version()})

    async def _openapi(self, _call: Call) -> web.StreamResponse:
        return web.Response(body=_openapi_page(), content_type="application/json")

    async def _show_metrics(self, _call: Call) -> web.StreamResponse:
        assert self._metrics is not None
        return web.Response(body=generate_latest(self._metrics), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _show_page(page: StatusPage, call: Call) -> web.StreamResponse:
    return await page.answer(call.request.path)


def _check_whole(num_finished: int, choices: Sequence[Choice]) -> None:
    if num_finished != len(choices):
        raise RuntimeError(f"the core ended after {num_finished} of {len(choices)} answers")


def _json(value: Any) -> web.Response:
    body = json.dumps(value, separators=(",", ":")).encode()
    return web.Response(body=body, content_type="application/json")


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("baton")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "unknown"


@functools.cache
def _openapi_page() -> bytes:
    return json.dumps(openapi(_version())).encode()
