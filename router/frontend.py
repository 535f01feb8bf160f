"""What a router does with a request, whichever door it came through: check, tokenise, send on its journey, make text.

Knows no node, and neither gRPC's server nor HTTP: doors (`grpc_door.py`, `http_door.py`) turn their calls into its
methods and its errors into their statuses.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from batonpb import inference_pb2
from router.answer import Answer
from router.decider import Decider
from router.dispatch import Dispatcher
from router.errors import ClusterUnavailable
from router.journey import RoutedRequest
from router.limits import Turnstile, Visit
from router.registry import Pool, Registry
from router.tenants import EVERYBODY, Tenant, Tenants
from router.timeline import Timeline
from router.tokenizer import Tokenizer
from router.validate import CheckedRequest, Limits, check, check_length, check_model, check_tokens

INLINE_BYTES = 2048  # texts up to this size are tokenised on the event loop: a thread would cost more


@dataclass(frozen=True)
class Caller:
    """Whose a call is, and when it came and has to end, on the monotonic clock."""

    tenant: Tenant = EVERYBODY
    received_s: float = field(default_factory=time.monotonic)
    deadline_s: float | None = None


class Frontend:
    """One router's requests. `tenants` are those who may call; None: everybody may. `turnstile` bounds how much."""

    def __init__(  # noqa: PLR0913
        self,
        limits: Limits,
        registry: Registry,
        dispatcher: Dispatcher,
        decider: Decider,
        tokenizer: Tokenizer,
        rng: random.Random,
        tenants: Tenants | None = None,
        turnstile: Turnstile | None = None,
    ) -> None:
        self.limits = limits
        self._registry = registry
        self._dispatcher = dispatcher
        self._decider = decider
        self._tokenizer = tokenizer
        self._rng = rng
        self._tenants = tenants
        self._turnstile = turnstile or Turnstile(0, time.monotonic)

    def authenticate(self, authorizations: Sequence[str | bytes]) -> Tenant:
        """Whose call it is, by the values of its authorization header. Raises `Unauthenticated`."""
        return EVERYBODY if self._tenants is None else self._tenants.authenticate(authorizations)

    @property
    def is_ready(self) -> bool:
        """Whether there is a node to serve a request."""
        return bool(self._registry.snapshot())

    def model(self) -> inference_pb2.GetModelResponse:
        """What is served. Raises `ClusterUnavailable` before any node has been seen."""
        pool = self._pool()
        return inference_pb2.GetModelResponse(
            model=pool.model,
            max_model_len=pool.max_model_len,
            vocab_size=pool.vocab_size,
            block_size=pool.block_size,
            has_chat_template=self._tokenizer.has_chat_template,
        )

    def explain(self, tenant: Tenant, request_id: str) -> inference_pb2.ExplainResponse:
        """Why a request went where it went: a tenant's own, and no other's. Raises `UnknownRequest`."""
        return self._decider.journal.explain(tenant.salt, request_id)

    async def generate(
        self, message: inference_pb2.GenerateRequest, caller: Caller
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The request's text and tokens as they come; the last response has a finish reason.

        Raises what reaches clients of `RouterError`. Close the generator to abandon the request.
        """
        with self._turnstile.admit(caller.tenant.name, caller.tenant.allowance) as visit:
            async with aclosing(self._generate(message, caller, visit)) as responses:
                async for response in responses:
                    visit.charge_output(len(response.tokens))
                    yield response

    async def _generate(
        self, message: inference_pb2.GenerateRequest, caller: Caller, visit: Visit
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        timeline = Timeline(time.monotonic)
        checked = check(message, self.limits)
        request = await self._route(checked, caller)
        visit.charge_prompt(len(request.prompt_ids))
        answer = Answer(request, checked.sampling.stop, self._tokenizer, timeline)
        async with aclosing(self._dispatcher.run(request, timeline)) as journey:
            async for progress in journey:
                response = answer.respond(progress)
                if response.finish_reason:
                    self._decider.finished(request, response.timeline)
                yield response
                if response.finish_reason:
                    return

    async def _route(self, checked: CheckedRequest, caller: Caller) -> RoutedRequest:
        """Fills in what the model and this router decide: tokens, length, seed, end tokens, the cache to use."""
        pool = self._pool()
        check_model(checked.model, pool.model)
        prompt_ids = await self._tokenise(checked, pool)
        sampling = check_tokens(prompt_ids, checked.sampling, pool.max_model_len, pool.vocab_size)
        if not sampling.HasField("seed"):
            sampling.seed = self._rng.getrandbits(64)
        del sampling.stop[:]  # nodes know no text
        eos_ids = frozenset() if sampling.ignore_eos else self._tokenizer.eos_token_ids
        return RoutedRequest(
            request_id=checked.request_id or uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=sampling,
            end_ids=eos_ids | frozenset(sampling.stop_token_ids),
            deadline_s=caller.deadline_s,
            salt=caller.tenant.salt,
            kv_quota_bytes=caller.tenant.kv_quota_bytes,
            priority=checked.priority,
            first_due_s=None if checked.ttft_slo_s is None else caller.received_s + checked.ttft_slo_s,
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
