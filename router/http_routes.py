"""The routes: which endpoint a call is for, and the endpoints that say what is served and how it is."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from batonpb import inference_pb2
from router.errors import ClusterUnavailable
from router.frontend import Frontend
from router.http_call import Call, json_answer
from router.http_errors import RefusedCall
from router.http_generation import Generation
from router.http_models import DetokenizeRequest, TokenizeRequest, read
from router.http_openapi import openapi
from router.http_page import StatusPage
from router.http_requests import ask_tokens
from router.http_scores import Json
from router.http_stream import STALL_S
from router.validate import check_model

MODELS = "/v1/models"
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
        self._created = int(time.time())
        generation = Generation(frontend, stall_s)
        self._routes = {
            "/v1/chat/completions": Route("POST", generation.chat, True),
            "/v1/completions": Route("POST", generation.complete, True),
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
            allowed = {"Allow": route.method}
            raise RefusedCall(405, f"{path[:128]!r} takes {route.method}", "method_not_allowed", allowed)
        return route

    # --- tokens ---

    async def _tokenize(self, call: Call) -> web.StreamResponse:
        def make(body: Json) -> tuple[str | None, inference_pb2.TokenizeRequest]:
            request = read(TokenizeRequest, body)
            return request.model, ask_tokens(request)

        model, message = await call.ask(self._frontend.limits.max_message_bytes, make)
        check_model(model or "", self._frontend.model().model)
        call.renamed = {} if message.HasField("text") else {"prompt": "messages"}
        response = await self._frontend.tokenize(message, call.caller())
        token_ids = list(response.token_ids)
        about = {"count": len(token_ids), "max_model_len": response.max_model_len}
        return json_answer({**about, "tokens": token_ids, "token_strs": None})

    async def _detokenize(self, call: Call) -> web.StreamResponse:
        call.renamed = {"token_ids": "tokens", "tokens": "tokens"}
        max_bytes = self._frontend.limits.max_message_bytes
        request = await call.ask(max_bytes, lambda body: read(DetokenizeRequest, body))
        check_model(request.model or "", self._frontend.model().model)
        message = inference_pb2.DetokenizeRequest(token_ids=request.tokens)
        response = await self._frontend.detokenize(message, call.caller())
        return json_answer({"prompt": response.text})

    # --- what is served, and how it is ---

    async def _models(self, _call: Call) -> web.StreamResponse:
        return json_answer({"object": "list", "data": [self._card()]})

    async def _model(self, call: Call) -> web.StreamResponse:
        asked, card = call.request.path.removeprefix(f"{MODELS}/"), self._card()
        if not asked:
            raise RefusedCall(404, "there is no model without a name", "model_not_found")
        check_model(asked, card["id"])
        return json_answer(card)

    def _card(self) -> Json:
        model = self._frontend.model()
        card = {"id": model.model, "object": "model", "created": self._created, "owned_by": "baton"}
        return card | {"root": model.model, "parent": None, "max_model_len": model.max_model_len}

    async def _health(self, _call: Call) -> web.StreamResponse:
        return json_answer({"status": "ok"})

    async def _ready(self, _call: Call) -> web.StreamResponse:
        if not self._frontend.is_ready:
            raise ClusterUnavailable("no node serves now")
        return json_answer({"status": "ready"})

    async def _version(self, _call: Call) -> web.StreamResponse:
        return json_answer({"version": _version()})

    async def _openapi(self, _call: Call) -> web.StreamResponse:
        return web.Response(body=_openapi_page(), content_type="application/json")

    async def _show_metrics(self, _call: Call) -> web.StreamResponse:
        assert self._metrics is not None
        return web.Response(body=generate_latest(self._metrics), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _show_page(page: StatusPage, call: Call) -> web.StreamResponse:
    return await page.answer(call.request.path)


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("baton")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "unknown"


@functools.cache
def _openapi_page() -> bytes:
    return json.dumps(openapi(_version())).encode()
