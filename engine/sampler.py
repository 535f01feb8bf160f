"""Samples a token: a pure function of (logits, tokens so far, params, seed, position), so that a request continues
unchanged on another node, in another batch and after a preemption. Knows no generator, no state and no engine. A mask,
and what penalties remember, depend only on the tokens so far, so they do not change that.

Randomness is counter-based: one uniform number for each (seed, position), from splitmix64. It is looked up in the
distribution's cumulative sum over token ids. That sum is not sorted by probability, because two tokens of nearly
equal probability could then swap places, and change the text, on the last bit of a logit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import InvalidRequest
from engine.mask import Masks
from engine.penalties import has_penalties, penalised
from engine.request import OutputToken, Request, SamplingParams

MASK_64 = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
NUCLEUS_START = 1024  # tokens sorted first; a nucleus is rarely larger


def sample_all(
    logits: Tensor, requests: Sequence[Request], eos_token_ids: Sequence[int], masks: Masks | None = None
) -> list[OutputToken | InvalidRequest]:
    """The next token of each request, as by `sample`; `logits` is float32 `[len(requests), vocab]`, on any device.

    The logits stay on their device. Plain greedy requests share one argmax; those with a mask share another. If a
    request's mask failed, its error takes the place of the token.
    """
    is_plain = [request.mask is None and _is_greedy(request.params, request.num_output_tokens) for request in requests]
    largest = _argmax(logits) if any(is_plain) else []
    masked = {} if masks is None else _sample_masked(logits, requests, eos_token_ids, masks)
    return [
        OutputToken(largest[row]) if is_plain[row] else masked.get(row) or sample(logits[row], request, eos_token_ids)
        for row, request in enumerate(requests)
    ]


def _sample_masked(
    logits: Tensor, requests: Sequence[Request], eos_token_ids: Sequence[int], masks: Masks
) -> dict[int, OutputToken | InvalidRequest]:
    """The tokens, by row, of all requests that have a mask."""
    sampled: dict[int, OutputToken | InvalidRequest] = dict(masks.errors)
    greedy = [row for row in masks.rows if _is_masked_greedy(requests[row])]
    if greedy:
        allowed = masks.allowed(greedy, logits.device)
        token_ids = _argmax_of(logits[greedy].masked_fill(~allowed, -math.inf), allowed)
        sampled |= {row: OutputToken(token_id) for row, token_id in zip(greedy, token_ids, strict=True)}
    for row in masks.rows:
        if row not in sampled:
            [allowed] = masks.allowed([row], logits.device)
            sampled[row] = sample(logits[row], requests[row], eos_token_ids, allowed)
    return sampled


def _is_greedy(params: SamplingParams, num_output_tokens: int) -> bool:
    """Whether only the largest logit, or the largest allowed one, matters."""
    if params.temperature != 0.0 or params.logprobs is not None or params.logit_bias:
        return False
    return not has_penalties(params) and num_output_tokens >= params.min_tokens


def _is_masked_greedy(request: Request) -> bool:
    """Whether the largest allowed logit decides; not with `ignore_eos`, which forbids some allowed tokens."""
    return not request.params.ignore_eos and _is_greedy(request.params, request.num_output_tokens)


def _argmax(logits: Tensor) -> list[int]:
    """The argmax of each row; the lowest id among equals. On CPUs numpy's is ten times as fast as torch's."""
    ids = logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(-1)
    token_ids: list[int] = ids.tolist()
    return token_ids


def _argmax_of(scores: Tensor, allowed: Tensor) -> list[int]:
    """The argmax of each row among the allowed tokens, even if all their logits are minus infinity."""
    ids = _argmax(scores)
    is_allowed = allowed[range(len(ids)), ids].tolist()
    return [
        token_id if fits else int(row.int().argmax())
        for token_id, fits, row in zip(ids, is_allowed, allowed, strict=True)
    ]


def sample(
    logits: Tensor, request: Request, eos_token_ids: Sequence[int], allowed: Tensor | None = None
) -> OutputToken:
    """The next token of one request. `logits` is float32 `[vocab]` and is not modified.

    Applied in this order: logit_bias, penalties, the mask, min_tokens, temperature, top_k, top_p, min_p. Temperature 0
    is greedy; among equal logits the lowest id wins. Log probabilities are those of the raw logits.

    `allowed`, bool `[vocab]`, is what a mask allows, at least one token; None: all. No other token is ever sampled.
    min_tokens and ignore_eos postpone the end only as long as the mask allows anything else.
    """
    params, scores = request.params, logits
    if params.logit_bias:
        scores = _biased(scores, params.logit_bias)
    if has_penalties(params):
        scores = penalised(scores, request)
    allowed_ids = None
    if allowed is not None:
        # Forbidden tokens are removed, so that not even rounding can select them.
        allowed_ids = _without_ends(allowed, request.num_output_tokens, params, eos_token_ids).nonzero()[:, 0]
        scores = scores[allowed_ids]
    elif request.num_output_tokens < params.min_tokens:
        scores = _without(scores, (*eos_token_ids, *params.stop_token_ids))
    if params.temperature == 0.0:
        index = int(scores.argmax())
    else:
        index = _draw(scores, params, uniform(params.seed, request.num_tokens))
    token_id = index if allowed_ids is None else int(allowed_ids[index])
    return _output_token(token_id, logits, params.logprobs)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for each (seed, position): 53 bits of splitmix64 (Steele, Lea and Flood, 2014).

    The seed is mixed once by itself; otherwise seeds that differ by the gamma would give the same sequence, shifted.
    """
    return (_mix(_mix(seed) + position * GOLDEN_GAMMA) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    z = (state + GOLDEN_GAMMA) & MASK_64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK_64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK_64
    return z ^ (z >> 31)


def _biased(scores: Tensor, logit_bias: Sequence[tuple[int, float]]) -> Tensor:
    """Adds the biases; ids outside the vocabulary are ignored, as in `_without`."""
    known = [(token_id, bias) for token_id, bias in logit_bias if 0 <= token_id < scores.shape[0]]
    ids = torch.tensor([token_id for token_id, _ in known], dtype=torch.int64, device=scores.device)
    biases = torch.tensor([bias for _, bias in known], dtype=scores.dtype, device=scores.device)
    return scores.index_add(0, ids, biases)


def _without_ends(
    allowed: Tensor, num_output_tokens: int, params: SamplingParams, eos_token_ids: Sequence[int]
) -> Tensor:
    """The allowed tokens without the end tokens while the output must not end; all of them if no other is left."""
    is_early = num_output_tokens < params.min_tokens
    if not is_early and not params.ignore_eos:
        return allowed
    ends = [*eos_token_ids, *(params.stop_token_ids if is_early else ())]
    others = allowed.clone()
    others[[token_id for token_id in ends if token_id < allowed.shape[0]]] = False
    return others if bool(others.any()) else allowed


def _without(scores: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Excludes tokens; ids outside the vocabulary are ignored, as a client may name any stop id."""
    known = [token_id for token_id in token_ids if 0 <= token_id < scores.shape[0]]
    return scores.index_fill(0, torch.tensor(known, dtype=torch.int64, device=scores.device), -math.inf)


def _draw(scores: Tensor, params: SamplingParams, u: float) -> int:
    """Samples by `u`. Each filter is a lower bound on the logits, so ties with the last kept token are kept too."""
    scores = scores.double()
    scores = (scores - scores.max()) / params.temperature  # the largest is 0: nothing overflows
    if 0 < params.top_k < scores.shape[0]:
        scores = _cut(scores, scores.topk(params.top_k).values[-1])
    if params.top_p < 1.0:
        scores = _cut(scores, _nucleus_bound(scores, params.top_p))
    if params.min_p > 0.0:
        scores = _cut(scores, math.log(params.min_p))
    cumulative = scores.exp().cumsum(0)
    # The first token whose cumulative sum exceeds u. A token of probability 0 adds nothing and so is never the first.
    index = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    return min(int(index), scores.shape[0] - 1)  # with NaN logits there is no such token


def _cut(scores: Tensor, bound: Tensor | float) -> Tensor:
    return scores.masked_fill(scores < bound, -math.inf)


def _nucleus_bound(scores: Tensor, top_p: float) -> Tensor:
    """The smallest logit in the smallest set of most likely tokens whose probabilities reach `top_p`."""
    total = scores.logsumexp(0)
    size = min(NUCLEUS_START, scores.shape[0])
    while True:
        top = scores.topk(size).values  # sorted, largest first
        reached = (top - total).exp().cumsum(0) >= top_p
        if bool(reached[-1]) or size == scores.shape[0]:
            return top[int(reached.int().argmax()) if bool(reached[-1]) else -1]
        size = min(8 * size, scores.shape[0])


def _output_token(token_id: int, logits: Tensor, num_top: int | None) -> OutputToken:
    if num_top is None:
        return OutputToken(token_id)
    logprobs = logits.log_softmax(0)
    top = logits.topk(min(num_top, logits.shape[0])).indices
    return OutputToken(
        token_id, float(logprobs[token_id]), tuple(zip(top.tolist(), logprobs[top].tolist(), strict=True))
    )
