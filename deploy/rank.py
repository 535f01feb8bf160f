"""A rank of a wide node other than its leader: its part of the model, its machine's store, a service for the leader.

It lives and dies with its leader: a rank whose group broke ends its process, as does one that was told to stop, and a
supervisor restarts it for the group's next life.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import grpc

from batonpb import rank_pb2_grpc
from deploy.cores import hold_to, running_on
from deploy.meeting import join
from deploy.node import cores_of, gates, server_options
from deploy.node_config import NodeConfig
from engine.follower import Follower
from engine.parallel import RankGroup
from kvstore.client import KVClient
from kvstore.directory import Directory
from kvstore.errors import DirectoryUnavailable
from node.gate import check_lock
from node.intake import Intake
from node.rank_service import RankService
from node.replicator import Replicator

logger = logging.getLogger(__name__)

GRACE_S = 5.0  # for the leader's last word, behind its drain


class RankServer:
    """A rank from `start` to `stop`, in a process of its own, which the end of its group ends."""

    def __init__(self, config: NodeConfig, report: Callable[[float], object] = lambda part: None) -> None:
        """`config` is the leader's, except for `rank`, the machine's addresses and folder, and the cores."""
        self.config = config
        self._report = report
        self._stack = AsyncExitStack()
        self._is_stopping = False
        self._group_ended = asyncio.Event()

    async def start(self) -> dict[str, Any]:
        """Meets the others, loads, listens, follows. Raises `NobodyMet`, and what `NodeServer.start` does."""
        async with AsyncExitStack() as stack:
            record = await self._open(stack)
            self._stack = stack.pop_all()
        gc.collect()
        gc.freeze()
        self._report(1.0)
        return record

    async def stop(self) -> None:
        """Waits for the leader's drain, for as long as that may take, then leaves. Idempotent."""
        self._is_stopping = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_s + GRACE_S):
                await self._group_ended.wait()
        await self._stack.aclose()

    async def _open(self, stack: AsyncExitStack) -> dict[str, Any]:
        config, cores = self.config, cores_of(self.config)
        check_lock(config.cluster_token, config.bind_host, config.trusts_network)
        directory = Directory(config.redis_url, config.cluster)
        stack.push_async_callback(directory.close)
        with suppress(DirectoryUnavailable):
            await directory.check_scheme()
        group = await join(config)
        if group is None:
            raise ValueError("rank: a node of one rank has none that follows")
        server = grpc.aio.server(interceptors=gates(config), options=server_options(config))
        port = server.add_insecure_port(f"{config.bind_host}:0")  # `config.port` is the node's, which the leader has
        address = f"{config.advertise_host}:{port}"
        group.post(address)
        follower = await asyncio.to_thread(self._load, group, cores)
        slot_bytes, local_dir = follower.layout.block_bytes, Path(config.store_dir) if config.store_dir else None
        store = KVClient(directory, slot_bytes, local_dir, wire_key=config.wire_key)
        stack.push_async_callback(store.close)
        await store.open()
        replicator = Replicator(store, None, slot_bytes)
        stack.push_async_callback(replicator.close)
        block_size, pieces = follower.layout.block_size, follower.pieces.numbers
        intake = Intake(
            store, block_size, slot_bytes, pieces=pieces, replicator=replicator if follower.is_writer else None
        )
        rank_pb2_grpc.add_RankServicer_to_server(RankService(follower, store, intake), server)  # type: ignore[no-untyped-call]
        await server.start()
        stack.push_async_callback(server.stop, None)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._follow, args=(follower, cores, loop), name="rank", daemon=True).start()
        logger.info("event=rank_up node=%s rank=%d address=%s", config.node_id, config.rank, address)
        return {"node_id": config.node_id, "rank": config.rank, "address": address}

    def _load(self, group: RankGroup, cores: tuple[int, ...]) -> Follower:
        config = self.config
        num_threads = config.engine.num_threads or len(cores)
        with running_on(cores):
            engine = dataclasses.replace(config.engine, num_threads=num_threads)
            return Follower(Path(config.model_dir), engine, group)

    def _follow(self, follower: Follower, cores: tuple[int, ...], loop: asyncio.AbstractEventLoop) -> None:
        hold_to(cores)
        status = 0
        try:
            follower.run()
        except BaseException as error:
            logger.critical("event=rank_dies node=%s rank=%d error=%r", self.config.node_id, self.config.rank, error)
            status = 1
        if not self._is_stopping:
            logging.shutdown()
            os._exit(status)
        loop.call_soon_threadsafe(self._group_ended.set)
