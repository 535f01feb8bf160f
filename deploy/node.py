"""One node: an engine, its two workers and their services, on one gRPC server, announced by a heartbeat.

Starts and stops the parts in order. A node whose engine fails ends its process: a supervisor restarts it as a new
incarnation, and meanwhile routers continue its requests elsewhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import socket
import uuid
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from batonpb import node_pb2, node_pb2_grpc
from decode_node.service import DecodeService
from decode_node.worker import DecodeWorker
from deploy.cores import allowed_cores, hold_to, running_on, share
from deploy.heartbeat import Heartbeat
from deploy.meeting import join
from deploy.node_config import NodeConfig
from deploy.node_metrics import NodeCollector
from deploy.rank_metrics import RankCollector
from engine.engine import Engine
from engine.loop import EngineLoop
from engine.parallel import RankGroup
from grammar.compiler import Compiler
from kvstore.client import KVClient
from kvstore.directory import Directory, NodeRecord
from kvstore.errors import DirectoryUnavailable
from kvstore.scrape import ScrapeDoor
from node.admission import Admission
from node.control import Identity, NodeControlService
from node.gate import Gate, check_lock
from node.grammar import GrammarMasks
from node.intake import Intake
from node.publisher import Publisher
from node.ranks import Ranks
from node.replicator import Replicator
from prefill_node.service import PrefillService
from prefill_node.worker import PrefillWorker

__all__ = ["NodeConfig", "NodeServer", "cores_of", "server_options"]

logger = logging.getLogger(__name__)

CANCEL_GRACE_S = 0.5  # for calls that are still there when the drain is over


class NodeServer:
    """A node from `start` to `stop`. Its process is its own: a failure of the engine ends it."""

    def __init__(self, config: NodeConfig, report: Callable[[float], object] = lambda part: None) -> None:
        """`report` gets the fraction of the start that is done, and may be called on another thread."""
        self.config = config
        self._report = report
        self._incarnation = uuid.uuid4().hex
        self._health = health.aio.HealthServicer()
        self._stack = AsyncExitStack()

    async def start(self) -> NodeRecord:
        """Loads the model, warms up, listens, joins the registry (once Redis is there). Returns what it registered.

        Raises `UnsupportedModel`, `OSError` if the model's files are missing, `RuntimeError` for a port in use,
        `OtherScheme` if the cluster names blocks differently, `ValueError` if anybody could call it.
        """
        async with AsyncExitStack() as stack:  # a failure half-way closes what is open already
            await self._open(stack)
            self._stack = stack.pop_all()
        gc.collect()
        gc.freeze()  # torch and the model stay: the collector need not walk over their objects between steps
        record = self._heartbeat.record
        logger.info("event=node_up node=%s role=%s address=%s", record.node_id, record.role, record.address)
        return record

    async def stop(self) -> None:
        """Refuses new requests, lets running ones end within `drain_s`, leaves the registry. Idempotent."""
        await self._stack.aclose()

    async def _open(self, stack: AsyncExitStack) -> None:
        """Opens the parts in the order in which they need each other; `stack` closes them in the opposite one."""
        config = self.config
        check_lock(config.cluster_token, config.bind_host, config.trusts_network)
        # 1. The store's client.
        directory = Directory(config.redis_url, config.cluster)
        stack.push_async_callback(directory.close)
        with suppress(DirectoryUnavailable):  # readers of its record check that too
            await directory.check_scheme()
        cores = cores_of(config)
        group = await join(config)
        engine = await asyncio.to_thread(_load, config, cores, group)
        stack.push_async_callback(asyncio.to_thread, engine.close)
        local_dir = Path(config.store_dir) if config.store_dir else None
        store = KVClient(directory, engine.layout.block_bytes, local_dir, wire_key=config.wire_key)
        stack.push_async_callback(store.close)
        await store.open()
        # 2. The engine's thread, and who may hand it what.
        self.loop = loop = EngineLoop(engine, _die)
        loop.start()
        loop.post(lambda _: hold_to(cores))  # first of all: the OpenMP workers that this thread makes inherit it
        stack.push_async_callback(loop.stop)
        engine.watch_ranks(_die)  # also where the warm-up takes long: to the others, silence is the leader's end
        await loop.call(lambda engine: engine.warm_up(self._on_warm_up))
        load = await loop.call(Engine.load)
        ranks = await _open_ranks(stack, loop, group, config)
        publisher = Publisher(loop, store, load.total_blocks, ranks)
        stack.push_async_callback(publisher.flush)
        replicator = Replicator(store, publisher, engine.layout.block_bytes, load.total_blocks // 4)
        stack.push_async_callback(replicator.close)
        self.admission = Admission(loop, config.max_queued_requests, config.room_wait_s)
        self.publisher = publisher
        self.intake = intake = Intake(
            store,
            engine.layout.block_size,
            engine.layout.block_bytes,
            engine.long_prefill_tokens_per_s,
            replicator=replicator,
            pieces=engine.pieces.numbers,
            ranks=ranks,
        )
        masks = GrammarMasks(Compiler(Path(config.model_dir), sorted(engine.eos_token_ids), engine.vocab_size))
        # 3. The server, and the heartbeat that tells where it is.
        server = self._server(
            PrefillService(PrefillWorker(loop, intake, publisher, self.admission), engine, masks),
            DecodeService(DecodeWorker(loop, intake, publisher, self.admission), engine, masks, config.start_wait_s),
        )
        port = server.add_insecure_port(f"{config.bind_host}:{config.port}")
        await server.start()
        stack.push_async_callback(server.stop, CANCEL_GRACE_S)
        record = self._record(engine, f"{config.advertise_host}:{port}", await self._open_metrics(stack))
        self._heartbeat = Heartbeat(record, loop, self.admission, store, directory, self._health)
        await self._beat()
        beating = asyncio.create_task(self._heartbeat.run(config.heartbeat_s, config.ttl_s, config.stall_s))
        stack.push_async_callback(self._heartbeat.leave, beating)
        stack.push_async_callback(self._drain)

    def _on_warm_up(self, done: int, total: int) -> None:
        """Reports progress; loading is done by then, and counts as the first step of the start."""
        logger.info("event=warm_up node=%s done=%d total=%d", self.config.node_id, done, total)
        self._report((1 + done) / (1 + total))

    def _server(self, prefill: PrefillService, decode: DecodeService) -> grpc.aio.Server:
        config = self.config
        server = grpc.aio.server(interceptors=gates(config), options=server_options(config))
        identity = Identity(config.node_id, self._incarnation, config.role)
        control = NodeControlService(self.admission, self.loop.engine, self.intake, identity)
        node_pb2_grpc.add_PrefillServicer_to_server(prefill, server)  # type: ignore[no-untyped-call]
        node_pb2_grpc.add_DecodeServicer_to_server(decode, server)  # type: ignore[no-untyped-call]
        node_pb2_grpc.add_NodeControlServicer_to_server(control, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        services = [service.full_name for service in node_pb2.DESCRIPTOR.services_by_name.values()]
        services += [health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(services, server)
        return server

    async def _open_metrics(self, stack: AsyncExitStack) -> str:
        """The address of the metrics; "" if they are off."""
        if not self.config.metrics:
            return ""
        door = ScrapeDoor()
        stack.push_async_callback(door.close)
        intake, engine, ranks = self.intake, self.loop.engine, self.intake.ranks
        of_ranks = RankCollector(engine, intake, self.publisher, ranks) if ranks is not None else None
        collector = NodeCollector(intake, engine, lambda: self._heartbeat.record, of_ranks)
        config = self.config
        return await door.open(collector, config.bind_host, config.advertise_host, config.metrics_port)

    def _record(self, engine: Engine, address: str, metrics_address: str) -> NodeRecord:
        return NodeRecord(
            node_id=self.config.node_id,
            incarnation=self._incarnation,
            role=self.config.role,
            address=address,
            model=self.config.model,
            kv_root=engine.layout.root().hex(),
            block_size=engine.layout.block_size,
            block_bytes=engine.layout.block_bytes * engine.layout.num_pieces,
            vocab_size=engine.vocab_size,
            max_model_len=engine.max_model_len,
            host=self.config.host or socket.gethostname(),
            metrics_address=metrics_address,
        )

    async def _beat(self) -> None:
        await self._heartbeat.beat(self.config.heartbeat_s, self.config.ttl_s, self.config.stall_s)

    async def _drain(self) -> None:
        self.admission.is_draining = True
        await self._beat()  # so that routers stop at once
        try:
            async with asyncio.timeout(self.config.drain_s):
                await self.admission.idle()
        except TimeoutError:
            logger.warning("event=drain_cut_short requests=%d", len(self.admission.requests))


def gates(config: NodeConfig) -> tuple[Gate, ...]:
    """The gate that admits callers; none if whoever reaches the port may call."""
    return (Gate(config.cluster_token),) if config.cluster_token else ()


def server_options(config: NodeConfig) -> list[tuple[str, int]]:
    """Options of the gRPC server of a node, or of one of its ranks."""
    return [
        ("grpc.so_reuseport", 0),  # a second node on the same port is an error, not a lottery
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # A router that vanished without a word is found out, and the room of its requests is freed.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ]


async def _open_ranks(
    stack: AsyncExitStack, loop: EngineLoop, group: RankGroup | None, config: NodeConfig
) -> Ranks | None:
    """Channels to the other ranks; None for a node of one rank."""
    if group is None:
        return None
    addresses = await asyncio.to_thread(group.addresses)
    ranks = Ranks(loop, [grpc.aio.insecure_channel(address) for address in addresses], _die, config.cluster_token)
    ranks.watch(config.rank_timeout_s)
    stack.push_async_callback(ranks.close)
    return ranks


def cores_of(config: NodeConfig) -> tuple[int, ...]:
    """The cores that this node computes on, the same at each start; (): any."""
    if not config.num_core_shares:
        return ()
    cores = share(allowed_cores(), config.core_share, config.num_core_shares)
    if len(cores) < max(1, config.engine.num_threads):
        threads, shares = config.engine.num_threads, config.num_core_shares
        logger.warning("event=not_pinned node=%s cores=%s threads=%d shares=%d", config.node_id, cores, threads, shares)
        return ()
    logger.info("event=pinned node=%s cores=%s", config.node_id, cores)
    return cores


def _load(config: NodeConfig, cores: Sequence[int], group: RankGroup | None) -> Engine:
    """Loads the engine, also on `cores`, because memory is placed near the core that touches it first."""
    num_threads = config.engine.num_threads or len(cores)
    with running_on(cores):
        options = dataclasses.replace(config.engine, num_threads=num_threads)
        return Engine.from_pretrained(Path(config.model_dir), options, group)


def _die(error: BaseException) -> None:
    """Called on the engine's thread when it failed: ends the process, as half a node is worse than none."""
    logger.critical("event=node_dies error=%r", error)
    logging.shutdown()
    os._exit(1)
