"""The NodeControl service: a node's load, and draining."""

from __future__ import annotations

import dataclasses
import logging

import grpc

from batonpb import node_pb2, node_pb2_grpc
from engine.engine import Engine
from node.admission import Admission
from node.convert import statuses
from node.intake import Intake

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who this node is."""

    node_id: str
    incarnation: str
    role: str


class NodeControlService(node_pb2_grpc.NodeControlServicer):
    """One node's control calls. A drain lasts until it is undone; a new incarnation does not start draining."""

    def __init__(self, admission: Admission, engine: Engine, intake: Intake, identity: Identity) -> None:
        self._admission = admission
        self._engine = engine
        self._intake = intake
        self._identity = identity

    async def GetLoad(self, _message: node_pb2.GetLoadRequest, context: grpc.aio.ServicerContext) -> node_pb2.Load:
        async with statuses(context):
            return await self._load()
        raise AssertionError("a status has ended the call")

    async def Drain(self, message: node_pb2.DrainRequest, context: grpc.aio.ServicerContext) -> node_pb2.Load:
        async with statuses(context):
            self._admission.is_draining = not message.undo
            logger.info("event=drain draining=%s", self._admission.is_draining)
            return await self._load()
        raise AssertionError("a status has ended the call")

    async def _load(self) -> node_pb2.Load:
        load = await self._admission.load()
        return node_pb2.Load(
            node_id=self._identity.node_id,
            incarnation=self._identity.incarnation,
            role=self._identity.role,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            queued_prefill_tokens=load.queued_prefill_tokens,
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            draining=self._admission.is_draining,
            steps=node_pb2.StepTiming(**dataclasses.asdict(self._engine.timing)),
            fetches=self._intake.message(),
        )
