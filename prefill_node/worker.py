"""The first leg of a request: fetch hits, run the rest in chunks, publish each chunk's full blocks, sample one token.

Knows no gRPC and no other node. A failure of the store costs computation, never the answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.loop import EngineLoop, OutputStream
from engine.request import FinishReason, OutputToken, Request
from kvstore.quotas import SHARED, Owner
from node.admission import Admission
from node.fetcher import Fetcher
from node.intake import Intake
from node.publisher import Publisher


@dataclass(frozen=True)
class Prefilled:
    """The result of a prefill leg: its token, and how it was obtained. Hits are in tokens.

    `queue_s` is the time from receipt to the first step with this request, waiting for room, for the store's blocks
    (`fetch_s` of it) and in the engine's queue. `compute_s` is the time from there to the token. The last of the
    `num_coming_blocks` may still be on their way into the arena: the token does not wait for them.
    """

    token: OutputToken
    finish_reason: FinishReason
    local_hit_tokens: int
    store_hit_tokens: int
    queue_s: float
    fetch_s: float
    compute_s: float
    num_coming_blocks: int  # leading ones; 0 if any was not accepted for publishing


class PrefillWorker:
    """Runs prefill legs on one engine."""

    def __init__(self, loop: EngineLoop, intake: Intake, publisher: Publisher, admission: Admission) -> None:
        self._loop = loop
        self._intake = intake
        self._publisher = publisher
        self._admission = admission

    async def prefill(self, request: Request, owner: Owner = SHARED) -> Prefilled:
        """Computes one token for `request`, whose `handoff_after` is 1. Its blocks belong to `owner`.

        Raises `Draining`, `Busy`, `InvalidRequest`.
        """
        received = time.perf_counter()  # the engine's clock
        with self._admission.leg(request) as outputs:
            await self._admission.hold_in_turn(request)
            held = time.perf_counter()
            await Fetcher(self._loop, self._intake, request, owner).fetch()
            fetched = time.perf_counter()
            await self._loop.call(lambda engine: engine.release(request.request_id))
            token, finish_reason, is_coming = await self._first_token(outputs, owner)
            computed = time.perf_counter()
        assert request.started_s is not None, "a token came from no step"
        return Prefilled(
            token=token,
            finish_reason=finish_reason,
            local_hit_tokens=request.num_local_hit_tokens + request.num_late_hit_tokens,
            store_hit_tokens=request.num_store_hit_tokens,
            queue_s=request.started_s - received,
            fetch_s=fetched - held,
            compute_s=computed - request.started_s,
            num_coming_blocks=request.num_computed_tokens // request.block_size if is_coming else 0,
        )

    async def _first_token(self, outputs: OutputStream, owner: Owner) -> tuple[OutputToken, FinishReason, bool]:
        """The token, why it is the last one here, and whether all full blocks will be published."""
        is_coming = True
        async for output in outputs:
            is_coming &= self._publisher.publish(output.full_blocks, owner)
            if output.error is not None:
                raise output.error
            if output.finish_reason is not None:
                return output.tokens[-1], output.finish_reason, is_coming
        raise RuntimeError("the engine ended a prefill leg without a token")
