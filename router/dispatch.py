"""A request's journey: plan, admit, prefill, start, stream; and where a node fails on the way, on to another one.

Works on tokens; knows no text. A failure costs the client time and nothing else: sampling depends on the tokens so far
and on the seed, so whoever goes on with them writes the same text.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass, field

from batonpb import common_pb2, node_pb2
from kvstore.blocks import BlockHash, hash_blocks, salted
from kvstore.directory import ON_DISK, Directory
from kvstore.errors import DirectoryUnavailable
from router import policy
from router.errors import ClusterBusy, ClusterUnavailable, DeadlinePassed, LegFailed, LegRefused, RouterError
from router.hits import Hit, longest
from router.legs import Burden, PrefillLeg
from router.policy import Plan, Rates, Reject, RequestView
from router.registry import Pool, Registry
from router.timeline import Timeline

logger = logging.getLogger(__name__)

UNFINISHED = common_pb2.FINISH_REASON_UNSPECIFIED
LASTING_TOKENS = 32  # so many new tokens between two failures, and the second one begins a new count


@dataclass(frozen=True)
class Persistence:
    """How long a request is carried on before it is given up."""

    max_attempts: int = 8  # legs that failed, without `LASTING_TOKENS` in between
    node_wait_s: float = 20.0  # for a node that takes a request which has begun elsewhere
    retry_s: float = 0.25


@dataclass(frozen=True)
class RoutedRequest:
    """A request as it sets out: tokens, and all defaults filled in."""

    request_id: str
    prompt_ids: Sequence[int]
    sampling: common_pb2.SamplingParams  # seed and max_tokens set, within the model's length
    end_ids: frozenset[int]  # tokens that end it, once min_tokens are there
    deadline_s: float | None = None  # on the dispatcher's clock
    salt: bytes = b""  # the tenant's; never anything that a client has sent
    kv_quota_bytes: int = 0  # that the tenant's blocks may take in each arena; 0: no bound


@dataclass(frozen=True)
class Progress:
    """Tokens that came, and in the last one why they ended."""

    tokens: Sequence[common_pb2.Token]
    finish_reason: common_pb2.FinishReason = UNFINISHED


@dataclass(eq=False)
class Journey:
    """One request on its way: what it has, and whom it need not ask again."""

    request: RoutedRequest
    output_ids: list[int] = field(default_factory=list)
    num_failures: int = 0
    last_failure: RouterError | None = None
    failed: set[str] = field(default_factory=set)  # node ids
    refused: dict[str, set[str]] = field(default_factory=lambda: {"prefill": set(), "decode": set()})
    stuck_since_s: float | None = None  # nobody takes it
    pool: Pool | None = None  # whose nodes may run it
    _failed_at_tokens: int = 0
    _root: BlockHash | None = None
    _hashes: list[BlockHash] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.prompt_ids, *self.output_ids]

    def hashes(self, pool: Pool) -> list[BlockHash]:
        """The names of all full blocks so far; only new ones are computed."""
        root = salted(pool.root, self.request.salt)
        if root != self._root:
            self._root, self._hashes = root, []
        parent = self._hashes[-1] if self._hashes else root
        self._hashes += hash_blocks(parent, self.token_ids[len(self._hashes) * pool.block_size :], pool.block_size)
        return self._hashes

    def view(self, hits: dict[str, Hit]) -> RequestView:
        return RequestView(
            num_tokens=len(self.request.prompt_ids) + len(self.output_ids),
            max_new_tokens=self.request.sampling.max_tokens - len(self.output_ids),
            hits=hits,
            failed=frozenset(self.failed),
            no_prefill=frozenset(self.refused["prefill"]),
            no_decode=frozenset(self.refused["decode"]),
        )

    def message(self) -> node_pb2.NodeRequest:
        return node_pb2.NodeRequest(
            request_id=self.request.request_id,
            token_ids=self.token_ids,
            num_prompt_tokens=len(self.request.prompt_ids),
            sampling=self.request.sampling,
            salt=self.request.salt,
            kv_quota_bytes=self.request.kv_quota_bytes,
        )

    def take(self, tokens: Sequence[common_pb2.Token]) -> None:
        self.output_ids += [token.token_id for token in tokens]
        self.stuck_since_s = None

    def note(self, failure: LegFailed | LegRefused) -> None:
        """A node that failed is as good as dead for this request; one without room may still run the other leg."""
        self.last_failure = failure
        if isinstance(failure, LegRefused) and not failure.is_draining:
            self.refused[failure.leg].add(failure.node_id)
        else:
            self.failed.add(failure.node_id)
        # A machine that dies takes many nodes along; calls that none of them took are no attempts.
        if isinstance(failure, LegFailed) and not failure.is_unreached:
            self._count_failure()

    def _count_failure(self) -> None:
        """Failures add up only while they keep the request from going on; and somebody had taken it until now."""
        if len(self.output_ids) - self._failed_at_tokens >= LASTING_TOKENS:
            self.num_failures = 0
        self._failed_at_tokens = len(self.output_ids)
        self.num_failures += 1
        self.stuck_since_s = None

    def forgive(self) -> None:
        """Everybody may be asked again: what kept them may be over."""
        self.failed.clear()
        self.refused = {"prefill": set(), "decode": set()}

    def end(self) -> common_pb2.FinishReason:
        """Why the tokens so far are all there will be, where a node died before it could say so."""
        sampling, count = self.request.sampling, len(self.output_ids)
        if count and self.output_ids[-1] in self.request.end_ids and count >= sampling.min_tokens:
            return common_pb2.FINISH_REASON_STOP
        return common_pb2.FINISH_REASON_LENGTH if count >= sampling.max_tokens else UNFINISHED


class Dispatcher:
    """Carries requests through the cluster, any number at a time."""

    def __init__(  # noqa: PLR0913
        self,
        registry: Registry,
        directory: Directory,
        rng: random.Random,
        persistence: Persistence | None = None,
        rates: Rates | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._directory = directory
        self._rng = rng
        self._persistence = persistence or Persistence()
        self._rates = rates or Rates()
        self._clock = clock

    async def run(self, request: RoutedRequest, timeline: Timeline) -> AsyncGenerator[Progress, None]:
        """The request's tokens, until one `Progress` with a finish reason.

        Raises `InvalidRequest`, `ClusterBusy`, `ClusterUnavailable`, `DeadlinePassed`. Close the generator to abandon
        the request: that cancels its legs.
        """
        journey = Journey(request)
        while True:
            plan = await self._plan(journey)
            try:
                async with aclosing(self._attempt(journey, plan, timeline)) as attempt:
                    async for progress in attempt:
                        yield progress
                return
            except (LegFailed, LegRefused) as failure:
                self._note(journey, failure, timeline)
            reason = journey.end()
            if reason:
                yield Progress((), reason)
                return

    async def _plan(self, journey: Journey) -> Plan:
        """Where to go next. A request that must not be lost waits a while for somebody to take it."""
        while True:
            if self._remaining_s(journey) == 0.0:
                raise DeadlinePassed("the deadline passed on the way")
            if not journey.output_ids:  # from the first token on, other weights would go on with another text
                journey.pool = self._registry.pool
            hits = await self._locate(journey)
            nodes = self._registry.snapshot(journey.pool)
            plan = policy.plan(journey.view(hits), nodes, self._rng, self._rates)
            if isinstance(plan, Plan):
                logger.info(
                    "request_id=%s event=plan tokens=%d hit_blocks=%d %s",
                    journey.request.request_id,
                    len(journey.request.prompt_ids) + len(journey.output_ids),
                    longest(hits).num_blocks,
                    plan.explanation,
                )
                return plan
            self._check_patience(journey, plan)
            await asyncio.sleep(self._persistence.retry_s)
            journey.forgive()

    def _check_patience(self, journey: Journey, reject: Reject) -> None:
        """Raises the rejection, unless the request has begun, so that the client would see what it must not see.

        It has, once a leg of it failed: whoever failed may be back by now, under a new incarnation.
        """
        now_s = self._clock()
        if journey.stuck_since_s is None:
            journey.stuck_since_s = now_s
        has_begun = journey.output_ids or journey.num_failures
        if not has_begun or now_s - journey.stuck_since_s >= self._persistence.node_wait_s:
            last = f" (last: {journey.last_failure})" if journey.last_failure else ""
            error = ClusterBusy if reject is Reject.BUSY else ClusterUnavailable
            raise error(reject.value + last)

    async def _locate(self, journey: Journey) -> dict[str, Hit]:
        """Arena id -> the leading blocks that it holds. Without Redis, nobody holds anything."""
        if journey.pool is None:
            return {}
        try:
            runs = await self._directory.locate(journey.hashes(journey.pool))
        except DirectoryUnavailable as error:
            logger.debug("request_id=%s event=locate_failed %s", journey.request.request_id, error)
            return {}
        return {arena_id: Hit(len(slots), slots.count(ON_DISK)) for arena_id, slots in runs.items()}

    async def _attempt(self, journey: Journey, plan: Plan, timeline: Timeline) -> AsyncGenerator[Progress, None]:
        """Both legs once. Ends with a finish reason, or raises `LegFailed` or `LegRefused`."""
        timeline.planned(plan)
        message, is_first = journey.message(), not journey.output_ids
        own_tokens = 0 if plan.prefill_node else plan.prefill_tokens
        with self._registry.decode_leg(plan.decode_node, Burden(own_tokens, plan.blocks)) as decode:
            # 1) Both legs count from now on: whoever is planned next must see them.
            with self._prefill_leg(plan) as prefill:
                # 2) Room on the decode node, before any prefill is spent.
                await decode.admit(message, self._remaining_s(journey))
                timeline.admitted()
                timeline.prefill_started()
                first = await prefill.run(message, self._remaining_s(journey)) if prefill else None
            # 3) The first token. It goes to the client while Start is on its way.
            if first is None:
                decode.start([])
            else:
                if is_first:
                    timeline.hit(first.local_hit_tokens, first.store_hit_tokens)
                if not first.finish_reason:
                    decode.start([first.token], first.coming_blocks)
                yield _take(journey, timeline, [first.token], first.finish_reason)
                if first.finish_reason:
                    return
            # 4) The others, from the decode node.
            while (reply := await decode.read()).WhichOneof("message") != "finished":
                if is_first and first is None:
                    timeline.hit(reply.tokens.local_hit_tokens, reply.tokens.store_hit_tokens)
                timeline.decode_hit(reply.tokens.store_hit_tokens)
                yield _take(journey, timeline, reply.tokens.tokens)
            yield Progress((), reply.finished.finish_reason)

    def _prefill_leg(self, plan: Plan) -> AbstractContextManager[PrefillLeg | None]:
        if plan.prefill_node is None:
            return nullcontext()
        return self._registry.prefill_leg(plan.prefill_node, Burden(plan.prefill_tokens, plan.blocks))

    def _note(self, journey: Journey, failure: LegFailed | LegRefused, timeline: Timeline) -> None:
        """Takes the consequences of a failed attempt. Raises where it was the last."""
        journey.note(failure)
        event = "leg_failed" if isinstance(failure, LegFailed) else "leg_refused"
        logger.info(
            "request_id=%s event=%s outputs=%d %s",
            *(journey.request.request_id, event, len(journey.output_ids), failure),
        )
        if isinstance(failure, LegFailed):
            timeline.migrated()
            if failure.is_down:
                self._registry.mark_down(failure.node_id, failure.incarnation, str(failure))
            if journey.num_failures >= self._persistence.max_attempts:
                message = f"given up after {journey.num_failures} legs failed, the last one on {failure}"
                raise ClusterUnavailable(message) from failure

    def _remaining_s(self, journey: Journey) -> float | None:
        deadline_s = journey.request.deadline_s
        return None if deadline_s is None else max(0.0, deadline_s - self._clock())


def _take(
    journey: Journey,
    timeline: Timeline,
    tokens: Sequence[common_pb2.Token],
    finish_reason: common_pb2.FinishReason = UNFINISHED,
) -> Progress:
    journey.take(tokens)
    timeline.took(len(tokens))
    return Progress(tokens, finish_reason)
