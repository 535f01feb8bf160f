"""A request's tokens at temperature 0 in fp32 do not depend on who else is in its steps, nor on their order or size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_driver import BLOCK, MODELS, assert_all_free, drive, make_engine, make_model, make_prompt, make_request

from engine.engine import Engine
from engine.request import SamplingParams

LENGTHS = (1, BLOCK, 29)  # tokens of the prompts that are watched
PARAMS = SamplingParams(temperature=0.0, max_tokens=24)
MAX_NEIGHBOURS = 6


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(folder: Path, device: str, budget: int = 64) -> Engine:
    return make_engine(folder, device=device, max_num_batched_tokens=budget, num_blocks=128)


def tokens_in_company(engine: Engine, length: int, seed: int) -> list[int]:
    """Neighbours of random lengths join at random steps; they end, or are aborted, while the watched request runs."""
    chance = random.Random(seed)
    watched = make_request(engine, "watched", make_prompt(length), PARAMS)
    started = chance.randrange(4)
    neighbours: list[str] = []
    step = 0
    while not watched.is_finished:
        if step == started:
            engine.add(watched)
        if len(neighbours) < MAX_NEIGHBOURS and chance.random() < 0.5:
            name = f"neighbour {step}"
            prompt = make_prompt(chance.randint(1, 60), seed + step + 1)
            params = SamplingParams(temperature=0.0, max_tokens=chance.randint(1, 12))
            neighbour = make_request(engine, name, prompt, params)
            neighbour.priority = chance.randint(-1, 1)
            engine.add(neighbour)
            neighbours.append(name)
        if neighbours and chance.random() < 0.1:
            engine.abort(neighbours.pop(chance.randrange(len(neighbours))))
        for output in engine.step():
            engine.unpin([block.block_id for block in output.full_blocks])
            if output.finish_reason is not None and output.request_id in neighbours:
                neighbours.remove(output.request_id)
        step += 1
    for name in neighbours:
        engine.abort(name)
    assert_all_free(engine)
    return watched.token_ids[length:]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_neighbours_and_chunks_move_no_token(tmp_path: Path, device: str, name: str) -> None:
    make_model(name, tmp_path)
    for length in LENGTHS:
        alone = make(tmp_path, device)
        expected = drive(alone, [make_request(alone, "watched", make_prompt(length), PARAMS)]).ids("watched")
        assert len(set(expected)) > 3, "a text that never changes shows nothing"
        for seed, budget in enumerate((64, 64, 17, 5, 1)):
            assert tokens_in_company(make(tmp_path, device, budget), length, seed) == expected, (length, budget)


@pytest.mark.parametrize("budget", [16, 5])
def test_what_a_sibling_has_computed_moves_no_token(tmp_path: Path, device: str, budget: int) -> None:
    """Both have their blocks before either has computed any; the second takes over what the first has made."""
    make_model("llama", tmp_path)
    prompts = [[*make_prompt(6 * BLOCK), tail, 3] for tail in (1, 2)]
    expected = [
        drive(engine, [make_request(engine, "alone", prompt, PARAMS)]).ids("alone")
        for prompt in prompts
        for engine in [make(tmp_path, device)]
    ]
    engine = make(tmp_path, device, budget)
    requests = [make_request(engine, name, prompt, PARAMS) for name, prompt in zip("ab", prompts, strict=True)]
    for request in requests:
        engine.add(request, hold=True)
    for request in requests:
        engine.release(request.request_id)
    while not all(request.is_finished for request in requests):
        for output in engine.step():
            engine.unpin([block.block_id for block in output.full_blocks])
    assert [request.token_ids[len(prompts[0]) :] for request in requests] == expected
    assert sum(request.num_late_hit_tokens for request in requests) > 4 * BLOCK
    assert_all_free(engine)
