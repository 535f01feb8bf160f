"""The gRPC door: calls in, responses out. Errors become statuses here, once; `rejection.py` has their details."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from batonpb import inference_pb2
from router.errors import (
    ClusterBusy,
    ClusterUnavailable,
    DeadlinePassed,
    InvalidRequest,
    RateLimited,
    RouterError,
    Unauthenticated,
    UnknownRequest,
    WouldBeLate,
    said,
)
from router.frontend import Caller, Frontend
from router.rejection import metadata_of
from router.tenants import AUTHORIZATION, Tenant
from router.traces import TRACEPARENT, TRACERESPONSE, TRACESTATE, Trace
from router.validate import Limits, parse

logger = logging.getLogger(__name__)

SERVICE = "baton.v1.Inference"
STATUSES = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    ClusterBusy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    WouldBeLate: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnknownRequest: grpc.StatusCode.NOT_FOUND,
    ClusterUnavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
}
SPARE_CALLS = 64
# gRPC itself answers RESOURCE_EXHAUSTED to what is over its limit, so ours comes first by a wide margin.
TRANSPORT_FACTOR = 4
M = TypeVar("M", bound=Message)


class InferenceService:
    """The door's methods. Requests come in as bytes, so that what is no message has an answer, too."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def handlers(self) -> grpc.GenericRpcHandler:
        generate = grpc.unary_stream_rpc_method_handler(
            self.generate, response_serializer=inference_pb2.GenerateResponse.SerializeToString
        )
        unary: dict[str, tuple[Callable[..., object], type[Message]]] = {
            "GetModel": (self.get_model, inference_pb2.GetModelResponse),
            "Tokenize": (self.tokenize, inference_pb2.TokenizeResponse),
            "Detokenize": (self.detokenize, inference_pb2.DetokenizeResponse),
            "Explain": (self.explain, inference_pb2.ExplainResponse),
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(method, response_serializer=response.SerializeToString)
            for name, (method, response) in unary.items()
        }
        return grpc.method_handlers_generic_handler(SERVICE, {"Generate": generate} | methods)

    async def get_model(self, _body: bytes, context: grpc.aio.ServicerContext) -> inference_pb2.GetModelResponse:
        async with _statuses(context, "GetModel"):
            self._authenticate(context)
            return self._frontend.model()
        raise AssertionError("an aborted call goes on")

    async def tokenize(self, body: bytes, context: grpc.aio.ServicerContext) -> inference_pb2.TokenizeResponse:
        async with _statuses(context, "Tokenize"):
            caller = Caller(self._authenticate(context))
            return await self._frontend.tokenize(self._parse(body, inference_pb2.TokenizeRequest), caller)
        raise AssertionError("an aborted call goes on")

    async def detokenize(self, body: bytes, context: grpc.aio.ServicerContext) -> inference_pb2.DetokenizeResponse:
        async with _statuses(context, "Detokenize"):
            caller = Caller(self._authenticate(context))
            return await self._frontend.detokenize(self._parse(body, inference_pb2.DetokenizeRequest), caller)
        raise AssertionError("an aborted call goes on")

    async def explain(self, body: bytes, context: grpc.aio.ServicerContext) -> inference_pb2.ExplainResponse:
        """Why a request went where it went: a tenant's own, and no other's."""
        async with _statuses(context, "Explain"):
            tenant = self._authenticate(context)
            return self._frontend.explain(tenant, self._parse(body, inference_pb2.ExplainRequest).request_id)
        raise AssertionError("an aborted call goes on")

    async def generate(self, body: bytes, context: grpc.aio.ServicerContext) -> None:
        """A coroutine that writes, not a generator: only so does its end run for certain when the caller is gone."""
        received_s, remaining_s = time.monotonic(), context.time_remaining()
        deadline_s = None if remaining_s is None else received_s + remaining_s
        async with _statuses(context, "Generate"):
            tenant = self._authenticate(context)
            with self._trace(context) as trace:
                caller = Caller(tenant, received_s, deadline_s, trace)
                message = self._parse(body, inference_pb2.GenerateRequest)
                if trace.context:
                    await context.send_initial_metadata(((TRACERESPONSE, trace.context),))
                async with aclosing(self._frontend.generate(message, caller)) as responses:
                    async for response in responses:
                        await context.write(response)

    def _trace(self, context: grpc.aio.ServicerContext) -> Trace:
        given = dict(context.invocation_metadata() or ())
        return self._frontend.traces.begin(given.get(TRACEPARENT, ""), given.get(TRACESTATE, ""))

    def _parse(self, body: bytes, kind: type[M]) -> M:
        return parse(body, self._frontend.limits, kind)

    def _authenticate(self, context: grpc.aio.ServicerContext) -> Tenant:
        """Whose call it is. Raises `Unauthenticated`."""
        metadata = context.invocation_metadata() or ()
        return self._frontend.authenticate([value for name, value in metadata if name.lower() == AUTHORIZATION])


@asynccontextmanager
async def _statuses(context: grpc.aio.ServicerContext, method: str) -> AsyncIterator[None]:
    """Ends the call with the status that an error of its body stands for."""
    try:
        yield
    except RouterError as error:
        code = STATUSES.get(type(error), grpc.StatusCode.INTERNAL)
        logger.info("event=refused method=%s code=%s %s", method, code.name, said(error))
        await context.abort(code, str(error), trailing_metadata=metadata_of(error, code))
    except grpc.aio.AbortError:
        raise
    except Exception:
        logger.exception("event=call_failed method=%s", method)
        await context.abort(grpc.StatusCode.INTERNAL, "the router failed; its log says more")


def max_calls(max_requests: int) -> int | None:
    """How many calls of all kinds gRPC lets in: beside requests, short ones, and those that are being refused."""
    return 2 * max_requests + SPARE_CALLS if max_requests else None


def server_options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a second router on the same port is an error, not a lottery
        ("grpc.max_receive_message_length", TRANSPORT_FACTOR * limits.max_message_bytes),
        # A client that vanished without a word is found out, and what it asked for is freed.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients may ping as often.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
