"""Admits only callers with the cluster token, which are its routers. An interceptor in front of all services.

Health and reflection are open: they reveal nothing secret, and a supervisor has no token.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import grpc

from kvstore.curve import is_loopback

logger = logging.getLogger(__name__)

AUTHORIZATION = "authorization"  # of a call's metadata: "Bearer TOKEN"
OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")
MIN_TOKEN_CHARS = 32
MAX_METHOD_CHARS = 128  # of a stranger's, in a log line
LOG_EVERY_S = 1.0
HEAR_OUT_S = 0.5


def new_cluster_token() -> str:
    """A secret for one cluster, as hex digits."""
    return secrets.token_hex(32)


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Admits callers that have the token, and nobody else."""

    def __init__(self, token: str) -> None:
        self._digest = _digest(f"Bearer {token}")
        self._num_refused = 0
        self._logged_s = -LOG_EVERY_S

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        if details.method.startswith(OPEN) or self._knows(details.invocation_metadata or ()):
            return await continuation(details)
        self._log(details.method)
        return _REFUSAL

    def _log(self, method: str) -> None:
        """Logs a refusal, rate limited, so that strangers cannot fill the log."""
        self._num_refused += 1
        now_s = time.monotonic()
        if now_s - self._logged_s >= LOG_EVERY_S:
            self._logged_s = now_s
            logger.warning(
                "event=refused_callers count=%d last_method=%s", self._num_refused, method[:MAX_METHOD_CHARS]
            )

    def _knows(self, metadata: tuple[tuple[str, str | bytes], ...]) -> bool:
        """Whether the metadata has the token; takes constant time, whatever was sent."""
        values = [value for name, value in metadata if name == AUTHORIZATION]
        return len(values) == 1 and hmac.compare_digest(_digest(values[0]), self._digest)


def check_lock(token: str, bind_host: str, trusts_network: bool) -> None:
    """Raises `ValueError` unless a node may listen at this address; the message never contains the token."""
    if token and (len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable() or " " in token):
        raise ValueError(f"cluster_token: must be {MIN_TOKEN_CHARS} printable ASCII characters or more, without spaces")
    if token:
        return
    if is_loopback(bind_host):
        logger.warning("event=no_cluster_token whoever is on this machine may call this node")
    elif not trusts_network:
        raise ValueError(
            f"cluster_token: needed to listen on {bind_host}, which other machines reach; trusts_network does without"
        )
    else:
        logger.warning("event=no_cluster_token whoever reaches %s may call this node", bind_host)


def _digest(value: str | bytes) -> bytes:
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).digest()


async def _refuse(_requests: object, context: grpc.aio.ServicerContext) -> None:
    with suppress(TimeoutError):  # a caller that is still writing would otherwise see an internal error of gRPC
        await asyncio.wait_for(context.read(), HEAR_OUT_S)
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"{AUTHORIZATION}: not this cluster's token")


# A stream handler for any method: it need not know its messages.
_REFUSAL = grpc.stream_stream_rpc_method_handler(_refuse)
