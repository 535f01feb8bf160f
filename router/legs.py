"""One leg in flight: its call, what it holds on its node, and how it ended.

A leg ends well, is refused, fails, or is broken off from outside when its node hangs. Foreign errors are mapped here,
once; the dispatcher decides what follows.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import grpc

from batonpb import common_pb2, node_pb2
from router.calls import DecodeCalls
from router.errors import InvalidRequest, LegFailed, LegRefused

# gRPC's messages when no connection could be made; with any other, the call counts as accepted.
UNREACHED = "failed to connect to all addresses"
Metadata = tuple[tuple[str, str], ...] | None  # of a call to a node


@dataclass(frozen=True)
class Callee:
    """The process that a leg runs on."""

    node_id: str
    incarnation: str


@dataclass(frozen=True)
class Burden:
    """The load that a leg puts on its node, as far as a router can tell."""

    compute_s: float = 0.0  # of prefill, predicted
    blocks: int = 0  # that the leg holds


@dataclass(frozen=True)
class Work:
    """What a first leg has computed, as reported by the node."""

    uncached_tokens: int
    cached_tokens: int
    seconds: float  # 0.0: not reported


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
        self._broken_off: LegFailed | None = None

    def break_off(self, problem: str, is_down: bool = True) -> None:
        """Ends the wait for this leg's answer, now or later, with `LegFailed`."""
        self._broken_off = self._failed(problem, is_down)
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
            # Either our own task was cancelled, or `break_off` cancelled the call under it.
            if not asyncio.current_task().cancelling():  # type: ignore[union-attr]
                self._check_broken_off()
            raise
        finally:
            self.waiting_since_s = math.inf

    def _check_broken_off(self) -> None:
        if self._broken_off is not None:
            raise self._broken_off

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

    def __init__(self, callee: Callee, burden: Burden, clock: Callable[[], float], method: Any) -> None:
        """`method` is the node stub's Prefill."""
        super().__init__(callee, burden, clock)
        self._method = method

    async def run(
        self, request: node_pb2.NodeRequest, timeout_s: float | None, metadata: Metadata = None
    ) -> node_pb2.PrefillResponse:
        """Raises `InvalidRequest`, `LegRefused`, `LegFailed`."""
        message = node_pb2.PrefillRequest(request=request)
        self._call = self._method(message, timeout=timeout_s, metadata=metadata)
        with self._waiting(may_refuse=True):
            answer: node_pb2.PrefillResponse = await self._call
        return answer


class DecodeLeg(Leg):
    """Admit, then Start, then tokens."""

    kind = "decode"

    def __init__(self, callee: Callee, burden: Burden, clock: Callable[[], float], calls: DecodeCalls) -> None:
        """`calls` has the node's reusable calls."""
        super().__init__(callee, burden, clock)
        self._calls = calls
        self._starting: asyncio.Task[None] | None = None
        self._expiring: asyncio.TimerHandle | None = None
        self._may_keep = False  # nothing of this leg is left on the call
        self._is_over = False

    async def admit(self, message: node_pb2.DecodeRequest, timeout_s: float | None, metadata: Metadata = None) -> None:
        """Waits until the node has reserved room. `message` is the Admit; a leg that runs alone needs no `start`.

        Raises `InvalidRequest`, `LegRefused`, `LegFailed`.
        """
        self._may_keep = metadata is None
        if self._may_keep and timeout_s is not None:
            expire = partial(self.break_off, "DEADLINE_EXCEEDED: of the request", is_down=False)
            self._expiring = asyncio.get_running_loop().call_later(timeout_s, expire)
        answer = grpc.aio.EOF
        with self._waiting(may_refuse=True):
            if self._may_keep and (kept := self._calls.take()) is not None:
                answer = await self._ask(kept, message)
            if answer is grpc.aio.EOF:  # also if the node ended the kept call before it read this
                options = {} if self._may_keep else {"timeout": timeout_s, "metadata": metadata}
                answer = await self._ask(self._calls.open(**options), message)
        if answer is grpc.aio.EOF or answer.WhichOneof("message") != "admitted":
            raise self._failed("did not answer Admit with Admitted")

    def start(self, tokens: Sequence[common_pb2.Token], coming_blocks: int = 0) -> None:
        """Sends Start without waiting for it: the client's first token goes out meanwhile."""
        message = node_pb2.DecodeRequest(start=node_pb2.Start(tokens=tokens, coming_blocks=coming_blocks))
        self._starting = asyncio.get_running_loop().create_task(self._write(message))

    async def read(self) -> node_pb2.DecodeResponse:
        """The next answer of a started leg. Raises `LegFailed` past Finished, `InvalidRequest`."""
        with self._waiting(may_refuse=False):
            answer = await self._call.read()
        if answer is grpc.aio.EOF:
            raise self._failed("ended the stream without Finished")
        message: node_pb2.DecodeResponse = answer
        self._is_over = bool(message.tokens.finish_reason) or message.HasField("finished")
        return message

    def close(self) -> None:
        if self._expiring is not None:
            self._expiring.cancel()
        is_started = self._starting is None or self._starting.done()
        if self._is_over and self._may_keep and is_started:
            self._calls.keep(self._call)
            self._call = None
            return
        if self._starting is not None:
            self._starting.cancel()
        super().close()

    async def _ask(self, call: Any, message: node_pb2.DecodeRequest) -> Any:
        """The answer to a call's next message."""
        self._call = call
        self._check_broken_off()
        await self._write(message)
        return await call.read()

    async def _write(self, message: node_pb2.DecodeRequest) -> None:
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the call is over; the next read says why
