"""One leg in flight: its call, what it holds on its node, and how its end is told apart.

A leg ends well, is refused, fails, or is broken off from outside when its node hangs. Foreign errors are mapped here,
once; what follows from them is the dispatcher's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import grpc

from batonpb import common_pb2, node_pb2
from router.errors import InvalidRequest, LegFailed, LegRefused

# What gRPC's core says where no connection could be made; where it says anything else, the call counts as taken.
UNREACHED = "failed to connect to all addresses"


@dataclass(frozen=True)
class Callee:
    """The process that a leg runs on, and the method of its stub to call."""

    node_id: str
    incarnation: str
    method: Any
    lone_method: Any = None  # the same for a leg that has no other: it takes one message


@dataclass(frozen=True)
class Burden:
    """What a leg lays on its node, as far as a router can tell."""

    compute_s: float = 0.0  # of prefill, predicted
    blocks: int = 0  # that it holds


@dataclass(frozen=True)
class Work:
    """What a first leg has computed, by the node's own word."""

    uncached_tokens: int
    cached_tokens: int
    seconds: float  # 0.0: not told


class Leg:
    """One leg of a request on one node, from its plan until `close`.

    Until the node's own record counts it (`is_reported`), the registry adds its burden to the node's load.
    """

    kind: ClassVar[Literal["prefill", "decode"]]

    def __init__(self, callee: Callee, burden: Burden, clock: Callable[[], float]) -> None:
        self.callee = callee
        self.burden = burden
        self.sent_s = clock()
        self.is_reported = False
        self.waiting_since_s = math.inf  # finite only while an answer is awaited
        self._call: Any = None
        self._clock = clock
        self._broken_off = ""

    def break_off(self, problem: str) -> None:
        """Ends the wait for this leg's answer, now or later, with `LegFailed`."""
        self._broken_off = problem
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """Idempotent. The node frees what the leg holds there when it sees the call cancelled."""
        if self._call is not None:
            self._call.cancel()

    @contextmanager
    def _waiting(self, may_refuse: bool) -> Iterator[None]:
        """Marks the wait for an answer, and maps what may come instead."""
        self.waiting_since_s = self._clock()
        try:
            self._check_broken_off()
            yield
        except grpc.aio.AioRpcError as error:
            raise self._mapped(error, may_refuse) from error
        except asyncio.CancelledError:
            # Either our own task is cancelled, or `break_off` has cancelled the call under it.
            if not asyncio.current_task().cancelling():  # type: ignore[union-attr]
                self._check_broken_off()
            raise
        finally:
            self.waiting_since_s = math.inf

    def _check_broken_off(self) -> None:
        if self._broken_off:
            raise self._failed(self._broken_off, is_down=True)

    def _mapped(self, error: grpc.aio.AioRpcError, may_refuse: bool) -> Exception:
        code, details = error.code(), error.details() or ""
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            field, separator, problem = details.partition(": ")
            return InvalidRequest(field, problem) if separator else InvalidRequest("request", details)
        if may_refuse and code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return LegRefused(self.callee.node_id, details, self.kind, is_draining=False)
        if may_refuse and code == grpc.StatusCode.FAILED_PRECONDITION:
            return LegRefused(self.callee.node_id, details, self.kind, is_draining=True)
        is_down = code == grpc.StatusCode.UNAVAILABLE
        return self._failed(f"{code.name}: {details}", is_down, is_down and details.startswith(UNREACHED))

    def _failed(self, problem: str, is_down: bool = False, is_unreached: bool = False) -> LegFailed:
        return LegFailed(self.callee.node_id, self.callee.incarnation, problem, is_down, is_unreached)


class PrefillLeg(Leg):
    """A prompt in, its first token out."""

    kind = "prefill"

    async def run(self, request: node_pb2.NodeRequest, timeout_s: float | None) -> node_pb2.PrefillResponse:
        """Raises `InvalidRequest`, `LegRefused`, `LegFailed`."""
        self._call = self.callee.method(node_pb2.PrefillRequest(request=request), timeout=timeout_s)
        with self._waiting(may_refuse=True):
            answer: node_pb2.PrefillResponse = await self._call
        return answer


class DecodeLeg(Leg):
    """Admit, then Start, then tokens."""

    kind = "decode"
    _starting: asyncio.Task[None] | None = None

    async def admit(self, request: node_pb2.NodeRequest, timeout_s: float | None, runs_alone: bool = False) -> None:
        """Waits until the node holds room. A leg that runs alone needs no `start`, and half the messages.

        Raises `InvalidRequest`, `LegRefused`, `LegFailed`.
        """
        message = node_pb2.DecodeRequest(admit=node_pb2.Admit(request=request, runs_alone=runs_alone))
        if runs_alone:
            self._call = self.callee.lone_method(message, timeout=timeout_s)
        else:
            self._call = self.callee.method(timeout=timeout_s)
        with self._waiting(may_refuse=True):
            if not runs_alone:
                await self._write(message)
            answer = await self._call.read()
        if answer is grpc.aio.EOF or answer.WhichOneof("message") != "admitted":
            raise self._failed("did not answer Admit with Admitted")

    def start(self, tokens: Sequence[common_pb2.Token], coming_blocks: int = 0) -> None:
        """Sends Start on its way without waiting for it: the client's first token goes out meanwhile."""
        message = node_pb2.DecodeRequest(start=node_pb2.Start(tokens=tokens, coming_blocks=coming_blocks))
        self._starting = asyncio.get_running_loop().create_task(self._write(message))

    async def read(self) -> node_pb2.DecodeResponse:
        """The next answer of a started leg. Raises `LegFailed` past Finished, `InvalidRequest`."""
        with self._waiting(may_refuse=False):
            answer = await self._call.read()
        if answer is grpc.aio.EOF:
            raise self._failed("ended the stream without Finished")
        message: node_pb2.DecodeResponse = answer
        return message

    def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        super().close()

    async def _write(self, message: node_pb2.DecodeRequest) -> None:
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the call is over; the next read says why
