"""One node as a router sees it: its last record, its connection, and this router's legs on it. Decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from batonpb import node_pb2_grpc
from kvstore.directory import NodeRecord
from router.legs import Burden, Callee, DecodeLeg, Leg, PrefillLeg
from router.policy import NodeView, Rates

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 2**20),
    # A node that comes back is to be reached within a second, not after gRPC's patient default.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]
REST_S = 10.0  # a node that ran nothing for so long is to be measured again
LegT = TypeVar("LegT", bound=Leg)


class Node:
    """One node process, as seen from here: its last record, its connection, and this router's legs on it."""

    def __init__(self, record: NodeRecord, now_s: float) -> None:
        self.record = record
        self.seen_s = now_s
        self.busy_s = now_s
        self.step_s = _single_step_s(record)
        self.down_since_s: float | None = None
        self.asked_s = now_s  # when its health was known last
        self.asking: asyncio.Task[None] | None = None
        self.legs: set[Leg] = set()
        self._channel = grpc.aio.insecure_channel(record.address, options=CHANNEL_OPTIONS)
        self._prefill = node_pb2_grpc.PrefillStub(self._channel).Prefill  # type: ignore[no-untyped-call]
        self._decode = node_pb2_grpc.DecodeStub(self._channel).Decode  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def update(self, record: NodeRecord, now_s: float, last_poll_s: float) -> None:
        """Takes a new record. One that differs was written after the last poll, so it counts what was sent before."""
        self.seen_s = now_s
        if self.legs or record.num_running:
            self.busy_s = now_s
        if record == self.record:
            return
        self.record = record
        if record.num_running or not self.step_s:  # of an idle node, what it did last says little
            self.step_s = _single_step_s(record)
        for leg in self.legs:
            leg.is_reported = leg.is_reported or leg.sent_s < last_poll_s

    def view(self) -> NodeView:
        """What the policy is to know of this node now."""
        record = self.record
        sent = [leg.burden for leg in self.legs if not leg.is_reported]
        return NodeView(
            node_id=record.node_id,
            role=record.role,
            block_size=record.block_size,
            block_bytes=record.block_bytes,
            max_model_len=record.max_model_len,
            arena_id=record.arena_id,
            num_requests=record.num_running + record.num_waiting + len(sent),
            queued_prefill_tokens=record.queued_prefill_tokens + sum(burden.prefill_tokens for burden in sent),
            free_blocks=max(0, record.free_blocks - sum(burden.blocks for burden in sent)),
            total_blocks=record.total_blocks,
            prefill_tokens_per_s=record.prefill_tokens_per_s,
            step_s=self.step_s,
            is_rested=self.seen_s - self.busy_s > REST_S,
        )

    def prefill_leg(self, burden: Burden, clock: Callable[[], float]) -> AbstractContextManager[PrefillLeg]:
        """A leg to `run` inside the context."""
        return self._kept(PrefillLeg(self._callee(self._prefill), burden, clock))

    def decode_leg(self, burden: Burden, clock: Callable[[], float]) -> AbstractContextManager[DecodeLeg]:
        """A leg to `admit` and `start` inside the context."""
        return self._kept(DecodeLeg(self._callee(self._decode), burden, clock))

    async def illness(self, timeout_s: float) -> str:
        """Why this node should get no work; "" where it is well."""
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND):
                return ""  # it answers, and that is what was asked
            return f"health: {error.code().name}: {error.details()}"
        return "" if answer.status == health_pb2.HealthCheckResponse.SERVING else "health: not serving"

    def break_off(self, problem: str) -> None:
        for leg in list(self.legs):
            leg.break_off(problem)

    async def close(self) -> None:
        if self.asking is not None:
            self.asking.cancel()
        await self._channel.close()

    def _callee(self, method: Any) -> Callee:
        return Callee(self.record.node_id, self.record.incarnation, method)

    @contextmanager
    def _kept(self, leg: LegT) -> Iterator[LegT]:
        """Keeps the books: a leg counts from here to the end of the context, however that is left."""
        self.legs.add(leg)
        self.busy_s = leg.sent_s
        try:
            yield leg
        finally:
            leg.close()
            self.legs.discard(leg)


def _single_step_s(record: NodeRecord) -> float:
    """What a decode step of a single request takes, out of the one that was measured; 0.0 where none was."""
    return record.decode_step_s / (1.0 + Rates.step_slope * max(0, record.num_running - 1))
