"""From a batch of chunks to tokens: builds the tensors, runs the model, samples. Changes no request."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.attention import ForwardBatch, SequenceSpan
from engine.model import Transformer
from engine.request import OutputToken
from engine.sampler import sample
from engine.scheduler import Chunk
from engine.speed import RunSeconds


class Runner:
    """A model and its cache, `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`."""

    def __init__(self, model: Transformer, cache: Tensor, eos_token_ids: Sequence[int]) -> None:
        self._model = model
        self._cache = cache
        self._eos_token_ids = tuple(eos_token_ids)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> tuple[list[OutputToken | None], RunSeconds]:
        """Computes the chunks' KV; a token for each chunk that samples, None for the others, and what it took."""
        begin = time.perf_counter()
        batch = build_batch(chunks, self._cache.shape[3], self._cache.device)
        built = time.perf_counter()
        rows = self._model(batch, self._cache).cpu()  # waits for the device, so this is the forward pass's time
        computed = time.perf_counter()
        logits = iter(rows)
        tokens = [self._sample(next(logits), chunk) if chunk.samples else None for chunk in chunks]
        sampled = time.perf_counter()
        return tokens, RunSeconds(built - begin, computed - built, sampled - computed)

    def _sample(self, logits: Tensor, chunk: Chunk) -> OutputToken:
        request = chunk.request
        prompt = request.token_ids[: request.num_prompt_tokens]
        output = request.token_ids[request.num_prompt_tokens :]
        return sample(logits, prompt, output, request.params, self._eos_token_ids)


def build_batch(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> ForwardBatch:
    """The chunks' tokens one behind the other, each with its position and its slot in the cache."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans: list[SequenceSpan] = []
    for chunk in chunks:
        table, end = chunk.request.block_table, chunk.start + chunk.num_tokens
        block_table = torch.tensor(table[: -(-end // block_size)], dtype=torch.int64, device=device)
        spans.append(SequenceSpan(len(token_ids), chunk.num_tokens, end, block_table))
        token_ids += chunk.request.token_ids[chunk.start : end]
        positions += range(chunk.start, end)
        slots += [table[p // block_size] * block_size + p % block_size for p in range(chunk.start, end)]
    last_rows = [
        span.query_start + span.query_len - 1 for span, chunk in zip(spans, chunks, strict=True) if chunk.samples
    ]
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        spans=tuple(spans),
        logits_indices=torch.tensor(last_rows, dtype=torch.int64, device=device),
    )
