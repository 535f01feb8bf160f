"""From a batch of chunks to tokens: builds the tensors, runs the model, samples, scores. Changes no request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.attention import ForwardBatch, SequenceSpan
from engine.errors import InvalidRequest
from engine.mask import fill_masks
from engine.model import Model
from engine.request import OutputToken, PromptLogprobs
from engine.sampler import sample_all
from engine.scheduler import Chunk
from engine.scorer import score
from engine.speed import RunSeconds


@dataclass(frozen=True)
class Ran:
    """The results of a step's chunks, and their timing.

    `tokens`: one for each chunk that samples, None for the others, an error if a request's mask failed.
    `scores`: prompt logprobs, by index of the chunk.
    """

    tokens: Sequence[OutputToken | InvalidRequest | None]
    seconds: RunSeconds
    scores: Mapping[int, PromptLogprobs] = field(default_factory=dict)


class Runner:
    """A model and its cache, `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`.

    Batches are built on the host; a model on another device moves them (`engine.cuda_graphs`).
    """

    def __init__(self, model: Model, cache: Tensor, eos_token_ids: Sequence[int]) -> None:
        self._model = model
        self._cache = cache
        self._eos_token_ids = tuple(eos_token_ids)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Ran:
        """Computes the chunks' KV, samples, and scores."""
        begin = time.perf_counter()
        batch = build_batch(chunks, self._cache.shape[3])
        built = time.perf_counter()
        logits = self._model(batch, self._cache)
        requests = [chunk.request for chunk in chunks if chunk.samples]
        masks = fill_masks(requests, logits.shape[-1])  # while a device computes
        if self._cache.is_cuda:
            # A step ends when it is computed, whether or not it samples: only then may its blocks be exported.
            torch.cuda.current_stream(self._cache.device).synchronize()
        computed = time.perf_counter()
        scores: Mapping[int, PromptLogprobs] = {}
        if len(logits) > len(requests):
            logits, scores = _score(logits, chunks)
        sampled = iter(sample_all(logits, requests, self._eos_token_ids, masks))
        tokens = [next(sampled) if chunk.samples else None for chunk in chunks]
        return Ran(tokens, RunSeconds(built - begin, computed - built, time.perf_counter() - computed), scores)


def _score(logits: Tensor, chunks: Sequence[Chunk]) -> tuple[Tensor, dict[int, PromptLogprobs]]:
    """The rows that sample, and what the others say of the prompts' tokens behind them, by the index of the chunk."""
    sampling: list[int] = []
    scores: dict[int, PromptLogprobs] = {}
    row = 0
    for index, chunk in enumerate(chunks):
        if chunk.scored:
            request, end = chunk.request, row + len(chunk.scored)
            assert request.prompt_logprobs is not None
            next_ids = request.token_ids[chunk.scored.start + 1 : chunk.scored.stop + 1]
            scores[index] = score(logits[row:end], next_ids, request.prompt_logprobs.num_top)
            row = end
        if chunk.samples:
            sampling.append(row)
            row += 1
    return logits[sampling], scores


def build_batch(chunks: Sequence[Chunk], block_size: int) -> ForwardBatch:
    """The chunks' tokens in order, each with its position and its slot in the cache."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans: list[SequenceSpan] = []
    logits_rows: list[int] = []  # in order
    for chunk in chunks:
        table, end = chunk.request.block_table, chunk.start + chunk.num_tokens
        if chunk.scored:
            logits_rows += [len(token_ids) + position - chunk.start for position in chunk.scored]
        if chunk.samples:
            logits_rows.append(len(token_ids) + chunk.num_tokens - 1)
        block_table = torch.tensor(table[: -(-end // block_size)], dtype=torch.int64)
        spans.append(SequenceSpan(len(token_ids), chunk.num_tokens, end, block_table))
        token_ids += chunk.request.token_ids[chunk.start : end]
        positions += range(chunk.start, end)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(chunk.start, end)]
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        spans=tuple(spans),
        logits_indices=torch.tensor(logits_rows, dtype=torch.int64),
    )
