"""From a batch of chunks to tokens: builds the tensors, runs the model, samples. Changes no request."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.attention import ForwardBatch, SequenceSpan
from engine.errors import InvalidRequest
from engine.mask import fill_masks
from engine.model import Model
from engine.request import OutputToken
from engine.sampler import sample_all
from engine.scheduler import Chunk
from engine.speed import RunSeconds


class Runner:
    """A model and its cache, `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`.

    Batches are built on the host; a model on another device moves them (`engine.cuda_graphs`).
    """

    def __init__(self, model: Model, cache: Tensor, eos_token_ids: Sequence[int]) -> None:
        self._model = model
        self._cache = cache
        self._eos_token_ids = tuple(eos_token_ids)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> tuple[list[OutputToken | InvalidRequest | None], RunSeconds]:
        """Computes the chunks' KV; a token for each chunk that samples, None for the others, and what it took.

        An error stands for a token where a request's mask has none.
        """
        begin = time.perf_counter()
        batch = build_batch(chunks, self._cache.shape[3])
        built = time.perf_counter()
        logits = self._model(batch, self._cache)
        requests = [chunk.request for chunk in chunks if chunk.samples]
        masks = fill_masks(requests, logits.shape[-1])  # while a device computes
        if self._cache.is_cuda:
            # A step ends when it is computed, whether or not a token is wanted of it: only then may its blocks leave.
            torch.cuda.current_stream(self._cache.device).synchronize()
        computed = time.perf_counter()
        sampled = iter(sample_all(logits, requests, self._eos_token_ids, masks))
        tokens = [next(sampled) if chunk.samples else None for chunk in chunks]
        return tokens, RunSeconds(built - begin, computed - built, time.perf_counter() - computed)


def build_batch(chunks: Sequence[Chunk], block_size: int) -> ForwardBatch:
    """The chunks' tokens one behind the other, each with its position and its slot in the cache."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans: list[SequenceSpan] = []
    for chunk in chunks:
        table, end = chunk.request.block_table, chunk.start + chunk.num_tokens
        block_table = torch.tensor(table[: -(-end // block_size)], dtype=torch.int64)
        spans.append(SequenceSpan(len(token_ids), chunk.num_tokens, end, block_table))
        token_ids += chunk.request.token_ids[chunk.start : end]
        positions += range(chunk.start, end)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(chunk.start, end)]
    last_rows = [
        span.query_start + span.query_len - 1 for span, chunk in zip(spans, chunks, strict=True) if chunk.samples
    ]
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        spans=tuple(spans),
        logits_indices=torch.tensor(last_rows, dtype=torch.int64),
    )
