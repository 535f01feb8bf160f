"""The live page at `/`: three files of this package, and `/state`, which they poll. No text of any request is shown.

Nothing is loaded from elsewhere and nothing may be: the page's own security policy says so to the browser.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from importlib import resources

from aiohttp import web

from kvstore.directory import ArenaRecord, Directory
from kvstore.errors import DirectoryUnavailable
from router.observer import Observer
from router.registry import Registry
from router.state import Json, last_answers, node_state, series, store_state, totals

logger = logging.getLogger(__name__)

FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
STATE = "/state"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
FRESH_S = 0.5  # however many look, the state is put together so often
STORES_S = 2.0  # and Redis is asked for the stores so often


class StatusPage:
    """The page of one router. `shows_ids`: requests by their names, which whoever sees the page may then ask after."""

    def __init__(
        self, registry: Registry, observer: Observer, directory: Directory, cluster: str, shows_ids: bool
    ) -> None:
        self._registry = registry
        self._observer = observer
        self._directory = directory
        self._cluster = cluster
        self._shows_ids = shows_ids
        self._up_s = time.time()
        self._state = b""
        self._made_s = self._asked_s = -1e9  # monotonic
        self._stores: list[ArenaRecord] = []
        self._files: Mapping[str, tuple[bytes, str]] = {
            path: (resources.files("router").joinpath("page", name).read_bytes(), kind)
            for path, (name, kind) in FILES.items()
        }

    @property
    def paths(self) -> tuple[str, ...]:
        return (*self._files, STATE)

    async def answer(self, path: str) -> web.Response:
        """`path` is one of `paths`."""
        if path == STATE:
            return web.Response(body=await self._show_state(), content_type="application/json", headers=HEADERS)
        body, kind = self._files[path]
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)

    async def _show_state(self) -> bytes:
        if time.monotonic() - self._made_s >= FRESH_S:
            await self._look_for_stores()
            self._state = json.dumps(self.state(), separators=(",", ":")).encode()
            self._made_s = time.monotonic()
        return self._state

    def state(self) -> Json:
        now_s, pool = time.time(), self._registry.pool
        return {
            "model": pool.model if pool is not None else "",
            "cluster": self._cluster,
            "now_s": round(now_s, 3),
            "up_s": round(now_s - self._up_s, 1),
            "totals": totals(self._observer.tally),
            "nodes": [node_state(node, time.monotonic()) for node in self._registry.nodes],
            "stores": [store_state(arena) for arena in self._stores],
            "answers": last_answers(self._observer.recent.answers, self._shows_ids),
            "series": series(self._observer.recent, now_s),
        }

    async def _look_for_stores(self) -> None:
        """Those that were there last, where Redis is away."""
        if time.monotonic() - self._asked_s < STORES_S:
            return
        self._asked_s = time.monotonic()
        try:
            self._stores = sorted(await self._directory.arenas(), key=lambda arena: (arena.host, arena.arena_id))
        except DirectoryUnavailable as error:
            logger.debug("event=stores_unknown error=%r", str(error))
