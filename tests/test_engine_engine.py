"""The engine's own promises: what it refuses, when a request ends, what it reports, and that its books add up."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import (
    BLOCK,
    GREEDY,
    VOCAB,
    Store,
    StoredBlock,
    assert_all_free,
    drive,
    make_engine,
    make_model,
    make_prompt,
    make_request,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from engine.engine import Engine
from engine.errors import InvalidRequest, NoRoom, UnknownRequest
from engine.request import FinishReason, FullBlock, OutputToken, Request, RequestStatus, SamplingParams
from engine.runner import Runner
from engine.scheduler import Chunk
from engine.speed import RunSeconds, SpeedMeter, StepTiming
from kvstore.blocks import BlockHash


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", folder)
    return folder


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    engine = make_engine(folder)
    yield engine
    assert_all_free(engine)


# --- what is refused ---


def refused(engine: Engine, request: Request, field: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text) as caught:
        engine.add(request)
    assert caught.value.field == field
    assert not engine.has_work()


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    refused(engine, make_request(engine, "r", []), "prompt", "at least one token")


def test_tokens_outside_the_vocabulary_are_refused(engine: Engine) -> None:
    refused(engine, make_request(engine, "r", [1, VOCAB]), "prompt", str(VOCAB))
    with pytest.raises(InvalidRequest, match=str(VOCAB)):
        engine.add(make_request(engine, "r", [VOCAB]), hold=True)


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused(engine: Engine) -> None:
    assert engine.max_model_len == 256
    refused(engine, make_request(engine, "r", make_prompt(256)), "prompt", "at most 255 tokens.*got 256")
    run = drive(engine, [make_request(engine, "r", make_prompt(255))])
    assert len(run.tokens["r"]) == 1 and run.reasons["r"] is FinishReason.LENGTH


def test_the_longest_request_is_capped_to_what_the_pool_can_hold(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(folder, num_blocks=4)
    assert engine.max_model_len == 4 * BLOCK
    assert "max_model_len_capped" in caplog.text
    with pytest.raises(InvalidRequest, match=f"at most {4 * BLOCK - 1} tokens"):
        engine.add(make_request(engine, "r", make_prompt(4 * BLOCK)))
    request = make_request(engine, "r", make_prompt(5), replace(GREEDY, max_tokens=1000))
    assert drive(engine, [request]).reasons["r"] is FinishReason.LENGTH
    assert request.num_tokens == 4 * BLOCK
    assert_all_free(engine)


def test_the_pool_is_as_large_as_the_bytes_given(folder: Path) -> None:
    block_bytes = make_engine(folder).layout.block_bytes
    assert block_bytes == 3 * 2 * BLOCK * 2 * 16 * 4
    assert make_engine(folder, num_blocks=0, kv_cache_bytes=9 * block_bytes + 1).load().total_blocks == 9


def test_a_live_id_cannot_be_taken_twice(engine: Engine) -> None:
    engine.add(make_request(engine, "r", [1]))
    with pytest.raises(InvalidRequest, match="'r' is taken") as caught:
        engine.add(make_request(engine, "r", [2]), hold=True)
    assert caught.value.field == "request_id"
    engine.abort("r")
    drive(engine, [make_request(engine, "r", [1])])
    drive(engine, [make_request(engine, "r", [1])])


def test_another_block_size_is_refused(engine: Engine) -> None:
    request = Request("r", [1, 2], 2, GREEDY, engine.layout.root(), 2 * BLOCK)
    refused(engine, request, "block_size", f"must be {BLOCK}")


def test_tokens_sampled_elsewhere_are_checked(engine: Engine) -> None:
    engine.add(make_request(engine, "r", make_prompt(254)), hold=True)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        engine.release("r", [VOCAB])
    with pytest.raises(InvalidRequest, match="at most 255"):
        engine.release("r", [1, 2])
    assert engine.request("r").num_tokens == 254
    engine.abort("r")


def test_only_held_requests_take_blocks_and_tokens(engine: Engine) -> None:
    for act in (lambda: engine.release("r"), lambda: engine.import_blocks("r", []), lambda: engine.request("r")):
        with pytest.raises(UnknownRequest):
            act()
    engine.add(make_request(engine, "r", [1]))
    with pytest.raises(UnknownRequest, match="not held, it is waiting"):
        engine.release("r", [1])
    engine.abort("r")


# --- how a request ends ---


def greedy_tokens(engine: Engine, prompt: list[int], count: int) -> list[int]:
    return engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=count))[0]


def test_a_stop_token_ends_a_request_and_is_part_of_it(engine: Engine) -> None:
    tokens = greedy_tokens(engine, [5], 10)
    params = SamplingParams(temperature=0.0, max_tokens=10, stop_token_ids=(tokens[4], VOCAB + 7))
    run = drive(engine, [make_request(engine, "r", [5], params)])
    assert run.ids("r") == tokens[: tokens.index(tokens[4]) + 1]
    assert run.reasons["r"] is FinishReason.STOP


def test_the_models_end_token_ends_a_request_unless_ignored(folder: Path, tmp_path: Path) -> None:
    tokens = greedy_tokens(make_engine(folder), [5], 10)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{VOCAB - 1}, {tokens[3]}]}}')
    engine = make_engine(tmp_path)
    end = tokens.index(tokens[3]) + 1
    run = drive(engine, [make_request(engine, "r", [5], replace(GREEDY, max_tokens=10))])
    assert run.ids("r") == tokens[:end] and run.reasons["r"] is FinishReason.STOP
    run = drive(engine, [make_request(engine, "r", [5], replace(GREEDY, max_tokens=10, ignore_eos=True))])
    assert run.ids("r") == tokens and run.reasons["r"] is FinishReason.LENGTH


def test_min_tokens_holds_an_end_off(engine: Engine) -> None:
    tokens = greedy_tokens(engine, [5], 3)
    params = SamplingParams(temperature=0.0, max_tokens=20, min_tokens=6, stop_token_ids=tuple(tokens))
    run = drive(engine, [make_request(engine, "r", [5], params)])
    assert len(run.ids("r")) > 6
    assert set(run.ids("r")[:6]).isdisjoint(tokens)


def test_max_tokens_counts_the_tokens_of_earlier_nodes(engine: Engine) -> None:
    request = make_request(engine, "r", [5, 6, 7, 8], replace(GREEDY, max_tokens=5), num_prompt_tokens=1)
    run = drive(engine, [request])
    assert len(run.ids("r")) == 2
    assert (request.num_output_tokens, request.num_new_tokens) == (5, 2)


def test_an_end_wins_over_a_handoff(engine: Engine) -> None:
    tokens = greedy_tokens(engine, [5], 2)
    params = replace(GREEDY, max_tokens=9)
    stop = replace(params, stop_token_ids=(tokens[1],))
    run = drive(
        engine,
        [
            make_request(engine, "handoff", [5], params, handoff_after=2),
            make_request(engine, "stop", [5], stop, handoff_after=2),
            make_request(engine, "length", [5], replace(params, max_tokens=2), handoff_after=2),
        ],
    )
    assert run.reasons == {
        "handoff": FinishReason.HANDOFF,
        "stop": FinishReason.STOP,
        "length": FinishReason.LENGTH,
    }


def test_logprobs_come_with_the_tokens(engine: Engine) -> None:
    run = drive(engine, [make_request(engine, "r", [5], replace(GREEDY, logprobs=3, max_tokens=2))])
    for token in run.tokens["r"]:
        assert isinstance(token, OutputToken) and token.logprob is not None
        assert len(token.top) == 3 and token.top[0] == (token.token_id, pytest.approx(token.logprob))


# --- blocks in and out ---


def test_a_hold_without_room_keeps_nothing(folder: Path) -> None:
    engine = make_engine(folder, num_blocks=4)
    engine.add(make_request(engine, "a", make_prompt(2 * BLOCK)), hold=True)
    with pytest.raises(NoRoom, match="1 blocks free"):
        engine.add(make_request(engine, "b", make_prompt(BLOCK)), hold=True)
    assert engine.load().free_blocks == 1
    engine.check_integrity()
    assert not engine.has_work() and engine.step() == []
    engine.abort("a")
    engine.add(make_request(engine, "b", make_prompt(BLOCK)), hold=True)
    engine.abort("b")
    assert_all_free(engine)


def full_blocks(engine: Engine, prompt: list[int]) -> list[FullBlock]:
    """Runs a prompt for one token; its full blocks, still pinned."""
    engine.add(make_request(engine, "pinned", prompt, replace(GREEDY, max_tokens=1)))
    return [block for output in engine.step() for block in output.full_blocks]


def exported(engine: Engine, blocks: list[FullBlock]) -> list[bytes]:
    buffers = [bytearray(engine.layout.block_bytes) for _ in blocks]
    engine.export_blocks([block.block_id for block in blocks], [memoryview(buffer) for buffer in buffers])
    return [bytes(buffer) for buffer in buffers]


def test_pinned_blocks_outlive_their_request(folder: Path) -> None:
    engine = make_engine(folder, num_blocks=4)
    blocks = full_blocks(engine, make_prompt(2 * BLOCK))
    before = exported(engine, blocks)
    assert len(set(before)) == 2
    assert engine.load().free_blocks == 2
    drive(engine, [make_request(engine, "r", make_prompt(BLOCK, seed=1), replace(GREEDY, max_tokens=BLOCK))])
    assert exported(engine, blocks) == before
    engine.unpin([block.block_id for block in blocks])
    assert_all_free(engine)


def test_blocks_that_are_not_pinned_are_neither_exported_nor_unpinned(engine: Engine) -> None:
    blocks = full_blocks(engine, make_prompt(BLOCK))
    block_ids = [block.block_id for block in blocks]
    engine.unpin(block_ids)
    with pytest.raises(ValueError, match="not pinned"):
        exported(engine, blocks)
    with pytest.raises(ValueError, match="not pinned"):
        engine.unpin(block_ids)
    blocks = full_blocks(engine, make_prompt(BLOCK, seed=2))
    with pytest.raises(ValueError, match="not pinned that often"):
        engine.unpin([blocks[0].block_id, blocks[0].block_id])
    with pytest.raises(ValueError):
        engine.export_blocks([blocks[0].block_id], [memoryview(bytearray(7))])
    engine.unpin([blocks[0].block_id])


def test_a_payload_of_a_wrong_length_is_a_miss(folder: Path, engine: Engine) -> None:
    prompt = make_prompt(2 * BLOCK + 1)
    other = make_engine(folder)
    store = Store()
    drive(other, [make_request(other, "r", prompt)], store)
    request = make_request(engine, "r", prompt)
    engine.add(request, hold=True)
    first, second = store.payloads(request.block_hashes)
    assert engine.import_blocks("r", [StoredBlock(first.view[:-1]), second]) == 0
    assert engine.import_blocks("r", [first]) == 1
    assert engine.import_blocks("r", [second, second, second]) == 1
    assert request.num_store_hit_tokens == 2 * BLOCK
    engine.abort("r")


def test_imported_blocks_are_hits_for_the_next_request(folder: Path, engine: Engine) -> None:
    prompt = make_prompt(3 * BLOCK)
    other, store = make_engine(folder), Store()
    expected = drive(other, [make_request(other, "r", prompt)], store).ids("r")
    first = make_request(engine, "first", prompt)
    engine.add(first, hold=True)
    assert engine.import_blocks("first", store.payloads(first.block_hashes)) == 2
    second = make_request(engine, "second", prompt)
    engine.add(second, hold=True)
    assert second.num_local_hit_tokens == 2 * BLOCK
    assert second.block_table[:2] == first.block_table[:2]
    assert engine.import_blocks("second", store.payloads(first.block_hashes)[2:]) == 0  # it holds the last token
    engine.abort("first")
    engine.release("second")
    assert drive(engine).ids("second") == expected


def test_a_hold_shares_its_local_hit_and_gives_it_back(engine: Engine) -> None:
    prompt = make_prompt(2 * BLOCK + 3)
    expected = drive(engine, [make_request(engine, "cold", prompt)]).ids("cold")
    warm = make_request(engine, "warm", prompt)
    engine.add(warm, hold=True)
    assert (warm.num_local_hit_tokens, warm.num_computed_tokens, warm.num_published_blocks) == (16, 16, 0)
    engine.check_integrity()
    engine.release("warm")
    run = drive(engine)
    assert run.ids("warm") == expected
    # Reported whole: the store may have lost what this engine still has.
    assert [block_hash for _, block_hash in run.published] == warm.block_hashes[:3]


def test_more_streams_than_a_step_takes_get_the_tokens_that_each_gets_alone(folder: Path) -> None:
    prompts = [make_prompt(2 * BLOCK + length, seed=length) for length in range(5)]
    other, store = make_engine(folder), Store()
    alone = [drive(other, [make_request(other, "r", prompt)], store).ids("r") for prompt in prompts]
    engine = make_engine(folder, max_num_requests=2)
    requests = [make_request(engine, str(number), prompt) for number, prompt in enumerate(prompts)]
    for request, ids in zip(requests, alone, strict=True):
        engine.add(request, hold=True)
        engine.import_blocks(request.request_id, store.payloads(request.block_hashes))
        engine.release(request.request_id, ids[:1])
    while engine.has_work():
        outputs = engine.step()
        assert 1 <= len(outputs) <= 2
        for output in outputs:
            engine.unpin([block.block_id for block in output.full_blocks])
        counts = [request.num_new_tokens for request in requests]
        assert max(counts) - min(counts) <= 1, "all go on, as fast as each other"
    assert [request.token_ids[request.num_prompt_tokens :] for request in requests] == alone
    assert_all_free(engine)


def test_export_runs_beside_the_steps(engine: Engine) -> None:
    blocks = full_blocks(engine, make_prompt(4 * BLOCK))
    before = exported(engine, blocks)
    differing: list[int] = []

    def export() -> None:
        for turn in range(200):
            if exported(engine, blocks) != before:
                differing.append(turn)

    thread = threading.Thread(target=export)
    thread.start()
    drive(engine, [make_request(engine, str(i), make_prompt(9, seed=i)) for i in range(6)])
    thread.join()
    assert not differing
    engine.unpin([block.block_id for block in blocks])


# --- abort, at any time ---


def test_abort_in_every_status(engine: Engine) -> None:
    engine.abort("never added")
    held, waiting, running, done = (
        make_request(engine, name, make_prompt(20)) for name in ("held", "waiting", "run", "done")
    )
    drive(engine, [done])
    engine.add(running)
    for output in engine.step():
        engine.unpin([block.block_id for block in output.full_blocks])
    engine.add(held, hold=True)
    engine.add(waiting)
    for request in (held, waiting, running, done):
        reason = request.finish_reason
        engine.abort(request.request_id)
        engine.abort(request.request_id)
        assert request.finish_reason is (reason or FinishReason.ABORT)
        assert request.status is RequestStatus.FINISHED and not request.block_table
        engine.check_integrity()
    assert engine.step() == []


class Chaos(RuleBasedStateMachine):
    """Any order of add, hold, import, release, abort, unpin and step; each text that ends must be the one alone."""

    folder: Path  # these three are filled in by the test
    expected: dict[int, list[int]]  # by prompt number
    published: dict[BlockHash, bytes]
    prompts = tuple([*make_prompt(2 * BLOCK, seed=n % 2), *make_prompt(n, seed=9)] for n in (1, 3, 8, 12))
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=10)

    @initialize(budget=st.integers(1, 40), num_blocks=st.integers(5, 12), caching=st.booleans())
    def start(self, budget: int, num_blocks: int, caching: bool) -> None:
        self.store = Store(self.published)
        self.engine = make_engine(
            self.folder, max_num_batched_tokens=budget, num_blocks=num_blocks, enable_prefix_caching=caching
        )
        self.live: dict[str, tuple[int, Request]] = {}
        self.pins: list[list[int]] = []
        self.count = 0

    @rule(number=st.integers(0, 3), hold=st.booleans(), num_valid=st.integers(0, 4))
    def arrive(self, number: int, hold: bool, num_valid: int) -> None:
        self.count += 1
        request = make_request(self.engine, str(self.count), self.prompts[number], self.params)
        try:
            self.engine.add(request, hold)
        except NoRoom:
            return
        self.live[request.request_id] = (number, request)
        if hold:
            payloads = self.store.payloads(request.block_hashes)[request.num_computed_tokens // BLOCK :]
            for payload in payloads[num_valid:]:  # their slots were given to others meanwhile
                payload.view, payload.valid = memoryview(b"\xff" * self.engine.layout.block_bytes), False
            self.engine.import_blocks(request.request_id, payloads)

    def held(self) -> list[str]:
        return [name for name, (_, request) in self.live.items() if request.status is RequestStatus.HELD]

    @rule(num_tokens=st.integers(0, 4))
    def release(self, num_tokens: int) -> None:
        for name in self.held()[:1]:
            self.engine.release(name, self.expected[self.live[name][0]][:num_tokens])

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.live:
            name = data.draw(st.sampled_from(sorted(self.live)))
            self.engine.abort(name)
            del self.live[name]

    @rule()
    def unpin(self) -> None:
        if self.pins:
            self.engine.unpin(self.pins.pop(0))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.engine.step():
                self.pins.append([block.block_id for block in output.full_blocks])
                if output.finish_reason is not None:
                    number, request = self.live.pop(output.request_id)
                    assert request.token_ids[request.num_prompt_tokens :] == self.expected[number]

    @invariant()
    def books_add_up(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.live:
            while self.pins:
                self.unpin()
            for _ in self.held():
                self.release(1)
            self.step(1)
        while self.pins:
            self.unpin()
        assert_all_free(self.engine)


def test_any_order_of_calls_keeps_the_text_and_the_books(folder: Path) -> None:
    store = Store()
    Chaos.folder, Chaos.expected, Chaos.published = folder, {}, store.blocks
    for number, prompt in enumerate(Chaos.prompts):
        other = make_engine(folder)
        Chaos.expected[number] = drive(other, [make_request(other, "r", prompt, Chaos.params)], store).ids("r")
    run_state_machine_as_test(Chaos, settings=settings(max_examples=150, stateful_step_count=30, deadline=None))


# --- load ---


def test_load_counts_what_is_there(engine: Engine) -> None:
    assert engine.load().prefill_tokens_per_s == engine.load().decode_step_s == 0.0
    engine.add(make_request(engine, "held", make_prompt(10)), hold=True)
    engine.add(make_request(engine, "long", make_prompt(100), replace(GREEDY, max_tokens=2)))
    engine.add(make_request(engine, "waiting", make_prompt(30, seed=4)))
    outputs = engine.step()
    load = engine.load()
    assert (load.num_running, load.num_waiting) == (1, 2)
    assert load.queued_prefill_tokens == 10 + (100 - 64) + 30
    assert load.free_blocks == load.total_blocks - 2 - 13
    assert load.prefill_tokens_per_s > 0.0 and load.decode_step_s == 0.0
    for output in outputs:
        engine.unpin([block.block_id for block in output.full_blocks])
    engine.abort("held")
    drive(engine)
    assert engine.load().decode_step_s > 0.0


def test_a_token_takes_as_many_steps_as_there_are_turns(folder: Path) -> None:
    engine = make_engine(folder, max_num_requests=2)
    for name in "abc":
        engine.add(make_request(engine, name, make_prompt(3, seed=ord(name)), GREEDY), hold=True)
        engine.release(name, [1])
    for _ in range(3):
        engine.step()
    assert engine.load().num_running == 3
    assert engine.load().decode_step_s == pytest.approx(1.5 * engine._speed.decode_step_s)
    engine.abort("c")
    assert engine.load().decode_step_s == engine._speed.decode_step_s > 0.0
    for name in "ab":
        engine.abort(name)
    assert_all_free(engine)


def test_speeds_are_those_of_the_steps() -> None:
    request = Request("r", [1], 1, GREEDY, BlockHash(bytes(16)), BLOCK)
    decode, prefill, tail = (Chunk(request, 0, count, True) for count in (1, 500, 10))
    meter = SpeedMeter()
    meter.observe([prefill], 0.5)
    assert meter.prefill_tokens_per_s == pytest.approx(1000) and meter.decode_step_s == 0.0
    meter.observe([decode, decode], 0.02)
    assert meter.decode_step_s == pytest.approx(0.02) and meter.prefill_tokens_per_s == pytest.approx(1000)
    meter.observe([tail], 0.02)  # 500 tokens/s, but few of them
    assert 950 < meter.prefill_tokens_per_s < 1000
    assert meter.long_prefill_tokens_per_s == pytest.approx(1000), "tails say nothing about long prompts"
    for _ in range(100):
        meter.observe([decode, prefill], 0.25)
    assert meter.prefill_tokens_per_s == pytest.approx(2000, rel=0.01)
    assert meter.long_prefill_tokens_per_s == pytest.approx(2000, rel=0.01)
    assert meter.decode_step_s == pytest.approx(0.25, rel=0.01)
    meter.forget()
    assert meter.decode_step_s == meter.prefill_tokens_per_s == 0.0
    assert meter.long_prefill_tokens_per_s == pytest.approx(2000, rel=0.01)


def test_without_a_long_prompt_tails_say_how_fast_one_would_be() -> None:
    request = Request("r", [1], 1, GREEDY, BlockHash(bytes(16)), BLOCK)
    meter = SpeedMeter()
    assert meter.long_prefill_tokens_per_s == 0.0
    meter.observe([Chunk(request, 0, 10, True)], 0.02)
    assert meter.long_prefill_tokens_per_s == pytest.approx(500)


def test_timing_of_a_step_counts_its_work() -> None:
    request = Request("r", [1], 1, GREEDY, BlockHash(bytes(16)), BLOCK)
    chunks = [Chunk(request, 30, 1, True), Chunk(request, 7, 1, True), Chunk(request, 16, 20, False)]
    one = StepTiming.of_step(chunks, 0.5, RunSeconds(build_s=1.0, forward_s=2.0, sample_s=4.0))
    assert one == StepTiming(1, 0.5, 1.0, 2.0, 4.0, 20, 16, 2, 37)
    assert StepTiming() + one == one
    assert one + one == StepTiming(2, 1.0, 2.0, 4.0, 8.0, 40, 32, 4, 74)


def test_timing_adds_up_over_steps(folder: Path) -> None:
    engine = make_engine(folder)
    assert engine.timing == StepTiming()
    run = drive(engine, [make_request(engine, "r", make_prompt(100))])  # 64 + 36, then a token a step
    timing = engine.timing
    assert timing.num_steps == run.num_steps == 2 + GREEDY.max_tokens - 1
    assert (timing.num_prefill_tokens, timing.num_prefill_context_tokens) == (100, 64)
    assert timing.num_decode_tokens == GREEDY.max_tokens - 1
    assert timing.num_decode_context_tokens == sum(range(100, 100 + GREEDY.max_tokens - 1))
    assert min(timing.schedule_s, timing.build_s, timing.forward_s, timing.sample_s) > 0.0
    assert engine.step() == [] and engine.timing == timing, "an empty step is none"


def test_a_request_starts_with_the_first_step_that_has_it(folder: Path) -> None:
    engine = make_engine(folder)
    first, second = (make_request(engine, name, make_prompt(100, seed)) for seed, name in enumerate(("a", "b")))
    engine.add(first)
    engine.add(second)
    outputs = engine.step()  # the first one takes the whole budget
    began = first.started_s
    assert began is not None and second.started_s is None
    outputs += engine.step()
    assert second.started_s is not None and second.started_s > began
    assert first.started_s == began
    for output in outputs:
        engine.unpin([block.block_id for block in output.full_blocks])
    drive(engine)


@pytest.mark.parametrize("options", [{}, {"num_blocks": 1}, {"max_num_batched_tokens": 1}, {"max_model_len": 1}])
def test_warm_up_leaves_nothing_but_warmth(folder: Path, options: dict[str, int]) -> None:
    engine, cold = make_engine(folder, **options), make_engine(folder, **options)
    told: list[tuple[int, int]] = []
    engine.warm_up(lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(told[-1][1] + 1)), "each step, and the end"
    assert_all_free(engine)
    assert engine.timing == StepTiming() and engine.load() == cold.load()


def test_warm_up_runs_a_prefill_and_a_decode_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(folder)
    sizes: list[list[int]] = []
    run = Runner.run

    def note(runner: Runner, chunks: Sequence[Chunk]) -> Any:
        sizes.append([chunk.num_tokens for chunk in chunks])
        return run(runner, chunks)

    monkeypatch.setattr(Runner, "run", note)
    engine.warm_up()
    assert sizes == [[64], [1], [64]], "the last one is measured"


@pytest.mark.parametrize(("speed", "expected"), [(500, [64]), (1000, [64, 128]), (100_000, [64, 128, 200])])
def test_warm_up_measures_longer_prompts_until_one_takes_its_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, speed: int, expected: list[int]
) -> None:
    engine = make_engine(folder, max_num_batched_tokens=200)
    sizes: list[int] = []
    observe = SpeedMeter.observe

    def note(meter: SpeedMeter, chunks: Sequence[Chunk], _seconds: float) -> None:
        sizes.append(chunks[0].num_tokens)
        observe(meter, chunks, chunks[0].num_tokens / speed)

    monkeypatch.setattr(SpeedMeter, "observe", note)
    engine.warm_up()
    assert sizes == [64, 1, *expected]
    assert engine.long_prefill_tokens_per_s == pytest.approx(speed)
    assert engine.load().prefill_tokens_per_s == 0.0, "a router is told of requests alone"


def test_nobody_hits_what_warm_up_computed(folder: Path) -> None:
    engine = make_engine(folder)
    engine.warm_up()
    request = make_request(engine, "r", range(64))
    drive(engine, [request])
    assert request.num_local_hit_tokens == 0


def test_warm_up_comes_before_the_first_request(folder: Path) -> None:
    engine = make_engine(folder)
    engine.add(make_request(engine, "r", make_prompt(5)))
    with pytest.raises(ValueError, match="before its first request"):
        engine.warm_up()


def test_generate_says_so_when_others_hold_the_blocks(folder: Path) -> None:
    engine = make_engine(folder, num_blocks=2)
    engine.add(make_request(engine, "held", make_prompt(9)), hold=True)
    with pytest.raises(NoRoom, match="held or pinned"):
        engine.generate([[1]], GREEDY)
