"""The sampler against plain references: a loop in Python, transformers' processors, and its own distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine import sampler
from engine.request import OutputToken, Request, SamplingParams
from engine.sampler import sample_all, uniform
from kvstore.blocks import BlockHash

VOCAB = 24
EOS = (3,)

logits_lists = st.lists(
    st.floats(-30, 30, width=32), min_size=VOCAB, max_size=VOCAB, unique=True
)  # unique: with ties the order of a sort would decide
token_lists = st.lists(st.integers(0, VOCAB - 1), max_size=12)
params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 2.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.4, 1.5]),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.just(100),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.sampled_from([(), (0, 7), (10**6,)]),
)


def sample(
    logits: torch.Tensor,
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    eos_token_ids: Sequence[int],
    allowed: torch.Tensor | None = None,
) -> OutputToken:
    """The next token of a request that nothing is remembered of."""
    request = Request("r", [*prompt, *output], len(prompt), params, BlockHash(b"root"), 1 << 20)
    return sampler.sample(logits, request, eos_token_ids, allowed)


def reference_scores(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    """Penalties and min_tokens, token by token."""
    scores = list(logits)
    for token in range(len(scores)):
        if token in prompt or token in output:
            penalty = params.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        if token in output:
            scores[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
        if len(output) < params.min_tokens and (token in EOS or token in params.stop_token_ids):
            scores[token] = -math.inf
    return scores


def lowest_kept_score(scores: list[float], params: SamplingParams) -> float:
    """Of the tokens that temperature and the three filters leave. Each filter keeps the most likely ones."""
    largest = max(scores)
    weights = [math.exp((score - largest) / params.temperature) for score in scores]
    order = sorted(range(len(scores)), key=lambda token: -weights[token])
    order = order[: params.top_k or len(order)]
    limit = (params.top_p + 1e-9) * sum(weights[token] for token in order)
    mass, kept = 0.0, []
    for token in order:
        if mass < limit and weights[token] >= (params.min_p - 1e-9) * weights[order[0]]:
            kept.append(scores[token])
        mass += weights[token]
    return min(kept)


@given(logits_lists, token_lists, token_lists, params_strategy)
@settings(max_examples=300, deadline=None)
def test_sample_agrees_with_a_plain_reference(logits, prompt, output, params):
    token = sample(torch.tensor(logits), prompt, output, params, EOS).token_id
    scores = reference_scores(logits, prompt, output, params)
    lowest = max(scores) if params.temperature == 0.0 else lowest_kept_score(scores, params)
    assert scores[token] > -math.inf
    assert scores[token] >= lowest - 1e-4  # the sampler penalises in float32


@given(logits_lists, token_lists, token_lists, params_strategy)
@settings(max_examples=100, deadline=None)
def test_sample_is_pure(logits, prompt, output, params):
    tensor = torch.tensor(logits)
    before, prompt_before, output_before = tensor.clone(), list(prompt), list(output)
    torch.manual_seed(0)
    first = sample(tensor, prompt, output, params, EOS)
    torch.manual_seed(1)
    torch.rand(3)
    assert sample(tensor, tuple(prompt), tuple(output), params, EOS) == first
    assert torch.equal(tensor, before) and prompt == prompt_before and output == output_before


@given(logits_lists, token_lists, st.integers(0, 5), st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_randomness_depends_on_seed_and_position_alone(logits, tokens, cut, seed):
    """Where the prompt ends and the output begins, as after a failover, changes nothing but what penalties count."""
    params = SamplingParams(seed=seed)
    whole = sample(torch.tensor(logits), tokens, [], params, EOS)
    assert sample(torch.tensor(logits), tokens[:cut], tokens[cut:], params, EOS) == whole


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1, temperature=1.9),
        SamplingParams(temperature=1.5, top_k=9, top_p=0.9, min_p=0.05),
        SamplingParams(repetition_penalty=1.4, temperature=1.2, top_p=0.95),
        SamplingParams(min_tokens=6, temperature=1.8, top_k=20),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "all", "repetition", "min_tokens"],
)
def test_distribution_is_that_of_transformers(params):
    """Chi-square of 3000 draws against what transformers' processors leave; the support sets are equal."""
    torch.manual_seed(5)
    logits = torch.randn(VOCAB) * 2
    prompt, output = [1, 2, 3, 4], [5, 5, 9]
    expected = _transformers_probabilities(logits, prompt, output, params)
    draws = Counter(
        sample(logits, prompt, output, SamplingParams(**{**vars(params), "seed": seed}), EOS).token_id
        for seed in range(3000)
    )
    assert set(draws) <= {token for token in range(VOCAB) if expected[token] > 0}
    likely = [token for token in range(VOCAB) if expected[token] * 3000 >= 5]
    assert set(likely) <= set(draws)
    chi_square = sum((draws[token] - 3000 * expected[token]) ** 2 / (3000 * expected[token]) for token in likely)
    assert chi_square < len(likely) + 6 * math.sqrt(2 * len(likely))  # six standard deviations; the seeds are fixed


def _transformers_probabilities(logits, prompt, output, params) -> list[float]:
    ids, scores = torch.tensor([prompt + output]), logits[None]
    processors = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    if params.min_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, list(EOS), device="cpu"))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    for processor in processors:
        scores = processor(ids, scores)
    return scores.softmax(-1)[0].tolist()


def test_positions_of_one_seed_are_independent_draws():
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0])
    tokens = [sample(logits, [0] * position, [], SamplingParams(seed=11), ()).token_id for position in range(4000)]
    pairs = Counter(itertools.pairwise(tokens))
    assert len(pairs) == 16
    assert sum((count - 3999 / 16) ** 2 / (3999 / 16) for count in pairs.values()) < 16 + 6 * math.sqrt(32)


def test_uniform_never_changes():
    """Golden values: nodes of two releases may serve one request."""
    golden = [0.6524484863740322, 0.7012121095215252, 0.36818951565166946, 0.4611314684076886]
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(2**64 - 1, 10**6)] == golden


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniform_is_in_the_unit_interval(seed, position):
    assert 0.0 <= uniform(seed, position) < 1.0


def test_neighbouring_seeds_and_positions_share_nothing():
    gamma = 0x9E3779B97F4A7C15
    values = {uniform(seed % 2**64, position) for seed in (0, 1, 2, gamma, 2 * gamma) for position in range(200)}
    assert len(values) == 1000
    assert abs(sum(values) / 1000 - 0.5) < 0.05


@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.999999])
def test_nucleus_of_a_large_vocabulary(top_p):
    """Larger than the first sort, so that the search for the nucleus goes on; a flat distribution is the worst case."""
    torch.manual_seed(0)
    logits = torch.randn(20_000) * 0.01
    cumulative = logits.double().softmax(0).sort(descending=True).values.cumsum(0)
    size = int((cumulative < top_p).sum()) + 1
    allowed = set(logits.topk(min(size + 1, 20_000)).indices.tolist())
    assert {
        sample(logits, [], [], SamplingParams(top_p=top_p, seed=seed), ()).token_id for seed in range(60)
    } <= allowed


@pytest.mark.parametrize(
    ("output", "params", "expected"),
    [
        ([0], {"frequency_penalty": 0.4}, 0),
        ([0, 0, 0], {"frequency_penalty": 0.4}, 1),
        ([0, 0, 0], {"presence_penalty": 0.9}, 0),
        ([0], {"presence_penalty": 1.1}, 1),
        ([3, 3], {"frequency_penalty": -2.0}, 3),
        ([3, 3], {"presence_penalty": -2.0}, 0),
        ([0], {"repetition_penalty": 1.2}, 0),
        ([0], {"repetition_penalty": 1.6}, 1),
        ([3], {"repetition_penalty": 0.5}, 0),  # a logit below zero grows towards zero
    ],
)
def test_penalties_by_hand(output: list[int], params: dict[str, float], expected: int) -> None:
    logits = torch.tensor([3.0, 2.0, -9.0, -0.5])
    assert sample(logits, [2], output, SamplingParams(temperature=0.0, **params), ()).token_id == expected


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_interval_are_tokens_that_may_be(monkeypatch: pytest.MonkeyPatch, u: float) -> None:
    monkeypatch.setattr("engine.sampler.uniform", lambda seed, position: u)
    logits = torch.tensor([-math.inf, -900.0, 2.0, 1.0, -900.0, -math.inf])
    assert sample(logits, [], [], SamplingParams(), ()).token_id == (2 if u == 0.0 else 3)


def test_ties_at_a_filter_are_kept_together():
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, -5.0])
    for params in (dict(top_k=2), dict(top_p=0.6)):
        drawn = {sample(logits, [], [], SamplingParams(seed=seed, **params), ()).token_id for seed in range(300)}
        assert drawn == {0, 1, 2, 3}


def test_greedy_takes_the_first_of_equals():
    assert sample(torch.tensor([0.0, 7.0, 7.0]), [], [], SamplingParams(temperature=0.0), ()).token_id == 1


def test_no_end_before_min_tokens():
    logits = torch.full((VOCAB,), -20.0)
    logits[list(EOS)] = 20.0
    logits[7] = 19.0
    params = SamplingParams(min_tokens=2, stop_token_ids=(7, 10**9), temperature=0.0)
    assert sample(logits, [1], [], params, EOS).token_id not in (7, *EOS)
    assert sample(logits, [1], [0], params, EOS).token_id not in (7, *EOS)
    assert sample(logits, [1], [0, 0], params, EOS).token_id == EOS[0]
    drawn = {sample(logits, [1], [], SamplingParams(min_tokens=1, seed=seed), EOS).token_id for seed in range(50)}
    assert EOS[0] not in drawn


@given(logits_lists, st.integers(0, 20), params_strategy)
@settings(max_examples=50, deadline=None)
def test_logprobs_are_of_the_raw_logits(logits, number, params):
    tensor = torch.tensor(logits)
    with_logprobs = sample(tensor, [1], [2], SamplingParams(**{**vars(params), "logprobs": number}), EOS)
    assert with_logprobs.token_id == sample(tensor, [1], [2], params, EOS).token_id
    expected = tensor.log_softmax(0)
    assert with_logprobs.logprob == pytest.approx(float(expected[with_logprobs.token_id]), abs=1e-6)
    assert [token for token, _ in with_logprobs.top] == tensor.sort(descending=True).indices[:number].tolist()
    assert [logprob for _, logprob in with_logprobs.top] == pytest.approx(
        [float(expected[token]) for token, _ in with_logprobs.top], abs=1e-6
    )


def test_no_logprobs_unless_asked_for():
    token = sample(torch.zeros(4), [], [], SamplingParams(), ())
    assert token.logprob is None and token.top == ()


def test_more_logprobs_than_tokens():
    assert len(sample(torch.zeros(4), [], [], SamplingParams(logprobs=20), ()).top) == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0])
def test_odd_logits_give_some_token(value, temperature):
    logits = torch.zeros(VOCAB)
    logits[5] = value
    params = SamplingParams(temperature=temperature, top_k=3, top_p=0.9, min_p=0.1)
    assert 0 <= sample(logits, [], [], params, ()).token_id < VOCAB
    assert 0 <= sample(torch.full((VOCAB,), value), [], [], params, ()).token_id < VOCAB


def test_logits_of_inference_mode():
    """Logits in inference mode, as the model gives them, may be penalised outside of it."""
    with torch.inference_mode():
        logits = torch.randn(VOCAB)
    sample(logits, [1], [1], SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, min_tokens=3), EOS)


# --- many requests ---


def test_all_requests_of_a_step_get_what_each_gets_alone(device: str) -> None:
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(temperature=0.0, min_tokens=5, stop_token_ids=(7,)),
        SamplingParams(temperature=0.0, repetition_penalty=1.5),
        SamplingParams(temperature=0.0, presence_penalty=1.0),
        SamplingParams(temperature=1.0, top_k=20, top_p=0.9, seed=3),
        SamplingParams(temperature=0.0, max_tokens=9),
    ]
    prompt, output = [1, 2, 3], [4, 5]
    requests = [
        Request(str(index), [*prompt, *output], len(prompt), params, BlockHash(b"root"), 16)
        for index, params in enumerate(kinds)
    ]
    logits = torch.randn(len(kinds), 50, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = logits[:, 4] = logits[:, 30] = 9.0  # equal ones
    logits[6, 3] = logits[6, 40] = math.nan  # more than all numbers, as torch has it
    tokens = sample_all(logits.to(device), requests, [9])
    for token, row, params in zip(tokens, logits, kinds, strict=True):
        alone = sample(row, prompt, output, params, [9])
        assert token.token_id == alone.token_id
        assert token.logprob == pytest.approx(alone.logprob, abs=1e-5) and len(token.top) == len(alone.top)
    assert [token.token_id for token in tokens][:5] == [4, 4, 4, 7, 7]
    assert tokens[6].token_id == 3
    assert sample_all(logits[:0].to(device), [], [9]) == []
