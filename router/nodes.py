"""One node as a router sees it: its last record, its connection, and this router's legs on it. Makes no decisions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from batonpb import node_pb2, node_pb2_grpc
from kvstore.directory import NodeRecord
from router.backlog import Backlog
from router.calls import DecodeCalls
from router.cluster import NodeView
from router.legs import Burden, Callee, DecodeLeg, Leg, Metadata, PrefillLeg, Work
from router.speeds import GUESSED_PREFILL, GUESSED_STEP, NodeSpeeds, PrefillSpeed, StepSpeed
from router.tenants import AUTHORIZATION

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 2**20),
    # A node that comes back must be reachable within a second, not after gRPC's long default.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]
REST_S = 10.0  # a node that ran nothing for this long must be measured again
LegT = TypeVar("LegT", bound=Leg)


class Node:
    """One node process, as seen from here: its last record, its connection, and this router's legs on it."""

    def __init__(self, record: NodeRecord, now_s: float, token: str = "") -> None:
        """`token` is sent with each call except health checks."""
        self.record = record
        self.seen_s = now_s
        self.busy_s = now_s
        self.speeds = NodeSpeeds()
        self.in_use: tuple[PrefillSpeed, StepSpeed] = GUESSED_PREFILL, GUESSED_STEP
        self._backlog = Backlog()
        self._is_news = True  # the record has not been processed yet
        self.down_since_s: float | None = None
        self.asked_s = now_s  # when its health was last known
        self.asking: asyncio.Task[None] | None = None
        self.legs: set[Leg] = set()
        self._channel = grpc.aio.insecure_channel(record.address, options=CHANNEL_OPTIONS)
        prefill = node_pb2_grpc.PrefillStub(self._channel)  # type: ignore[no-untyped-call]
        decode = node_pb2_grpc.DecodeStub(self._channel)  # type: ignore[no-untyped-call]
        control = node_pb2_grpc.NodeControlStub(self._channel)  # type: ignore[no-untyped-call]
        metadata: Metadata = ((AUTHORIZATION, f"Bearer {token}"),) if token else None
        self._prefill = partial(_called, prefill.Prefill, metadata)
        self._decode_calls = DecodeCalls(partial(_called, decode.Decode, metadata))
        self._drain = partial(control.Drain, metadata=metadata)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def update(self, record: NodeRecord, now_s: float, last_poll_s: float) -> None:
        """Takes a new record. If it differs, it was written after the last poll, and includes what was sent before."""
        self.seen_s = now_s
        if self.legs or record.num_running:
            self.busy_s = now_s
        if record.draining:
            self._decode_calls.clear()  # a stopping node waits for them
        if record == self.record:
            return
        self.record, self._is_news = record, True
        for leg in self.legs:
            leg.is_reported = leg.is_reported or leg.sent_s < last_poll_s

    @property
    def state(self) -> Literal["up", "draining", "down"]:
        """Whether it can be given work: not while it is draining, nor while it does not answer."""
        if self.down_since_s is not None:
            return "down"
        return "draining" if self.record.draining else "up"

    def learn(self) -> None:
        """Takes the node's speeds from its last record. To be called before all nodes' speeds are compared."""
        record = self.record
        if self._is_news:
            self.speeds.reported(record.prefill_tokens_per_s, record.decode_step_s, record.num_running)
        if self.seen_s - self.busy_s > REST_S:
            self.speeds.rest()
        else:
            self.speeds.is_rested = False

    def reckon(self, prefill: PrefillSpeed, step: StepSpeed, now_s: float) -> None:
        """Sets the speeds to use from now on, and computes from them the seconds of the queue in the last record."""
        self.in_use = prefill, step
        if self._is_news:
            self._is_news = False
            record = self.record
            self._backlog.reported(now_s, prefill.queue_seconds(record.queued_prefill_tokens, record.num_waiting))
            for leg in self.legs:
                if leg.is_reported:
                    self._backlog.counted(leg)

    def computed(self, leg: Leg, work: Work, now_s: float) -> None:
        """A leg has its first token: nothing of it is queued any more, and it is a measurement of this node's speed."""
        self._backlog.computed(leg, now_s)
        prefill, step = self.in_use
        self.speeds.computed(work.uncached_tokens, work.cached_tokens, work.seconds, prefill)
        self.in_use = self.speeds.prefill() or prefill, step

    def view(self) -> NodeView:
        """This node as a policy sees it now."""
        record = self.record
        sent = [leg.burden for leg in self.legs if not leg.is_reported]
        prefill, step = self.in_use
        return NodeView(
            node_id=record.node_id,
            role=record.role,
            prefill=prefill,
            step=step,
            arena_id=record.arena_id,
            free_at_s=self._backlog.free_at_s(),
            line=self._backlog.line(),
            num_requests=record.num_running + record.num_waiting + len(sent),
            free_blocks=max(0, record.free_blocks - sum(burden.blocks for burden in sent)),
            total_blocks=record.total_blocks,
            max_model_len=record.max_model_len,
            is_known=self.speeds.is_known(record.role),
        )

    def prefill_leg(self, burden: Burden, clock: Callable[[], float]) -> AbstractContextManager[PrefillLeg]:
        """A leg to `run` inside the context."""
        return self._kept(PrefillLeg(self._callee(), burden, clock, self._prefill))

    def decode_leg(self, burden: Burden, clock: Callable[[], float]) -> AbstractContextManager[DecodeLeg]:
        """A leg to `admit` and `start` inside the context."""
        return self._kept(DecodeLeg(self._callee(), burden, clock, self._decode_calls))

    async def illness(self, timeout_s: float) -> str:
        """Why this node should get no work; "" if it is healthy."""
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND):
                return ""  # it answers, and that was the question
            return f"health: {error.code().name}: {error.details()}"
        return "" if answer.status == health_pb2.HealthCheckResponse.SERVING else "health: not serving"

    async def drain(self, undo: bool, timeout_s: float) -> bool:
        """Starts or undoes a drain; returns whether the node is draining now. Raises `grpc.aio.AioRpcError`."""
        load = await self._drain(node_pb2.DrainRequest(undo=undo), timeout=timeout_s)
        return bool(load.draining)

    def break_off(self, problem: str) -> None:
        for leg in list(self.legs):
            leg.break_off(problem)

    async def close(self) -> None:
        if self.asking is not None:
            self.asking.cancel()
        self._decode_calls.clear()
        await self._channel.close()

    def _callee(self) -> Callee:
        return Callee(self.record.node_id, self.record.incarnation)

    @contextmanager
    def _kept(self, leg: LegT) -> Iterator[LegT]:
        """Counts a leg until the end of the context, however that is left."""
        self.legs.add(leg)
        self.busy_s = leg.sent_s
        if leg.burden.compute_s:
            self._backlog.sent(leg, leg.sent_s, leg.burden.compute_s)
        try:
            yield leg
        finally:
            leg.close()
            self.legs.discard(leg)
            self._backlog.over(leg)


def _called(method: Any, own: Metadata, *arguments: Any, metadata: Metadata = None, **options: Any) -> Any:
    """Calls a method with metadata of its own in addition to the caller's."""
    both = (*(own or ()), *(metadata or ()))
    return method(*arguments, metadata=both or None, **options)
