"""The Prefill service: one message in, one out. The worker does the work."""

from __future__ import annotations

import grpc

from batonpb import node_pb2, node_pb2_grpc
from engine.engine import Engine
from engine.request import Request
from node.convert import FINISH_REASONS, note_trace, prompt_logprobs_of, statuses, to_owner, to_request, to_token
from node.grammar import GrammarMasks
from prefill_node.worker import Prefilled, PrefillWorker


class PrefillService(node_pb2_grpc.PrefillServicer):
    """One node's prefill legs."""

    def __init__(self, worker: PrefillWorker, engine: Engine, masks: GrammarMasks) -> None:
        self._worker = worker
        self._engine = engine
        self._masks = masks

    async def Prefill(
        self, message: node_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> node_pb2.PrefillResponse:
        async with statuses(context):
            note_trace(context, message.request.request_id)
            mask = await self._masks.mask(message.request.sampling)
            request = to_request(message.request, self._engine, handoff_after=1, mask=mask)
            owner = to_owner(message.request, self._engine.layout.block_bytes)
            return _response(request, await self._worker.prefill(request, owner))
        raise AssertionError("a status has ended the call")


def _response(request: Request, prefilled: Prefilled) -> node_pb2.PrefillResponse:
    return node_pb2.PrefillResponse(
        token=to_token(prefilled.token),
        finish_reason=FINISH_REASONS[prefilled.finish_reason],
        local_hit_tokens=prefilled.local_hit_tokens,
        store_hit_tokens=prefilled.store_hit_tokens,
        queue_s=prefilled.queue_s,
        fetch_s=prefilled.fetch_s,
        compute_s=prefilled.compute_s,
        coming_blocks=prefilled.num_coming_blocks,
        prompt_logprobs=prompt_logprobs_of(request),
    )
