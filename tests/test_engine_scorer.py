"""Log probabilities of a prompt's tokens: an engine's are those of transformers, however the prompt is cut up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import BLOCK, GREEDY, VOCAB, Store, assert_all_free, drive, make_engine, make_model, make_prompt
from engine_driver import make_request as plain_request
from torch import Tensor
from transformers import PreTrainedModel

from engine import native_model
from engine.attention import ForwardBatch
from engine.cuda_graphs import GraphedModel
from engine.engine import Engine
from engine.request import PromptLogprobs, Request
from engine.scheduler import MAX_SCORED_TOKENS
from engine.scorer import SLICE_ROWS, score

LENGTHS = (1, 2, BLOCK, BLOCK + 1, 61)
LOOSE = 1e-4


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_model(request.param, folder)


def scoring(engine: Engine, name: str, tokens: Sequence[int], num_top: int = 5, **fields: Any) -> Request:
    request = plain_request(engine, name, tokens, **fields)
    request.prompt_logprobs = PromptLogprobs(num_top)
    return request


def again(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A graph on a CPU: its function."""
    return compute


def check(scores: PromptLogprobs | None, prompt: Sequence[int], model: PreTrainedModel, num_top: int = 5) -> None:
    """Against the log-softmax of transformers' logits."""
    assert scores is not None
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)
    next_ids = torch.tensor(prompt[1:], dtype=torch.int64)
    taken = expected.gather(1, next_ids[:, None])[:, 0]
    assert len(scores.logprobs) == len(scores.ranks) == len(prompt) - 1
    torch.testing.assert_close(torch.tensor(scores.logprobs), taken, atol=LOOSE, rtol=0)
    top = torch.tensor(scores.top_logprobs).view(len(prompt) - 1, num_top)
    torch.testing.assert_close(top, expected.topk(num_top).values, atol=LOOSE, rtol=0)
    ids = torch.tensor(scores.top_ids, dtype=torch.int64).view(len(prompt) - 1, num_top)
    torch.testing.assert_close(expected.gather(1, ids), top, atol=LOOSE, rtol=0)
    for rank, logprob, row in zip(scores.ranks, taken.tolist(), expected, strict=True):
        assert int((row > logprob + LOOSE).sum()) < rank <= int((row > logprob - LOOSE).sum())


@pytest.mark.parametrize("max_num_batched_tokens", [64, 7, 1])
@pytest.mark.parametrize("way", ["compiled", "torch", "graphs"])
def test_scores_are_those_of_transformers(
    case: tuple[Path, PreTrainedModel], way: str, max_num_batched_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of any size, several prompts to a step, with requests between them that ask for nothing."""
    folder, model = case
    if way != "compiled":
        monkeypatch.setattr(native_model, "can_run", lambda *_: False)
    if way == "graphs":
        monkeypatch.setattr("engine.engine.on_device", lambda model, cache: GraphedModel(model, cache, "padded", again))
    engine = make_engine(folder, max_num_batched_tokens=max_num_batched_tokens)
    prompts = {str(length): make_prompt(length) for length in LENGTHS}
    plain = [plain_request(engine, f"plain {name}", prompt) for name, prompt in prompts.items()]
    requests = [scoring(engine, name, prompt) for name, prompt in prompts.items()]
    both = [one for pair in zip(plain, requests, strict=True) for one in pair]
    run = drive(engine, both)
    for request in requests:
        check(request.prompt_logprobs, prompts[request.request_id], model)
        assert run.ids(request.request_id) == run.ids(f"plain {request.request_id}")
    assert all(request.prompt_logprobs is None for request in plain)
    assert_all_free(engine)


def test_nothing_is_a_hit_and_all_is_published(case: tuple[Path, PreTrainedModel]) -> None:
    """Neither what the engine has nor what the store brings; and who comes behind hits what was computed."""
    folder, model = case
    engine, store, prompt = make_engine(folder), Store(), make_prompt(61)
    first = drive(engine, [plain_request(engine, "warm", prompt)], store)
    request = scoring(engine, "scores", prompt)
    again = drive(engine, [request])
    assert request.num_local_hit_tokens == request.num_late_hit_tokens == 0
    assert again.ids("scores") == first.ids("warm")
    assert {block for _, block in again.published} == {block for _, block in first.published}
    check(request.prompt_logprobs, prompt, model)
    held = scoring(engine, "held", prompt)
    engine.add(held, hold=True)
    assert engine.import_blocks("held", store.payloads(held.block_hashes)) == 0
    engine.release("held")
    drive(engine)
    check(held.prompt_logprobs, prompt, model)
    cold = make_engine(folder)
    request = scoring(cold, "cold", prompt)
    drive(cold, [request])
    behind = plain_request(cold, "behind", prompt)
    drive(cold, [behind])
    assert behind.num_local_hit_tokens == 56
    assert_all_free(engine)
    assert_all_free(cold)


def test_preempted_ones_are_scored_once(case: tuple[Path, PreTrainedModel]) -> None:
    folder, model = case
    prompts = {name: make_prompt(30, seed) for seed, name in enumerate("abc")}
    engine = make_engine(folder, num_blocks=12, max_num_batched_tokens=16)
    requests = [
        scoring(engine, name, prompt, params=replace(GREEDY, max_tokens=20)) for name, prompt in prompts.items()
    ]
    drive(engine, requests)
    assert engine._scheduler._num_preempted
    for request in requests:
        check(request.prompt_logprobs, prompts[request.request_id], model)
        assert request.num_output_tokens == 20
    assert_all_free(engine)


def test_a_step_has_no_more_logits_than_are_allowed(
    case: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its token budget; and who asks for no scores takes what is left of it."""
    folder, model = case
    monkeypatch.setattr("engine.scheduler.MAX_SCORED_TOKENS", 20)
    engine = make_engine(folder, num_blocks=64, max_num_batched_tokens=512)
    rows, compute = [], engine._runner._model

    def counting(batch: ForwardBatch, cache: Tensor) -> Tensor:
        rows.append((len(batch.token_ids), len(batch.logits_indices)))
        return compute(batch, cache)

    engine._runner._model = counting
    prompts = {name: make_prompt(50, seed) for seed, name in enumerate("abc")}
    requests = [scoring(engine, name, prompt) for name, prompt in prompts.items()]
    drive(engine, [*requests, plain_request(engine, "plain", make_prompt(100, 9))])
    assert max(logits for _, logits in rows) <= 20 + len(requests) + 1
    assert rows[0] == (20 + 100, 20 + 1)
    for request in requests:
        check(request.prompt_logprobs, prompts[request.request_id], model)
    assert MAX_SCORED_TOKENS == 256


@pytest.mark.parametrize("num_top", [0, 1, VOCAB])
def test_alternatives(case: tuple[Path, PreTrainedModel], num_top: int) -> None:
    folder, model = case
    engine, prompt = make_engine(folder), make_prompt(SLICE_ROWS + 3)
    request = scoring(engine, "scores", prompt, num_top)
    drive(engine, [request])
    check(request.prompt_logprobs, prompt, model, num_top)


def test_ranks_count_likelier_tokens_only() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, float("-inf"), 1.0, 1.0]])
    scores = score(logits, [2, 1], 2)
    assert scores.ranks == [1, 4] and scores.logprobs[1] == float("-inf")
    assert scores.top_ids[2:] == [2, 3] and set(scores.top_ids[:2]) == {1, 2}
