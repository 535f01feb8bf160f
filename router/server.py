"""The client's door: gRPC in, text out. Errors become statuses here, once.

A request's bytes are parsed, checked, tokenised and sent on its journey; tokens come back as text. Knows no node.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from batonpb import inference_pb2
from kvstore.directory import Directory
from kvstore.scrape import ScrapeDoor
from router.answer import Answer
from router.config import RouterConfig
from router.decider import Decider
from router.dispatch import Dispatcher, Persistence
from router.errors import (
    ClusterBusy,
    ClusterUnavailable,
    DeadlinePassed,
    InvalidRequest,
    RouterError,
    Unauthenticated,
    UnknownRequest,
    WouldBeLate,
)
from router.grammar import GrammarChecker
from router.journey import RoutedRequest
from router.metrics import RouterCollector
from router.registry import Pool, Registry
from router.tenants import EVERYBODY, Tenant, Tenants, read_tenants
from router.timeline import Timeline
from router.tokenizer import Tokenizer
from router.validate import CheckedRequest, check, check_length, check_model, check_tokens, parse

logger = logging.getLogger(__name__)

SERVICE = "baton.v1.Inference"
STATUSES = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    ClusterBusy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    WouldBeLate: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnknownRequest: grpc.StatusCode.NOT_FOUND,
    ClusterUnavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
}
RETRY_AFTER = "retry-after-ms"  # in the trailing metadata of a request that would be late
INLINE_BYTES = 2048  # texts up to this size are tokenised on the event loop: a thread would cost more
# gRPC itself answers RESOURCE_EXHAUSTED to what is over its limit, so ours comes first by a wide margin.
TRANSPORT_FACTOR = 4


class RouterServer:
    """One router process's server: `start`, then `stop`."""

    def __init__(self, config: RouterConfig, rng: random.Random | None = None) -> None:
        self._config = config
        self._rng = rng or random.Random()
        self._health = health.aio.HealthServicer()
        self._stack = AsyncExitStack()

    async def start(self) -> dict[str, object]:
        """Listens. Returns the address and what else a launcher wants to print.

        Raises `UnusableTokenizer`, `UnusableTenants`, and `RuntimeError` where the port is taken.
        """
        async with AsyncExitStack() as stack:
            address, metrics_address = await self._open(stack)
            self._stack = stack.pop_all()
        logger.info("event=router_up address=%s metrics=%s", address, metrics_address or "none")
        return {
            "address": address,
            "model": self._config.model,
            "cluster": self._config.cluster,
            "metrics_address": metrics_address,
        }

    async def stop(self) -> None:
        """Takes no new requests, lets those that run end within `drain_s`, closes. Idempotent."""
        await self._stack.aclose()

    async def _open(self, stack: AsyncExitStack) -> tuple[str, str]:
        """Opens the parts in the order in which they need each other; `stack` closes them in the opposite one.

        Returns where the door is, and where the metrics are.
        """
        config = self._config
        tokenizer = await asyncio.to_thread(Tokenizer, Path(config.model_dir))
        tenants = await asyncio.to_thread(read_tenants, Path(config.tenants_file)) if config.tenants_file else None
        if tenants is not None:
            logger.info("event=tenants_read file=%s tenants=%d", config.tenants_file, len(tenants))
        directory = Directory(config.redis_url, config.cluster)
        stack.push_async_callback(directory.close)
        registry = Registry(directory, config.model, config.patience)
        stack.push_async_callback(registry.stop)
        await registry.start()
        persistence = Persistence(config.max_attempts, config.node_wait_s)
        decider = Decider(self._rng, config.policy)
        dispatcher = Dispatcher(registry, directory, decider, persistence)
        service = InferenceService(config, registry, dispatcher, decider, tokenizer, self._rng, tenants)
        server = grpc.aio.server(options=_server_options(config))
        server.add_generic_rpc_handlers((service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        port = server.add_insecure_port(f"{config.host}:{config.port}")
        await server.start()
        stack.push_async_callback(server.stop, config.drain_s)
        reporting = asyncio.create_task(self._report_health(registry))
        stack.callback(reporting.cancel)
        stack.push_async_callback(self._health.enter_graceful_shutdown)
        return f"{config.advertise_host or config.host}:{port}", await self._open_metrics(stack, decider)

    async def _open_metrics(self, stack: AsyncExitStack, decider: Decider) -> str:
        """Where they are; "" for nowhere."""
        config = self._config
        if not config.metrics:
            return ""
        door = ScrapeDoor()
        stack.push_async_callback(door.close)
        return await door.open(RouterCollector(decider.accuracy), config.host, config.advertise_host or config.host)

    async def _report_health(self, registry: Registry) -> None:
        """The process is well while it answers; its service is, while there is a node to serve it."""
        status = health_pb2.HealthCheckResponse
        while True:
            await self._health.set(SERVICE, status.SERVING if registry.snapshot() else status.NOT_SERVING)
            await asyncio.sleep(self._config.poll_s)


class InferenceService:
    """The door's methods. Requests come in as bytes, so that what is no message has an answer, too."""

    def __init__(  # noqa: PLR0913
        self,
        config: RouterConfig,
        registry: Registry,
        dispatcher: Dispatcher,
        decider: Decider,
        tokenizer: Tokenizer,
        rng: random.Random,
        tenants: Tenants | None = None,
    ) -> None:
        """`tenants` are those who may call; None: everybody may."""
        self._config = config
        self._registry = registry
        self._dispatcher = dispatcher
        self._decider = decider
        self._tokenizer = tokenizer
        self._grammars = GrammarChecker(tokenizer)
        self._rng = rng
        self._tenants = tenants

    def handlers(self) -> grpc.GenericRpcHandler:
        response, model = inference_pb2.GenerateResponse, inference_pb2.GetModelResponse
        methods = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.generate, response_serializer=response.SerializeToString
            ),
            "GetModel": grpc.unary_unary_rpc_method_handler(
                self.get_model, response_serializer=model.SerializeToString
            ),
            "Explain": grpc.unary_unary_rpc_method_handler(
                self.explain, response_serializer=inference_pb2.ExplainResponse.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def get_model(self, _body: bytes, context: grpc.aio.ServicerContext) -> inference_pb2.GetModelResponse:
        async with _statuses(context, "GetModel"):
            self._authenticate(context)
            pool = self._pool()
        return inference_pb2.GetModelResponse(
            model=pool.model,
            max_model_len=pool.max_model_len,
            vocab_size=pool.vocab_size,
            block_size=pool.block_size,
            has_chat_template=self._tokenizer.has_chat_template,
        )

    async def explain(self, body: bytes, context: grpc.aio.ServicerContext) -> inference_pb2.ExplainResponse:
        """Why a request went where it went: a tenant's own, and no other's."""
        async with _statuses(context, "Explain"):
            tenant = self._authenticate(context)
            try:
                request_id = inference_pb2.ExplainRequest.FromString(body).request_id
            except DecodeError:
                raise InvalidRequest("message", "is no baton.v1.ExplainRequest") from None
            return self._decider.journal.explain(tenant.salt, request_id)
        raise AssertionError("an aborted call goes on")

    async def generate(self, body: bytes, context: grpc.aio.ServicerContext) -> None:
        """A coroutine that writes, not a generator: only so does its end run for certain when the caller is gone."""
        timeline, received_s = Timeline(time.monotonic), time.monotonic()
        async with _statuses(context, "Generate"):
            tenant = self._authenticate(context)
            checked = check(parse(body, self._config.limits), self._config.limits)
            request = await self._route(checked, tenant, context, received_s)
            answer = Answer(request, checked.sampling.stop, self._tokenizer, timeline)
            async with aclosing(self._dispatcher.run(request, timeline)) as journey:
                async for progress in journey:
                    response = answer.respond(progress)
                    if response.finish_reason:
                        self._decider.finished(request, response.timeline)
                    await context.write(response)
                    if response.finish_reason:
                        break

    def _authenticate(self, context: grpc.aio.ServicerContext) -> Tenant:
        """Whose call it is. Raises `Unauthenticated`."""
        return EVERYBODY if self._tenants is None else self._tenants.authenticate(context.invocation_metadata() or ())

    async def _route(
        self, checked: CheckedRequest, tenant: Tenant, context: grpc.aio.ServicerContext, received_s: float
    ) -> RoutedRequest:
        """Fills in what the model and this router decide: tokens, length, seed, end tokens, the cache to use."""
        pool, remaining_s = self._pool(), context.time_remaining()
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        check_model(checked.model, pool.model)
        await self._grammars.check(checked.sampling)
        prompt_ids = await self._tokenise(checked, pool)
        sampling = check_tokens(prompt_ids, checked.sampling, pool.max_model_len, pool.vocab_size)
        if not sampling.HasField("seed"):
            sampling.seed = self._rng.getrandbits(64)
        del sampling.stop[:]  # nodes know no text
        # Beside a grammar ignore_eos puts the end off, and there is one.
        is_endless = sampling.ignore_eos and sampling.WhichOneof("grammar") is None
        eos_ids = frozenset() if is_endless else self._tokenizer.eos_token_ids
        return RoutedRequest(
            request_id=checked.request_id or uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=sampling,
            end_ids=eos_ids | frozenset(sampling.stop_token_ids),
            deadline_s=deadline_s,
            salt=tenant.salt,
            kv_quota_bytes=tenant.kv_quota_bytes,
            priority=checked.priority,
            first_due_s=None if checked.ttft_slo_s is None else received_s + checked.ttft_slo_s,
            tpot_limit_s=checked.tpot_slo_s,
        )

    async def _tokenise(self, checked: CheckedRequest, pool: Pool) -> list[int]:
        if checked.token_ids is not None:
            return list(checked.token_ids)
        is_template = checked.messages is not None
        text = self._tokenizer.render(checked.messages) if checked.messages is not None else checked.text or ""
        num_bytes = len(text.encode())
        check_length(self._tokenizer.fewest_tokens(num_bytes), pool.max_model_len, is_bound=True)
        if num_bytes <= INLINE_BYTES:
            return self._tokenizer.encode(text, is_template)
        return await asyncio.to_thread(self._tokenizer.encode, text, is_template)

    def _pool(self) -> Pool:
        pool = self._registry.pool
        if pool is None:
            raise ClusterUnavailable("no node has been seen yet")
        return pool


@asynccontextmanager
async def _statuses(context: grpc.aio.ServicerContext, method: str) -> AsyncIterator[None]:
    """Ends the call with the status that an error of its body stands for."""
    try:
        yield
    except RouterError as error:
        code = STATUSES.get(type(error), grpc.StatusCode.INTERNAL)
        logger.info("event=refused method=%s code=%s %s", method, code.name, error)
        metadata: tuple[tuple[str, str], ...] = ()
        if isinstance(error, WouldBeLate):
            metadata = ((RETRY_AFTER, str(math.ceil(error.retry_after_s * 1000))),)
        await context.abort(code, str(error), trailing_metadata=metadata)
    except grpc.aio.AbortError:
        raise
    except Exception:
        logger.exception("event=call_failed method=%s", method)
        await context.abort(grpc.StatusCode.INTERNAL, "the router failed; its log says more")


def _server_options(config: RouterConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a second router on the same port is an error, not a lottery
        ("grpc.max_receive_message_length", TRANSPORT_FACTOR * config.max_message_bytes),
        # A client that vanished without a word is found out, and what it asked for is freed.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients may ping as often.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
