"""Which requests an engine accepts, and when a request ends. Pure."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from engine.config import EngineConfig, ModelConfig
from engine.errors import InvalidRequest
from engine.request import FinishReason, Request

logger = logging.getLogger(__name__)


def longest_model_len(model: ModelConfig, config: EngineConfig, num_blocks: int) -> int:
    """The longest request, in tokens. It must fit into an empty pool; otherwise it could wait forever."""
    wanted = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    room = num_blocks * config.block_size
    if room < wanted:
        logger.warning("event=max_model_len_capped wanted=%d to=%d num_blocks=%d", wanted, room, num_blocks)
    return min(wanted, room)


def check_tokens(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises `InvalidRequest`."""
    if token_ids and not (0 <= min(token_ids) and max(token_ids) < vocab_size):
        raise InvalidRequest(field, f"token ids must be in [0, {vocab_size}), the model's vocabulary")


def check_length(field: str, num_tokens: int, max_model_len: int) -> None:
    """Raises `InvalidRequest` if there is no room for an output after this many tokens."""
    if num_tokens + 1 > max_model_len:
        limit = f"at most {max_model_len - 1} tokens, for {max_model_len} is the longest with its output"
        raise InvalidRequest(field, f"must be {limit}, got {num_tokens}")


def end_reason(request: Request, eos_token_ids: Collection[int], max_model_len: int) -> FinishReason | None:
    """Why a request ends with its newest token, if it does.

    With a grammar, an end token always ends the request: it comes too early only if nothing else was allowed.
    """
    params, token_id, is_masked = request.params, request.token_ids[-1], request.mask is not None
    is_eos = token_id in eos_token_ids and (is_masked or not params.ignore_eos)
    is_end = is_eos or token_id in params.stop_token_ids
    if is_end and (is_masked or request.num_output_tokens > params.min_tokens):
        return FinishReason.STOP
    if request.num_output_tokens >= params.max_tokens or request.num_tokens >= max_model_len:
        return FinishReason.LENGTH
    if request.handoff_after is not None and request.num_new_tokens >= request.handoff_after:
        return FinishReason.HANDOFF
    return None
