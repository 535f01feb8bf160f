"""The admin service: lists nodes and drains them. gRPC, at a port of its own.

Without admin keys it listens on the loopback interface only, where everybody on this machine may use it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc

from batonpb import admin_pb2, admin_pb2_grpc
from router.admin_keys import check_key, read_admin_keys
from router.config import RouterConfig, is_loopback
from router.errors import Unauthenticated
from router.locks import Locks
from router.nodes import Node
from router.registry import Registry
from router.tenants import AUTHORIZATION

logger = logging.getLogger(__name__)

NODE_TIMEOUT_S = 5.0


class AdminService(admin_pb2_grpc.AdminServicer):
    """`digests` are the SHA-256 of the admin keys; if empty, no key is needed."""

    def __init__(self, registry: Registry, digests: Sequence[bytes]) -> None:
        self._registry = registry
        self._digests = digests

    async def ListNodes(
        self, _message: admin_pb2.ListNodesRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.ListNodesResponse:
        async with self._authenticated(context):
            nodes = self._registry.nodes
            return admin_pb2.ListNodesResponse(nodes=map(_status, nodes))
        raise AssertionError("an aborted call goes on")

    async def DrainNode(
        self, message: admin_pb2.DrainNodeRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.NodeStatus:
        async with self._authenticated(context):
            found = [node for node in self._registry.nodes if node.record.node_id == message.node_id]
            if not found:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"node_id: there is no node {message.node_id!r}")
            try:
                is_draining = await found[0].drain(message.undo, NODE_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                problem = f"{message.node_id}: {error.code().name}: {error.details()}"
                await context.abort(grpc.StatusCode.UNAVAILABLE, problem)
            logger.warning("event=drain node_id=%s draining=%s", message.node_id, is_draining)
            status = _status(found[0])
            status.draining = is_draining  # as its next heartbeat will say, too
            return status
        raise AssertionError("an aborted call goes on")

    @asynccontextmanager
    async def _authenticated(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        metadata = context.invocation_metadata() or ()
        try:
            check_key([value for name, value in metadata if name.lower() == AUTHORIZATION], self._digests)
        except Unauthenticated as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        yield


async def open_admin(config: RouterConfig, stack: AsyncExitStack, registry: Registry, locks: Locks) -> str:
    """Its address; "" if it is closed. Raises `UnusableKeys`, or `ValueError` if it would be open to the network."""
    if config.admin_port < 0:
        return ""
    digests = read_admin_keys(Path(config.admin_key_file)) if config.admin_key_file else []
    if not digests and not is_loopback(config.admin_host):
        raise ValueError(f"admin_host: {config.admin_host} needs an admin_key_file; without, only loopback is possible")
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 1 << 16)])
    admin_pb2_grpc.add_AdminServicer_to_server(  # type: ignore[no-untyped-call]
        AdminService(registry, digests), server
    )
    port = locks.add_port(server, f"{config.admin_host}:{config.admin_port}")
    await server.start()
    stack.push_async_callback(server.stop, 0.0)
    return f"{config.admin_host}:{port}"


def _status(node: Node) -> admin_pb2.NodeStatus:
    record = node.record
    return admin_pb2.NodeStatus(
        node_id=record.node_id,
        role=record.role,
        address=record.address,
        incarnation=record.incarnation,
        draining=record.draining,
        down=node.down_since_s is not None,
        num_running=record.num_running,
        num_waiting=record.num_waiting,
        queued_prefill_tokens=record.queued_prefill_tokens,
        free_blocks=record.free_blocks,
        total_blocks=record.total_blocks,
        num_legs=len(node.legs),
    )
