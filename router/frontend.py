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
from dataclasses import dataclass, field, replace

from batonpb import common_pb2, inference_pb2
from router.answer import Answer, Form
from router.decider import Decider
from router.dispatch import Dispatcher
from router.errors import ClusterUnavailable
from router.grammar import GrammarChecker
from router.journal import part_id
from router.journey import RoutedRequest
from router.lead import Lead, after
from router.limits import Turnstile, Visit
from router.merge import merge
from router.observer import Observer
from router.registry import Pool, Registry
from router.tenants import EVERYBODY, Tenant, Tenants
from router.timeline import Timeline
from router.tokenizer import Tokenizer
from router.traces import NO_TRACE, PassedOn, Trace, Traces
from router.validate import (
    CheckedRequest,
    Limits,
    check,
    check_detokenize,
    check_length,
    check_model,
    check_priority,
    check_prompt,
    check_scores,
    check_tokens,
)
from router.validate_chat import Chat

INLINE_CHARS = 2048  # texts up to this size are tokenised on the event loop: a thread would cost more
INLINE_TOKENS = 512  # likewise, to make text of them
# Of n answers to a prompt of this many tokens, the others set out when the first has its first token, and hit what that
# computed. At once, they would be computed in one step with it, each anew; which is sooner for a short prompt only, and
# never where its logprobs are asked for: they are computed once, for all answers.
LEADING_TOKENS = 128


@dataclass(frozen=True)
class Caller:
    """Whose a call is, and when it came and has to end, on the monotonic clock."""

    tenant: Tenant = EVERYBODY
    received_s: float = field(default_factory=time.monotonic)
    deadline_s: float | None = None
    trace: Trace = NO_TRACE


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
        traces: Traces | None = None,
    ) -> None:
        self.limits = limits
        self.observer = Observer()
        self.traces = traces or PassedOn()
        self._registry = registry
        self._dispatcher = dispatcher
        self._decider = decider
        self._tokenizer = tokenizer
        self._grammars = GrammarChecker(tokenizer)
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

    def piece(self, token_id: int) -> bytes:
        """A token as it is written."""
        return self._tokenizer.piece(token_id)

    def is_text(self, token_id: int) -> bool:
        """Whether a token is part of texts; special ones are not."""
        return not self._tokenizer.is_special(token_id)

    def explain(self, tenant: Tenant, request_id: str) -> inference_pb2.ExplainResponse:
        """Why a request went where it went: a tenant's own, and no other's. Raises `UnknownRequest`."""
        return self._decider.journal.explain(tenant.salt, request_id)

    async def generate(
        self, message: inference_pb2.GenerateRequest, caller: Caller
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The answers' text and tokens as they come; the last response of each index has a finish reason.

        Raises what reaches clients of `RouterError`; a failure of one answer is one of the call. Close the generator to
        abandon the request.
        """
        with self.observer.call(), self._turnstile.admit(caller.tenant.name, caller.tenant.allowance) as visit:
            async with aclosing(self._generate(message, caller, visit)) as responses:
                async for response in responses:
                    visit.charge_output(len(response.tokens))
                    yield response

    async def _generate(
        self, message: inference_pb2.GenerateRequest, caller: Caller, visit: Visit
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        received = self._timeline()
        checked = check(message, self.limits)
        timelines = [received, *(self._timeline() for _ in range(checked.num_answers - 1))]
        request = await self._route(checked, caller)
        visit.charge_prompt(len(request.prompt_ids))
        form = Form(
            request_id=request.request_id,
            stops=tuple(checked.sampling.stop),
            keeps_stop=checked.sampling.include_stop_str_in_output,
            echo=await self._echo(checked, request),
            calls_tools=checked.chat is not None and bool(checked.chat.tools),
            is_silent=checked.is_silent,
        )
        parts = self._parts(request, checked.num_answers)
        async with aclosing(self._answers(parts, form, timelines)) as responses:
            async for response in responses:
                yield response

    def _timeline(self) -> Timeline:
        return Timeline(time.monotonic, self.observer.tally.inter_token)

    def _parts(self, request: RoutedRequest, count: int) -> list[RoutedRequest]:
        """The requests that so many answers take: each with a seed of its own, and a name of its own if not alone."""
        parts = []
        is_leading = len(request.prompt_ids) >= LEADING_TOKENS or request.prompt_logprobs is not None
        for index in range(count):
            sampling = common_pb2.SamplingParams()
            sampling.CopyFrom(request.sampling)
            is_given = sampling.HasField("seed")
            sampling.seed = (sampling.seed + index) % (1 << 64) if is_given else self._rng.getrandbits(64)
            name = request.request_id if count == 1 else part_id(request.request_id, index)
            part = replace(request, request_id=name, sampling=sampling)
            parts.append(replace(part, has_begun=is_leading, prompt_logprobs=None) if index else part)
        if count > 1:
            self._decider.journal.forget(request.salt, request.request_id)  # an older request of that name
        return parts

    def _answers(
        self, parts: Sequence[RoutedRequest], form: Form, timelines: Sequence[Timeline]
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The parts' answers, all at once but for those that wait for the first one's beginning."""
        lead = Lead()
        streams = []
        for index, (part, timeline) in enumerate(zip(parts, timelines, strict=True)):
            stream = self._answer(part, replace(form, index=index), timeline, lead)
            streams.append(after(lead, stream) if part.has_begun else stream)
        return streams[0] if len(streams) == 1 else merge(streams)

    async def _answer(
        self, request: RoutedRequest, form: Form, timeline: Timeline, lead: Lead
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """One answer. What it has for others is there with its first response."""
        answer = Answer(request, form, self._tokenizer, timeline)
        with self.observer.answer() as watched:
            async with aclosing(self._dispatcher.run(request, timeline)) as journey:
                async for progress in journey:
                    response = answer.respond(progress)
                    if response.finish_reason:
                        self._decider.finished(request, response.timeline)
                        self.observer.finished(watched, request, response)
                    lead.tell(progress.prompt_logprobs)
                    yield response
                    if response.finish_reason:
                        return

    async def tokenize(self, message: inference_pb2.TokenizeRequest, caller: Caller) -> inference_pb2.TokenizeResponse:
        """The tokens that a prompt would be, also one that is too long for the model.

        Raises `InvalidRequest`, `RateLimited`, and `ClusterUnavailable` before any node has been seen.
        """
        prompt = check_prompt(message, self.limits)
        pool = self._pool()
        with self._turnstile.admit(caller.tenant.name, caller.tenant.allowance):  # it counts as a request
            token_ids = await self._encode(self._text_of(**prompt), is_template="chat" in prompt)
        return inference_pb2.TokenizeResponse(token_ids=token_ids, max_model_len=pool.max_model_len)

    async def detokenize(
        self, message: inference_pb2.DetokenizeRequest, caller: Caller
    ) -> inference_pb2.DetokenizeResponse:
        """The text of tokens, without special ones.

        Raises `InvalidRequest`, `RateLimited`, and `ClusterUnavailable` before any node has been seen.
        """
        token_ids = check_detokenize(message, self._pool().vocab_size)
        with self._turnstile.admit(caller.tenant.name, caller.tenant.allowance):  # it counts as a request
            text = await self._decode(token_ids)
        return inference_pb2.DetokenizeResponse(text=text)

    async def _route(self, checked: CheckedRequest, caller: Caller) -> RoutedRequest:
        """Fills in what the model and this router decide, but for the seed: tokens, length, end tokens, whose cache."""
        pool = self._pool()
        check_model(checked.model, pool.model)
        check_priority(checked.priority, caller.tenant.least_priority)
        await self._grammars.check(checked.sampling, checked.chat)
        prompt_ids = await self._tokenise(checked, pool)
        is_ours = checked.token_ids is None and self._tokenizer.largest_id < pool.vocab_size
        sampling = check_tokens(
            prompt_ids, checked.sampling, pool.max_model_len, pool.vocab_size, is_in_vocabulary=is_ours
        )
        if checked.prompt_logprobs is not None:
            check_scores(len(prompt_ids), checked.prompt_logprobs)
        del sampling.stop[:]  # nodes know no text
        sampling.include_stop_str_in_output = False
        # Beside a grammar ignore_eos puts the end off, and there is one.
        is_endless = sampling.ignore_eos and sampling.WhichOneof("grammar") is None
        eos_ids = frozenset() if is_endless else self._tokenizer.eos_token_ids
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
            trace=caller.trace,
            prompt_logprobs=checked.prompt_logprobs,
        )

    async def _tokenise(self, checked: CheckedRequest, pool: Pool) -> list[int]:
        if checked.token_ids is not None:
            return list(checked.token_ids)
        text = self._text_of(checked.text, checked.chat)
        check_length(self._tokenizer.fewest_tokens(len(text.encode())), pool.max_model_len, is_bound=True)
        return await self._encode(text, is_template=checked.chat is not None)

    def _text_of(self, text: str | None = None, chat: Chat | None = None) -> str:
        return text or "" if chat is None else self._tokenizer.render(chat.messages, chat.tools, chat.setting)

    async def _encode(self, text: str, is_template: bool) -> list[int]:
        if len(text) <= INLINE_CHARS:
            return self._tokenizer.encode(text, is_template)
        return await asyncio.to_thread(self._tokenizer.encode, text, is_template)

    async def _decode(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) <= INLINE_TOKENS:
            return self._tokenizer.decode(token_ids)
        return await asyncio.to_thread(self._tokenizer.decode, token_ids)

    async def _echo(self, checked: CheckedRequest, request: RoutedRequest) -> str:
        """The text in front of each answer: the prompt as it was given."""
        if not checked.echo:
            return ""
        return await self._decode(request.prompt_ids) if checked.text is None else checked.text

    def _pool(self) -> Pool:
        pool = self._registry.pool
        if pool is None:
            raise ClusterUnavailable("no node has been seen yet")
        return pool
