"""One router process: opens its parts in the order in which they need each other, and its ports last."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from kvstore.directory import Directory
from kvstore.scrape import ScrapeDoor
from router.admin import open_admin
from router.config import RouterConfig
from router.decider import Decider
from router.dispatch import Dispatcher, Persistence
from router.frontend import Frontend
from router.grpc_door import SERVICE, InferenceService, max_calls, server_options
from router.http_door import HttpDoor
from router.http_page import StatusPage
from router.limits import Turnstile
from router.locks import Locks, open_locks
from router.metrics import RouterCollector
from router.otel import open_traces
from router.registry import Registry
from router.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Requests leave hardly any cyclic garbage. By default the collector runs every dozen requests,
# and sometimes delays all others by milliseconds.
GC_THRESHOLDS = (10_000, 5, 10)


class RouterServer:
    """One router process's server: `start`, then `stop`."""

    def __init__(self, config: RouterConfig, rng: random.Random | None = None) -> None:
        self._config = config
        self._rng = rng or random.Random()
        self._health = health.aio.HealthServicer()
        self._stack = AsyncExitStack()
        self.frontend: Frontend | None = None  # while it is open
        self._admin_address = ""

    async def start(self) -> dict[str, object]:
        """Listens. Returns its addresses and what else a launcher prints.

        Raises `UnusableTokenizer`, `UnusableTenants`, `UnusableTls`, `UnusableKeys`, `UnusableTraces`, and
        `RuntimeError` if a port is taken.
        """
        async with AsyncExitStack() as stack:
            address, http_address, metrics_address = await self._open(stack)
            self._stack = stack.pop_all()
        gc.collect()
        gc.freeze()  # libraries and tokenizer stay: the collector need not traverse them
        gc.set_threshold(*GC_THRESHOLDS)
        words = address, http_address or "none", metrics_address or "none"
        logger.info("event=router_up address=%s http=%s metrics=%s", *words)
        return {
            "address": address,
            "http_address": http_address,
            "model": self._config.model,
            "cluster": self._config.cluster,
            "metrics_address": metrics_address,
            "admin_address": self._admin_address,
        }

    @property
    def is_ready(self) -> bool:
        """Whether there is a node to serve a request."""
        return self.frontend is not None and self.frontend.is_ready

    async def stop(self) -> None:
        """Refuses new requests, lets running ones end within `drain_s`, then closes. Idempotent."""
        await self._stack.aclose()

    async def _open(self, stack: AsyncExitStack) -> tuple[str, str, str]:
        """Opens the parts in the order in which they need each other; `stack` closes them in the opposite one.

        Returns the addresses of gRPC, HTTP and the metrics; "" for those that are off.
        """
        config = self._config
        tokenizer = await asyncio.to_thread(Tokenizer, Path(config.model_dir))
        locks = await open_locks(config, stack)
        directory = Directory(config.redis_url, config.cluster)
        stack.push_async_callback(directory.close)
        registry = Registry(directory, config.model, config.patience, token=config.cluster_token)
        stack.push_async_callback(registry.stop)
        await registry.start()
        persistence = Persistence(config.max_attempts, config.node_wait_s)
        decider = Decider(self._rng, config.policy)
        dispatcher = Dispatcher(registry, directory, decider, persistence)
        turnstile = Turnstile(config.max_concurrent_requests, time.monotonic)
        traces = open_traces(config.otlp_endpoint, config.model)
        stack.push_async_callback(asyncio.to_thread, traces.close)
        self.frontend = frontend = Frontend(
            config.limits, registry, dispatcher, decider, tokenizer, self._rng, locks.tenants, turnstile, traces
        )
        server = grpc.aio.server(
            options=server_options(config.limits), maximum_concurrent_rpcs=max_calls(config.max_concurrent_requests)
        )
        server.add_generic_rpc_handlers((InferenceService(frontend).handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        port = locks.add_port(server, f"{config.host}:{config.port}")
        await server.start()
        collector = RouterCollector(decider.accuracy, frontend.observer.tally, registry)
        page = StatusPage(registry, frontend.observer, directory, config.cluster, shows_ids=locks.tenants is None)
        http, http_address = await self._open_http(
            stack, frontend, collector, locks, page if config.shows_page else None
        )
        stack.push_async_callback(_drain, server, http, config.drain_s)
        self._admin_address = await open_admin(config, stack, registry, locks)
        reporting = asyncio.create_task(self._report_health(frontend))
        stack.callback(reporting.cancel)
        stack.push_async_callback(self._health.enter_graceful_shutdown)
        metrics_address = await self._open_metrics(stack, collector)
        return f"{config.advertise_host or config.host}:{port}", http_address, metrics_address

    async def _open_http(
        self,
        stack: AsyncExitStack,
        frontend: Frontend,
        collector: RouterCollector,
        locks: Locks,
        page: StatusPage | None,
    ) -> tuple[HttpDoor | None, str]:
        """The HTTP server and its address; None and "" if HTTP is off."""
        config = self._config
        if not config.http:
            return None, ""
        metrics = CollectorRegistry() if config.metrics else None
        if metrics is not None:
            metrics.register(collector)
        door = HttpDoor(frontend, metrics, page=page)
        port = await door.open(config.host, config.http_port, ssl_context=locks.ssl_context)
        stack.push_async_callback(door.close, 0.0)
        return door, f"{config.advertise_host or config.host}:{port}"

    async def _open_metrics(self, stack: AsyncExitStack, collector: RouterCollector) -> str:
        """The address of the metrics; "" if they are off."""
        config = self._config
        if not config.metrics:
            return ""
        door = ScrapeDoor()
        stack.push_async_callback(door.close)
        return await door.open(collector, config.host, config.advertise_host or config.host, config.metrics_port)

    async def _report_health(self, frontend: Frontend) -> None:
        """The process is healthy while it answers; the Inference service is, while there is a node."""
        status = health_pb2.HealthCheckResponse
        while True:
            await self._health.set(SERVICE, status.SERVING if frontend.is_ready else status.NOT_SERVING)
            await asyncio.sleep(self._config.poll_s)


async def _drain(server: grpc.aio.Server, http: HttpDoor | None, drain_s: float) -> None:
    """Drains both APIs at the same time, so that stopping a router takes one drain period."""
    closing = [server.stop(drain_s)] + ([http.close(drain_s)] if http is not None else [])
    await asyncio.gather(*closing)
