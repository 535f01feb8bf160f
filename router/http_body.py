"""A call's body: read within bounds of size and time, and parsed as JSON that means one thing only.

Errors of the body as a whole name no field (`BODY`).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import HttpVersion11, web

from router.errors import InvalidRequest
from router.http_errors import BODY, RefusedCall

READ_S = 60.0  # for a whole body, from a slow client
INLINE_BYTES = 1 << 16  # bodies up to this size are parsed on the event loop
# Three bytes of JSON make an object of 64 bytes or more, so the size of a body does not bound what it takes.
MAX_OBJECTS = 1 << 17
MAX_LISTS = 1 << 20  # brackets in texts included
MAX_NAMES = 1 << 12


async def read_body(request: web.BaseRequest, max_bytes: int, read_s: float = READ_S) -> bytes:
    """All of it. Raises `RefusedCall` for one that is no JSON by its headers, too large, or too slow."""
    if request.content_type != "application/json":
        raise RefusedCall(415, "Content-Type: must be application/json", "unsupported_media_type")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise RefusedCall(415, "Content-Encoding: bodies must not be compressed", "unsupported_media_type")
    too_large = RefusedCall(413, f"the body may have {max_bytes} bytes at most", "request_too_large")
    if (request.content_length or 0) > max_bytes:
        raise too_large
    pieces, size = [], 0
    try:
        await _ask_for_it(request)
        async with asyncio.timeout(read_s):
            async for piece in request.content.iter_any():
                size += len(piece)
                if size > max_bytes:
                    raise too_large
                pieces.append(piece)
    except (web.RequestPayloadError, ConnectionError) as error:
        raise RefusedCall(400, f"the body broke off: {error}") from None
    except TimeoutError:
        raise RefusedCall(408, f"the body did not come within {read_s:g} s", "request_timeout") from None
    return b"".join(pieces)


async def _ask_for_it(request: web.BaseRequest) -> None:
    """Clients that expect a 100 (curl with a body of a MiB, for one) keep theirs back until it comes."""
    if request.version >= HttpVersion11 and request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # no answer has begun with it


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises `InvalidRequest` for anything else, and for what could be read in two ways."""
    if body.count(b"[") > MAX_LISTS:
        raise InvalidRequest(BODY, f"may have {MAX_LISTS} lists at most")
    try:
        value = json.loads(body.decode(), object_pairs_hook=_Objects().take, parse_constant=_constant)
    except UnicodeDecodeError:
        raise InvalidRequest(BODY, "must be valid UTF-8") from None
    except RecursionError:
        raise too_deep() from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(BODY, f"is no JSON: {error}") from None
    except ValueError as error:  # a number with more digits than Python converts
        raise InvalidRequest(BODY, f"is no JSON that is taken here: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(BODY, "must be a JSON object")
    return value


def too_deep() -> InvalidRequest:
    return InvalidRequest(BODY, "is nested too deeply")


class _Objects:
    """Those of one body."""

    def __init__(self) -> None:
        self._count = 0

    def take(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object of its names and values."""
        self._count += 1
        if self._count > MAX_OBJECTS:
            raise InvalidRequest(BODY, f"may have {MAX_OBJECTS} objects at most")
        if len(pairs) > MAX_NAMES:
            raise InvalidRequest(BODY, f"may have {MAX_NAMES} names in an object at most, got {len(pairs)}")
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise InvalidRequest(twice[:64], "is there twice")
        return value


def _constant(name: str) -> float:
    raise InvalidRequest(BODY, f"{name} is no JSON number")
