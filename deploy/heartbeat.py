"""Reports to the registry, once a second, that a node is alive and how loaded it is; and answers health checks.

Health has two levels: the server as a whole (""; not serving means unhealthy: end the process), and the two leg
services (not serving means: send nothing, it is draining or unhealthy).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging

from grpc_health.v1 import health, health_pb2

from batonpb import node_pb2
from engine.loop import EngineLoop
from kvstore.client import KVClient
from kvstore.directory import Directory, NodeRecord
from kvstore.errors import DirectoryUnavailable
from node.admission import Admission

logger = logging.getLogger(__name__)

LEG_SERVICES = tuple(node_pb2.DESCRIPTOR.services_by_name[name].full_name for name in ("Prefill", "Decode"))


class Heartbeat:
    """One node's heartbeat. `record` is always the newest one; at first it has only what does not change."""

    def __init__(  # noqa: PLR0913
        self,
        record: NodeRecord,
        loop: EngineLoop,
        admission: Admission,
        store: KVClient,
        directory: Directory,
        health: health.aio.HealthServicer,
    ) -> None:
        self.record = record
        self._loop = loop
        self._admission = admission
        self._store = store
        self._directory = directory
        self._health = health
        self._is_heard = True
        self._is_over = asyncio.Event()

    async def run(self, every_s: float, ttl_s: float, stall_s: float) -> None:
        """Beats until `leave`."""
        while not self._is_over.is_set():
            try:
                await self.beat(every_s, ttl_s, stall_s)
            except Exception:  # without this task the node would be forgotten, however well it is
                logger.exception("event=beat_failed node=%s", self.record.node_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await self._is_over.wait()

    async def beat(self, wait_s: float, ttl_s: float, stall_s: float) -> None:
        """One beat. It does not wait for an engine in a long step: then the load is that of the last beat."""
        try:
            async with asyncio.timeout(wait_s):
                load = dataclasses.asdict(await self._admission.load())
        except TimeoutError:
            load = {}
        is_sick = self._loop.stalled_s > stall_s
        self.record = dataclasses.replace(
            self.record,
            **load,
            arena_id=self._store.local_arena_id,
            draining=self._admission.is_draining or is_sick,
        )
        await self._tell_health(is_sick)
        await self._tell_registry(ttl_s)

    async def leave(self, beating: asyncio.Task[None]) -> None:
        """Ends `run`, then removes this incarnation from the registry; in this order, or a last beat would undo it."""
        self._is_over.set()
        await beating
        try:
            await self._directory.remove_node(self.record.node_id, self.record.incarnation)
        except DirectoryUnavailable:
            logger.info("event=leave_unheard node=%s", self.record.node_id)  # its record runs out by itself

    async def _tell_registry(self, ttl_s: float) -> None:
        try:
            await self._directory.heartbeat_node(self.record, ttl_s)
        except DirectoryUnavailable as error:
            if self._is_heard:
                logger.warning("event=heartbeat_unheard node=%s error=%r", self.record.node_id, str(error))
            self._is_heard = False
        else:
            if not self._is_heard:
                logger.warning("event=heartbeat_heard_again node=%s", self.record.node_id)
            self._is_heard = True

    async def _tell_health(self, is_sick: bool) -> None:
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", not_serving if is_sick else serving)
        for service in LEG_SERVICES:
            await self._health.set(service, not_serving if self.record.draining else serving)
