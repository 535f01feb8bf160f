"""Masks and biases in the engine: a forbidden token never comes, whatever else is asked for, on any device."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_driver import BLOCK, VOCAB, assert_all_free, drive, make_engine, make_model, make_prompt, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_sampler import EOS, logits_lists, params_strategy, sample, token_lists
from test_engine_sampler import VOCAB as SMALL_VOCAB

from engine.errors import InvalidRequest
from engine.mask import WORD_BITS, Words, fill_masks
from engine.request import FinishReason, OutputToken, Request, SamplingParams
from engine.sampler import sample_all
from kvstore.blocks import BlockHash

Rule = Callable[[Sequence[int]], Sequence[int]]  # outputs so far -> ids that may come


class RuleMask:
    """A mask by a rule, without a memory; remembers what it was asked."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.asked: list[list[int]] = []

    def fill(self, output_ids: Sequence[int], words: Words) -> None:
        self.asked.append(list(output_ids))
        for token_id in self.rule(output_ids):
            words[token_id // WORD_BITS] |= np.uint32(1 << token_id % WORD_BITS)


class BrokenMask:
    """Fails at the third token, with its words half written."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error or InvalidRequest("sampling.grammar.regex", "has come to no end")

    def fill(self, output_ids: Sequence[int], words: Words) -> None:
        words[:] = 1
        if len(output_ids) >= 2:
            raise self.error


def thirds(output_ids: Sequence[int]) -> list[int]:
    """A third of the vocabulary, another one each time."""
    return list(range((len(output_ids) + sum(output_ids)) % 3, VOCAB, 3))


# --- one choice ---

masks = st.sets(st.integers(0, SMALL_VOCAB - 1), min_size=1).map(sorted)


@given(logits_lists, token_lists, token_lists, params_strategy, masks, st.booleans())
@settings(max_examples=300, deadline=None)
def test_only_allowed_tokens_come(
    logits: list[float], prompt: list[int], output: list[int], params: SamplingParams, allowed: list[int], endless: bool
) -> None:
    params = replace(params, ignore_eos=endless)
    tensor = torch.tensor(logits)
    mask = torch.zeros(SMALL_VOCAB, dtype=torch.bool)
    mask[allowed] = True
    taken = sample(tensor, prompt, output, params, EOS, mask)
    assert taken.token_id in allowed
    ends = {*EOS, *params.stop_token_ids} if len(output) < params.min_tokens else set(EOS) if endless else set()
    others = [token_id for token_id in allowed if token_id not in ends]
    if others:
        assert taken.token_id in others
    # What the mask leaves is what there is: the same choice without the others' logits.
    kept = others or allowed
    masked = torch.full_like(tensor, -math.inf)
    masked[kept] = tensor[kept]
    if not params.min_tokens or len(output) >= params.min_tokens:
        assert sample(masked, prompt, output, params, EOS).token_id == taken.token_id
    with_logprobs = sample(tensor, prompt, output, replace(params, logprobs=3), EOS, mask)
    assert with_logprobs.token_id == taken.token_id
    assert with_logprobs.logprob == pytest.approx(float(tensor.log_softmax(0)[taken.token_id]), abs=1e-5)


def test_logits_that_are_no_numbers_take_an_allowed_token() -> None:
    for value in (math.nan, math.inf, -math.inf):
        for temperature in (0.0, 1.0):
            params = SamplingParams(temperature=temperature, top_p=0.9, seed=4)
            request = Request("r", [1], 1, params, BlockHash(b"root"), 16, mask=RuleMask(lambda _: [4, 7]))
            [taken] = sample_all(torch.full((1, 9), value), [request], (), fill_masks([request], 9))
            assert taken.token_id in (4, 7)


def test_a_bias_comes_before_all_else() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 0.0])
    greedy = SamplingParams(temperature=0.0)

    def take(*output: int, **params: object) -> int:
        return sample(logits, [], output, replace(greedy, **params), ()).token_id

    assert take() == 2
    assert take(logit_bias=((0, 2.5),)) == 0
    assert take(logit_bias=((2, -100.0), (1, -0.5), (10**6, 100.0))) == 1
    # The penalty divides what the bias has made of it: (0 + 8) / 2 = 4 > 3, and 0 / 2 + 8 would be 8.
    assert take(3, logit_bias=((3, 8.0), (2, 1.5)), repetition_penalty=2.0) == 2
    taken = sample(logits, [], [], replace(greedy, logit_bias=((0, 2.5),), logprobs=1), ())
    assert taken.logprob == pytest.approx(float(logits.log_softmax(0)[0])) and taken.top[0][0] == 2
    assert logits.tolist() == [1.0, 2.0, 3.0, 0.0]
    drawn = {sample(logits, [], [], SamplingParams(seed=n, logit_bias=((3, 100.0),)), ()).token_id for n in range(50)}
    assert drawn == {3}


@pytest.mark.parametrize("bias", [((1, 100.5),), ((1, math.nan),), tuple((n, 0.0) for n in range(301))])
def test_biases_have_limits(bias: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.logit_bias"):
        SamplingParams(logit_bias=bias)


# --- a step ---


@pytest.mark.parametrize("vocab", [31, 32, 33, 258, 1024])
def test_rows_of_bits_become_bytes(device: str, vocab: int) -> None:
    generator = np.random.default_rng(vocab)
    rules = [sorted(generator.choice(vocab, size, replace=False).tolist()) for size in (1, vocab // 2, vocab)]
    requests = [
        Request(str(row), [1], 1, SamplingParams(), BlockHash(b"root"), 16, mask=RuleMask(lambda _, r=rule: r))
        for row, rule in enumerate(rules)
    ]
    requests.insert(1, Request("plain", [1], 1, SamplingParams(), BlockHash(b"root"), 16))
    found = fill_masks(requests, vocab)
    assert found is not None and not found.errors
    allowed = found.allowed([3, 0, 2], torch.device(device))
    assert allowed.shape == (3, vocab) and allowed.device.type == device
    assert [row.nonzero()[:, 0].tolist() for row in allowed] == [rules[2], rules[0], rules[1]]


def test_bits_beyond_the_vocabulary_are_no_tokens() -> None:
    class Full:
        def fill(self, _output_ids: Sequence[int], words: Words) -> None:
            words[:] = 0xFFFFFFFF

    found = fill_masks([Request("r", [1], 1, SamplingParams(), BlockHash(b"root"), 16, mask=Full())], 33)
    assert found is not None and found.allowed([0], torch.device("cpu")).tolist() == [33 * [True]]


def test_no_masks_no_work() -> None:
    assert fill_masks([Request("r", [1], 1, SamplingParams(), BlockHash(b"root"), 16)], 99) is None


def test_requests_of_a_step_do_not_meet(device: str) -> None:
    root, greedy = BlockHash(b"root"), SamplingParams(temperature=0.0)
    requests = [
        Request("masked", [1, 2], 1, greedy, root, 16, mask=RuleMask(lambda _: [3, 5, 40])),
        Request("plain", [1, 2], 1, greedy, root, 16),
        Request("empty", [1, 2], 1, greedy, root, 16, mask=RuleMask(lambda _: [])),
        Request("broken", [1, 2, 3], 1, greedy, root, 16, mask=BrokenMask()),
        Request("drawn", [1, 2], 1, SamplingParams(seed=1), root, 16, mask=RuleMask(lambda _: [9])),
    ]
    logits = torch.zeros(5, 50)
    logits[:, 5] = 1.0
    logits[:, 4] = 2.0
    tokens = sample_all(logits.to(device), requests, [49], fill_masks(requests, 50))
    assert tokens[:2] == [OutputToken(5), OutputToken(4)] and tokens[4] == OutputToken(9)
    assert isinstance(tokens[2], InvalidRequest) and "no token" in str(tokens[2])
    assert isinstance(tokens[3], InvalidRequest) and tokens[3].field == "sampling.grammar.regex"


# --- an engine ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_model("llama", path)
    return path


def masked(request: Request, rule: Rule = thirds) -> Request:
    request.mask = RuleMask(rule)
    return request


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.0, max_tokens=20), SamplingParams(seed=3, max_tokens=20)]
)
def test_output_is_the_same_however_the_work_is_cut(folder: Path, params: SamplingParams) -> None:
    """Alone, in chunks, preempted, in a batch with others, and from any token on in another engine."""
    prompts = [make_prompt(length) for length in (3, BLOCK, 40)]
    alone = []
    for prompt in prompts:
        engine = make_engine(folder)
        alone.append(drive(engine, [masked(make_request(engine, "r", prompt, params))]).ids("r"))
    for ids in alone:
        assert all(token_id in thirds(ids[:place]) for place, token_id in enumerate(ids))
    # A pool that is too small for all: some are preempted.
    for options in ({}, {"max_num_batched_tokens": 7}, {"num_blocks": 10, "max_model_len": 80}):
        engine = make_engine(folder, **options)
        requests = [masked(make_request(engine, str(n), prompt, params)) for n, prompt in enumerate(prompts)]
        plain = make_request(engine, "plain", prompts[2], params)
        run = drive(engine, [*requests, plain])
        assert [run.ids(str(n)) for n in range(3)] == alone
        assert run.ids("plain") != alone[2]
        assert_all_free(engine)
    engine = make_engine(folder)
    for cut in (1, 7, 19):
        tokens = [*prompts[2], *alone[2][:cut]]
        request = masked(make_request(engine, f"from {cut}", tokens, params, num_prompt_tokens=len(prompts[2])))
        assert drive(engine, [request]).ids(f"from {cut}") == alone[2][cut:]


def test_plain_requests_beside_masked_ones_are_what_they_are_alone(folder: Path) -> None:
    engine = make_engine(folder)
    prompt, greedy = make_prompt(20), SamplingParams(temperature=0.0, max_tokens=10)
    [alone] = engine.generate([prompt], greedy)
    run = drive(
        engine, [make_request(engine, "plain", prompt, greedy), masked(make_request(engine, "m", prompt, greedy))]
    )
    assert run.ids("plain") == alone


def test_a_mask_is_asked_once_for_each_token(folder: Path) -> None:
    engine = make_engine(folder, max_num_batched_tokens=8)
    request = masked(make_request(engine, "r", make_prompt(50), SamplingParams(temperature=0.0, max_tokens=5)))
    ids = drive(engine, [request]).ids("r")
    assert request.mask.asked == [ids[:count] for count in range(5)]


@pytest.mark.parametrize(
    ("error", "told", "num_logged"),
    [(None, "no end", 0), (RuntimeError("a slip of its library"), "grammar: its mask failed.*RuntimeError: a slip", 1)],
)
def test_a_mask_that_fails_ends_its_request_alone(
    folder: Path, caplog: pytest.LogCaptureFixture, error: Exception | None, told: str, num_logged: int
) -> None:
    engine = make_engine(folder)
    broken = make_request(engine, "broken", make_prompt(20))
    broken.mask = BrokenMask(error)
    engine.add(broken)
    engine.add(make_request(engine, "other", make_prompt(20)))
    outputs = []
    while engine.has_work():
        for output in engine.step():
            engine.unpin([block.block_id for block in output.full_blocks])
            outputs.append(output)
    [last] = [output for output in outputs if output.finish_reason is FinishReason.FAILED]
    assert last.request_id == "broken" and last.tokens == ()
    assert isinstance(last.error, InvalidRequest) and re.search(told, str(last.error))
    assert caplog.text.count("event=mask_failed request=broken") == num_logged
    assert sum(len(output.tokens) for output in outputs if output.request_id == "broken") == 2
    assert sum(len(output.tokens) for output in outputs if output.request_id == "other") == 12
    assert_all_free(engine)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, FinishReason.STOP),
        ({"min_tokens": 2}, FinishReason.STOP),
        ({"min_tokens": 8}, FinishReason.STOP),
        ({"ignore_eos": True}, FinishReason.STOP),
        ({"ignore_eos": True, "max_tokens": 3}, FinishReason.LENGTH),
    ],
    ids=str,
)
def test_the_end_is_put_off_until_nothing_else_is_left(
    folder: Path, options: dict[str, int], expected: FinishReason
) -> None:
    """Behind the first token the end is allowed (and most wanted), behind the third it is all that is."""
    engine = make_engine(folder)
    end = 11
    engine.eos_token_ids = frozenset({end})
    engine._runner._eos_token_ids = (end,)
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 9, "logit_bias": ((end, 100.0),)} | options))
    request = make_request(engine, "r", make_prompt(9), params)
    request.mask = RuleMask(lambda ids: [end] if len(ids) >= 3 else [5, 6, end] if ids else [5])
    run = drive(engine, [request])
    first_end = 3 if params.ignore_eos else max(1, min(params.min_tokens, 3))
    assert len(run.ids("r")) == min(first_end + 1, params.max_tokens)
    assert (run.ids("r")[-1] == end) == (expected is FinishReason.STOP)
    assert run.reasons["r"] is expected
