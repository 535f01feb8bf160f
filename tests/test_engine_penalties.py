"""What penalties remember of a request, against what its tokens say anew; and what is looked at for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_driver import BLOCK, assert_all_free, drive, make_engine, make_model, make_prompt, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_sampler import VOCAB, logits_lists, reference_scores, token_lists

from engine.penalties import penalised
from engine.request import Request, RequestStatus, SamplingParams
from engine.sampler import sample_all
from kvstore.blocks import BlockHash

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
PENALTIES = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6, "frequency_penalty": 0.3},
    {"presence_penalty": 0.7},
    {"presence_penalty": -0.5, "frequency_penalty": 1.1},
    {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": -0.2},
]
LONG = 1 << 20  # a block that nothing fills: naming it would look at tokens, too


def request_of(tokens: list[int], num_prompt_tokens: int, params: SamplingParams) -> Request:
    return Request("r", tokens, num_prompt_tokens, params, BlockHash(b"root"), LONG)


@given(logits_lists, token_lists, token_lists, st.lists(token_lists, max_size=5), st.sampled_from(PENALTIES))
@settings(max_examples=200, deadline=None)
def test_what_is_kept_is_what_the_tokens_say(
    logits: list[float], prompt: list[int], output: list[int], more: list[list[int]], penalties: dict[str, float]
) -> None:
    """Asked at any time; and of a new request for the same tokens, as of a failover."""
    params = SamplingParams(**penalties)
    scores = torch.tensor(logits)
    kept = request_of([*prompt, *output], len(prompt), params)
    for tokens in [[], *more, []]:
        for token in tokens:
            kept.append(token)
        weighed = penalised(scores, kept)
        assert torch.equal(weighed, penalised(scores, request_of(list(kept.token_ids), len(prompt), params)))
        assert torch.equal(weighed, penalised(scores, kept)), "to ask changes nothing"
        expected = reference_scores(logits, prompt, kept.token_ids[len(prompt) :], params)
        assert weighed.tolist() == pytest.approx(expected, abs=1e-4)
    assert scores.tolist() == logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_model("llama", path)
    return path


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_output_is_the_same_preempted_or_continued(folder: Path, penalties: dict[str, float]) -> None:
    params = replace(GREEDY, **penalties)
    prompts = [make_prompt(length) for length in (3, BLOCK, 40)]
    engine = make_engine(folder)
    alone = [drive(engine, [make_request(engine, "r", prompt, params)]).ids("r") for prompt in prompts]
    plain = drive(engine, [make_request(engine, "r", prompts[2], GREEDY)]).ids("r")
    assert alone[2] != plain, "they weigh something"
    small = make_engine(folder, num_blocks=10, max_model_len=80, enable_prefix_caching=False)
    requests = [make_request(small, str(number), prompt, params) for number, prompt in enumerate(prompts)]
    for request in requests:
        small.add(request)
    was_preempted = False
    while small.has_work():
        for output in small.step():
            small.unpin([block.block_id for block in output.full_blocks])
        waiting = [request for request in requests if request.status is RequestStatus.WAITING]
        was_preempted |= any(request.seen_tokens is not None for request in waiting)
    assert was_preempted
    assert [request.token_ids[request.num_prompt_tokens :] for request in requests] == alone
    assert_all_free(small)
    for cut in (1, 7, 23):
        tokens = [*prompts[2], *alone[2][:cut]]
        request = make_request(engine, f"from {cut}", tokens, params, num_prompt_tokens=len(prompts[2]))
        assert drive(engine, [request]).ids(f"from {cut}") == alone[2][cut:]


class CountedTokens(list[int]):
    """Counts what is looked at."""

    num_read = 0

    def __iter__(self) -> Iterator[int]:
        self.num_read += len(self)
        return super().__iter__()

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        found = super().__getitem__(index)
        self.num_read += len(found) if isinstance(index, slice) else 1
        return found


@pytest.mark.parametrize(
    ("params", "at_first", "then"),
    [
        (SamplingParams(), 0, 0),
        (SamplingParams(temperature=0.7, top_p=0.9, min_p=0.1, logprobs=2, min_tokens=9), 0, 0),
        (SamplingParams(temperature=0.0), 0, 0),
        (SamplingParams(repetition_penalty=1.1), 503, 1),
        (SamplingParams(presence_penalty=1.0), 3, 1),
    ],
)
def test_a_token_looks_at_those_that_are_new_if_at_any(params: SamplingParams, at_first: int, then: int) -> None:
    request = request_of([], 500, params)
    request.token_ids = tokens = CountedTokens([number % VOCAB for number in range(503)])
    for expected in (at_first, then, then):
        tokens.num_read = 0
        [token] = sample_all(torch.zeros(1, VOCAB), [request], [3])
        assert tokens.num_read == expected
        request.append(token.token_id)
