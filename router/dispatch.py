"""A request's journey: plan, admit, prefill, start, stream; and if a node fails on the way, on to another one.

Works on tokens; knows no text. A failure costs the client only time: sampling depends on the tokens so far and on the
seed, so any node that continues from them produces the same text.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from dataclasses import dataclass

from batonpb import common_pb2, node_pb2
from kvstore.directory import Directory
from kvstore.errors import DirectoryUnavailable
from router.decider import Decider
from router.errors import ClusterBusy, ClusterUnavailable, DeadlinePassed, LegFailed, LegRefused, WouldBeLate
from router.hits import Hit
from router.journey import Journey, Progress, RoutedRequest
from router.legs import Burden, Leg, PrefillLeg, Work
from router.plan import Plan, Reason, Reject
from router.registry import Registry
from router.timeline import Timeline

logger = logging.getLogger(__name__)

Computed = node_pb2.PrefillResponse | node_pb2.Tokens  # by a leg that computed the prompt


@dataclass(frozen=True)
class Persistence:
    """How long a request is retried before it is given up."""

    max_attempts: int = 8  # failed legs without `LASTING_TOKENS` in between
    node_wait_s: float = 20.0  # for a node that takes a request which has begun elsewhere
    retry_s: float = 0.25


class Dispatcher:
    """Takes requests through the cluster, any number at a time."""

    def __init__(
        self,
        registry: Registry,
        directory: Directory,
        decider: Decider,
        persistence: Persistence | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._directory = directory
        self._decider = decider
        self._persistence = persistence or Persistence()
        self._clock = clock

    async def run(self, request: RoutedRequest, timeline: Timeline) -> AsyncGenerator[Progress, None]:
        """Yields the request's tokens, until a `Progress` with a finish reason.

        Raises `InvalidRequest`, `ClusterBusy`, `ClusterUnavailable`, `WouldBeLate`, `DeadlinePassed`.
        Closing the generator abandons the request and cancels its legs.
        """
        journey = Journey(request)
        self._decider.began(request)
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
        """Where to go next. A request that has begun waits a while for a node to take it."""
        while True:
            if self._remaining_s(journey) == 0.0:
                raise DeadlinePassed("the deadline passed on the way")
            if not journey.output_ids:  # from the first token on, other weights would produce another text
                journey.pool = self._registry.pool
            hits = await self._locate(journey)
            chosen = self._decider.decide(journey, self._registry.snapshot(journey.pool), hits)
            if isinstance(chosen, Plan):
                return chosen
            self._check_patience(journey, chosen)
            await asyncio.sleep(self._persistence.retry_s)
            journey.forgive()

    def _check_patience(self, journey: Journey, reject: Reject) -> None:
        """Raises the rejection, unless the request has begun."""
        now_s = self._clock()
        if journey.stuck_since_s is None:
            journey.stuck_since_s = now_s
        if not journey.has_begun or now_s - journey.stuck_since_s >= self._persistence.node_wait_s:
            if reject.reason in (Reason.TTFT, Reason.TPOT):
                raise WouldBeLate(str(reject), reject.retry_after_s)
            last = f" (last: {journey.last_failure})" if journey.last_failure else ""
            error = ClusterBusy if reject.reason is Reason.BUSY else ClusterUnavailable
            raise error(reject.reason.value + last)

    async def _locate(self, journey: Journey) -> dict[str, Hit]:
        """Arena id -> the leading blocks that it holds. Empty without Redis."""
        if journey.pool is None or journey.is_scoring:
            return {}
        try:
            runs = await self._directory.runs(journey.hashes(journey.pool))
        except DirectoryUnavailable as error:
            logger.debug("request_id=%s event=locate_failed %s", journey.request.request_id, error)
            return {}
        return {arena_id: Hit(run.num_blocks, run.num_disk_blocks) for arena_id, run in runs.items()}

    async def _attempt(self, journey: Journey, plan: Plan, timeline: Timeline) -> AsyncGenerator[Progress, None]:
        """Both legs once. Ends with a finish reason, or raises `LegFailed` or `LegRefused`."""
        timeline.planned(plan)
        message, is_first = journey.admit(runs_alone=plan.prefill_node is None), not journey.output_ids
        metadata = journey.request.trace.metadata
        own_s = 0.0 if plan.prefill_node else plan.prefill.compute_s
        first: node_pb2.PrefillResponse | None = None
        with (
            self._registry.decode_leg(plan.decode_node, Burden(own_s, plan.blocks)) as decode,
            self._warms(journey, plan, timeline) as has_computed,
        ):
            # 1) Both legs count from now on, so that the next plan sees them.
            with self._prefill_leg(plan) as prefill:
                # 2) Room on the decode node, before any prefill is spent.
                await decode.admit(message, self._remaining_s(journey), metadata)
                timeline.admitted()
                timeline.prefill_started()
                if prefill:
                    asked = journey.scoring(message.admit.request)
                    first = await prefill.run(asked, self._remaining_s(journey), metadata)
                    has_computed(prefill, first)
            # 3) The first token. It goes to the client while Start is on its way to the node.
            if first is not None:
                assert prefill is not None
                scores = _scores(journey, first, prefill)
                if not first.finish_reason:
                    decode.start([first.token], first.coming_blocks)
                yield _take(journey, timeline, [first.token], first.finish_reason, scores)
                if first.finish_reason:
                    return
            # 4) The others, from the decode node.
            is_computed, scores = first is not None, None
            while (reply := await decode.read()).WhichOneof("message") != "finished":
                tokens = reply.tokens
                if not is_computed:
                    is_computed = True
                    scores = _scores(journey, tokens, decode)
                    has_computed(decode, tokens)
                elif first is not None and is_first:
                    timeline.transferred(tokens.fetch_s)
                timeline.decode_hit(tokens.store_hit_tokens)
                yield _take(journey, timeline, tokens.tokens, tokens.finish_reason, scores)
                scores = None
                if tokens.finish_reason:
                    return
            yield Progress((), reply.finished.finish_reason)

    def _prefill_leg(self, plan: Plan) -> AbstractContextManager[PrefillLeg | None]:
        if plan.prefill_node is None:
            return nullcontext()
        return self._registry.prefill_leg(plan.prefill_node, Burden(plan.prefill.compute_s, plan.blocks))

    @contextmanager
    def _warms(self, journey: Journey, plan: Plan, timeline: Timeline) -> Iterator[Callable[[Leg, Computed], None]]:
        """Inside the context, later plans know what the first leg is going to compute.

        Call the yielded function with the leg that has computed the prompt, and what it reported about that.
        """
        promise = self._decider.promise(journey, plan)
        num_tokens, is_first, is_computed = journey.num_tokens, not journey.output_ids, False

        def has_computed(leg: Leg, answer: Computed) -> None:
            nonlocal is_computed
            is_computed = True
            num_hits = answer.local_hit_tokens + answer.store_hit_tokens
            self._registry.computed(leg, Work(max(1, num_tokens - num_hits), num_hits, answer.compute_s))
            if is_first:
                timeline.hit(answer.local_hit_tokens, answer.store_hit_tokens)
                timeline.waited(answer.queue_s, answer.fetch_s)

        try:
            yield has_computed
        finally:
            if not is_computed:
                self._decider.take_back(promise)

    def _note(self, journey: Journey, failure: LegFailed | LegRefused, timeline: Timeline) -> None:
        """Handles a failed attempt. Raises if it was the last one."""
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


def _scores(
    journey: Journey, answer: node_pb2.PrefillResponse | node_pb2.Tokens, leg: Leg
) -> common_pb2.PromptLogprobs | None:
    """The prompt's logprobs that come with its first token, if requested. Raises `LegFailed` if they are incomplete."""
    if not journey.is_scoring:
        return None
    if not journey.is_whole(answer.prompt_logprobs):
        raise LegFailed(leg.callee.node_id, leg.callee.incarnation, "did not tell the prompt's logprobs", is_down=False)
    return answer.prompt_logprobs


def _take(
    journey: Journey,
    timeline: Timeline,
    tokens: Sequence[common_pb2.Token],
    finish_reason: common_pb2.FinishReason,
    scores: common_pb2.PromptLogprobs | None,
) -> Progress:
    journey.take(tokens)
    timeline.took(len(tokens))
    return Progress(tokens, finish_reason, scores)
