"""Tenants' keys and TLS of a router's ports, read at the start, and again whenever their files change."""

from __future__ import annotations

import asyncio
import logging
import ssl
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc

from router.config import RouterConfig
from router.file_watch import FileWatch
from router.tenants import Tenants, read_tenants
from router.tls import DoorTls, tls_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Locks:
    """A router's tenants and TLS; None means without."""

    tenants: Tenants | None
    tls: DoorTls | None

    @property
    def ssl_context(self) -> ssl.SSLContext | None:
        """The context for HTTP. Its certificate follows changes of the file."""
        return None if self.tls is None else self.tls.context

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Makes a gRPC server listen, with TLS if configured. Raises `RuntimeError` if the port is taken."""
        if self.tls is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, self.tls.grpc_credentials()))


async def open_locks(config: RouterConfig, stack: AsyncExitStack) -> Locks:
    """Reads the files, and watches them until `stack` closes. Raises `UnusableTenants`, `UnusableTls`."""
    tenants = await _open_tenants(Path(config.tenants_file), stack) if config.tenants_file else None
    files = tls_files(config.tls_cert, config.tls_key, config.tls_client_ca)
    tls = None
    if files is not None:
        watch = FileWatch(files.paths)
        tls = await asyncio.to_thread(DoorTls, files)
        stack.callback(asyncio.create_task(watch.run(tls.read, tls.swap)).cancel)
    elif tenants is not None and not config.is_local:
        logger.warning("event=keys_in_the_clear host=%s without TLS, who sees the network sees the keys", config.host)
    return Locks(tenants, tls)


async def _open_tenants(file: Path, stack: AsyncExitStack) -> Tenants:
    watch = FileWatch([file])
    tenants = await asyncio.to_thread(read_tenants, file)
    logger.info("event=tenants_read file=%s tenants=%d", file, len(tenants))
    stack.callback(asyncio.create_task(watch.run(lambda: read_tenants(file), tenants.replace)).cancel)
    return tenants
