"""Chooses the client that a run needs."""

from __future__ import annotations

import resource
from collections.abc import Callable

from loadtest.config import BenchConfig
from loadtest.exchange import Client


def client_maker(config: BenchConfig) -> Callable[[], Client]:
    """Makes a client for the backend; each import is slow, and only one is needed."""
    if config.backend == "grpc":
        from loadtest.grpc_client import GrpcClient

        return lambda: GrpcClient(config.target, config.sampling)
    from loadtest.http_client import HttpClient

    _allow_many_connections()
    is_chat = config.backend == "openai-chat"
    return lambda: HttpClient(config.target, is_chat, config.model, config.sampling)


def _allow_many_connections() -> None:
    """Raises the limit of open files as far as allowed, as each HTTP request in flight has a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
