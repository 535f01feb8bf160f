"""The engine's tokens are those of transformers' `generate`, however the work is cut, shared, lost or moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from engine_driver import (
    BLOCK,
    GREEDY,
    MODELS,
    Run,
    Store,
    assert_all_free,
    drive,
    make_engine,
    make_model,
    make_prompt,
    make_request,
)

from engine.engine import Engine
from engine.request import FinishReason, Request, RequestStatus, SamplingParams

LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + BLOCK // 2)
PROMPTS = {str(length): make_prompt(length) for length in LENGTHS}
SAMPLED = {
    "hot": SamplingParams(temperature=1.3, seed=11, max_tokens=14),
    "filtered": SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, seed=12, max_tokens=14),
    "penalised": SamplingParams(
        temperature=0.9,
        repetition_penalty=1.2,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        seed=13,
        max_tokens=14,
        min_tokens=9,
        stop_token_ids=tuple(range(0, 80, 5)),
        logprobs=2,
    ),
}


@dataclass(frozen=True)
class Case:
    """A model, and what transformers and an engine that has nothing else to do make of the prompts."""

    folder: Path
    device: str
    greedy: dict[str, list[int]]

    def engine(self, **options: object) -> Engine:
        return make_engine(self.folder, device=self.device, **options)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param, folder)
    greedy: dict[str, list[int]] = {}
    for name, prompt in PROMPTS.items():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        greedy[name] = output[0, len(prompt) :].tolist()
    assert len({tuple(tokens) for tokens in greedy.values()}) == len(LENGTHS)
    return Case(folder, device, greedy)


def requests(engine: Engine, params: SamplingParams = GREEDY) -> list[Request]:
    return [make_request(engine, name, prompt, params) for name, prompt in PROMPTS.items()]


def outputs(run: Run) -> dict[str, list[int]]:
    return {name: run.ids(name) for name in PROMPTS}


def test_alone(case: Case) -> None:
    engine = case.engine(enable_prefix_caching=False)
    for name, prompt in PROMPTS.items():
        run = drive(engine, [make_request(engine, name, prompt)])
        assert run.ids(name) == case.greedy[name]
        assert run.reasons[name] is FinishReason.LENGTH
    assert_all_free(engine)


def test_in_a_mixed_batch(case: Case) -> None:
    engine = case.engine()
    assert outputs(drive(engine, requests(engine))) == case.greedy
    assert_all_free(engine)


@pytest.mark.parametrize("budget", [1, 5, BLOCK, 2 * BLOCK + 3])
def test_in_chunks(case: Case, budget: int) -> None:
    engine = case.engine(max_num_batched_tokens=budget)
    assert outputs(drive(engine, requests(engine))) == case.greedy
    assert_all_free(engine)


def test_joined_and_left_at_any_step(case: Case) -> None:
    engine = case.engine(max_num_batched_tokens=11, max_num_requests=3)
    late = requests(engine)
    run = Run()
    while late or engine.has_work():
        if late:
            engine.add(late.pop())
        for output in engine.step() + engine.step():
            run.tokens.setdefault(output.request_id, []).extend(output.tokens)
            engine.unpin([block.block_id for block in output.full_blocks])
    assert outputs(run) == case.greedy
    assert_all_free(engine)


@pytest.mark.parametrize("budget", [5, 64])
def test_with_a_prefix_hit(case: Case, budget: int) -> None:
    engine = case.engine(max_num_batched_tokens=budget)
    drive(engine, requests(engine))
    warm = requests(engine)
    run = drive(engine, warm)
    assert outputs(run) == case.greedy
    assert [request.num_local_hit_tokens for request in warm] == [(n - 1) // BLOCK * BLOCK for n in LENGTHS]
    # The second turn of a conversation: a prompt that goes on behind the first turn's output.
    name = str(LENGTHS[-1])
    turn = make_request(engine, "turn", [*PROMPTS[name], *case.greedy[name][:9]], replace(GREEDY, max_tokens=3))
    assert drive(engine, [turn]).ids("turn") == case.greedy[name][9:]
    assert turn.num_local_hit_tokens == (turn.num_prompt_tokens - 1) // BLOCK * BLOCK
    assert_all_free(engine)


@pytest.mark.parametrize("caching", [False, True])
def test_after_preemption(case: Case, caching: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="engine.scheduler")
    engine = case.engine(num_blocks=8, enable_prefix_caching=caching)
    run = drive(engine, requests(engine))
    assert outputs(run) == case.greedy
    assert "event=preempt" in caplog.text
    assert len(set(run.published)) == len(run.published)
    assert_all_free(engine)


@pytest.mark.parametrize("num_lost", [0, 1, 2])
def test_with_imported_blocks(case: Case, num_lost: int) -> None:
    """What one engine published, another one imports; blocks that the store lost are computed."""
    store = Store()
    first = case.engine(max_num_batched_tokens=10)
    drive(first, requests(first), store)
    second = case.engine(max_num_batched_tokens=10)
    moved = requests(second)
    for request in moved:
        second.add(request, hold=True)
        payloads = store.payloads(request.block_hashes)
        for payload in payloads[max(0, len(payloads) - num_lost) :]:
            payload.valid = False
        adopted = second.import_blocks(request.request_id, payloads)
        assert adopted == min((request.num_tokens - 1) // BLOCK, max(0, len(payloads) - num_lost))
        assert request.num_store_hit_tokens == request.num_computed_tokens == adopted * BLOCK
        second.release(request.request_id)
    run = drive(second)
    assert outputs(run) == case.greedy
    imported = {(r.request_id, h) for r in moved for h in r.block_hashes[: r.num_store_hit_tokens // BLOCK]}
    assert imported.isdisjoint(run.published)
    assert_all_free(second)


@pytest.mark.parametrize("way", ["in chunks", "hit", "preempted", "imported"])
def test_logits_are_within_a_ten_thousandth(case: Case, way: str) -> None:
    """Of each token's 20 most likely ones; as log probabilities, which is how logits leave an engine."""
    params = replace(GREEDY, logprobs=20)
    options = {"preempted": {"num_blocks": 8}, "in chunks": {"max_num_batched_tokens": 5}}.get(way, {})
    engine, store = case.engine(**options), Store()
    if way == "hit":
        drive(engine, requests(engine))
    if way == "imported":
        first = case.engine()
        drive(first, requests(first), store)
    going = requests(engine, params)
    for request in going if way == "imported" else ():
        engine.add(request, hold=True)
        engine.import_blocks(request.request_id, store.payloads(request.block_hashes))
        engine.release(request.request_id)
    run = drive(engine, () if way == "imported" else going)
    if way in ("hit", "imported"):
        cached = [request.num_local_hit_tokens + request.num_store_hit_tokens for request in going]
        assert cached == [(length - 1) // BLOCK * BLOCK for length in LENGTHS]
    reference = transformers.AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    for name, prompt in PROMPTS.items():
        text = torch.tensor([[*prompt, *case.greedy[name]]])
        with torch.no_grad():
            expected = reference(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert run.ids(name) == case.greedy[name]
        for row, token in zip(expected, run.tokens[name], strict=True):
            ids, values = zip(*token.top, strict=True)
            torch.testing.assert_close(torch.tensor(values), row[list(ids)], atol=1e-4, rtol=0)
    assert_all_free(engine)


@pytest.fixture(scope="module")
def sampled(case: Case) -> dict[str, dict[str, list[int]]]:
    """The text of each request when it is alone on a cold engine, for each kind of sampling."""
    texts: dict[str, dict[str, list[int]]] = {}
    for kind, params in SAMPLED.items():
        engine = case.engine(enable_prefix_caching=False)
        texts[kind] = {name: drive(engine, requests(engine, params)[i : i + 1]).ids(name) for i, name in numbered()}
    assert texts["hot"] != texts["filtered"]
    assert any(len(tokens) < 14 for tokens in texts["penalised"].values()), "no stop token was ever drawn"
    return texts


def numbered() -> list[tuple[int, str]]:
    return list(enumerate(PROMPTS))


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 6}, {"num_blocks": 8}], ids=str)
@pytest.mark.parametrize("kind", sorted(SAMPLED))
def test_sampled_text_does_not_hang_on_the_batch(
    case: Case, sampled: dict[str, dict[str, list[int]]], kind: str, options: dict[str, int]
) -> None:
    engine = case.engine(**options)
    for _ in ("cold", "warm"):
        assert outputs(drive(engine, requests(engine, SAMPLED[kind]))) == sampled[kind]
    assert_all_free(engine)


@pytest.mark.parametrize("handoffs", [(1,), (6,), (1, 4, 5)], ids=str)
@pytest.mark.parametrize("kind", sorted(SAMPLED))
def test_sampled_text_goes_on_over_engines(
    case: Case, sampled: dict[str, dict[str, list[int]]], kind: str, handoffs: Sequence[int]
) -> None:
    """After each handoff the request goes on in another engine, with what the store has of it."""
    store = Store()
    tokens = {name: list(prompt) for name, prompt in PROMPTS.items()}
    reasons = dict.fromkeys(tokens, FinishReason.HANDOFF)
    for handoff in (*handoffs, None):
        engine = case.engine(max_num_batched_tokens=20)
        going = [name for name, reason in reasons.items() if reason is FinishReason.HANDOFF]
        for name in going:
            request = make_request(engine, name, tokens[name], SAMPLED[kind], len(PROMPTS[name]), handoff)
            engine.add(request, hold=True)
            engine.import_blocks(name, store.payloads(request.block_hashes))
            engine.release(name)
        run = drive(engine, (), store)
        for name in going:
            tokens[name] += run.ids(name)
            reasons[name] = run.reasons[name]
        assert_all_free(engine)
    assert {name: tokens[name][len(prompt) :] for name, prompt in PROMPTS.items()} == sampled[kind]
    assert FinishReason.HANDOFF not in reasons.values()


def test_a_decode_leg_takes_over_the_first_token(case: Case) -> None:
    """The journey of a request: held for its prompt, filled with the prefill leg's blocks, started with its token."""
    store, params = Store(), SAMPLED["filtered"]
    whole = case.engine()
    expected = outputs(drive(whole, requests(whole, params)))
    prefill, decode = case.engine(), case.engine()
    for request in requests(decode, params):
        decode.add(request, hold=True)
    first = drive(
        prefill,
        [make_request(prefill, name, prompt, params, handoff_after=1) for name, prompt in PROMPTS.items()],
        store,
    )
    for name in PROMPTS:
        assert first.reasons[name] is FinishReason.HANDOFF
        request = decode.request(name)
        decode.import_blocks(name, store.payloads(request.block_hashes))
        decode.release(name, first.ids(name))
        assert request.status is RequestStatus.WAITING
        assert request.num_store_hit_tokens == (request.num_prompt_tokens - 1) // BLOCK * BLOCK
    rest = drive(decode)
    assert {name: first.ids(name) + rest.ids(name) for name in PROMPTS} == expected
    assert_all_free(decode)
    assert_all_free(prefill)
