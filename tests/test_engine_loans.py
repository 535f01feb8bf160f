"""Blocks that a held request has lent to a wire: nobody else gets them meanwhile, and all come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import NoRoom
from engine.request import Request, RequestStatus, SamplingParams

BLOCK_SIZE, NUM_BLOCKS = 4, 12
CONFIG = EngineConfig(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, max_model_len=40, num_threads=1)
PARAMS = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


@dataclass(frozen=True)
class Landed:
    view: memoryview

    def is_valid(self) -> bool:
        return True


@pytest.fixture
def engine(tiny_model_dir: Path) -> Engine:
    return Engine.from_pretrained(tiny_model_dir, CONFIG)


def held(engine: Engine, name: str = "r", num_tokens: int = 30) -> Request:
    request = Request(name, list(range(num_tokens)), num_tokens, PARAMS, engine.layout.root(), BLOCK_SIZE)
    engine.add(request, hold=True)
    return request


def run(engine: Engine, request: Request) -> list[int]:
    while not request.is_finished:
        for output in engine.step():
            engine.unpin([block.block_id for block in output.full_blocks])
    return request.token_ids[request.num_prompt_tokens :]


def exported(engine: Engine, num_tokens: int = 30) -> list[bytes]:
    """What the engine itself makes of the blocks of such a request."""
    request = Request("whole", list(range(num_tokens)), num_tokens, PARAMS, engine.layout.root(), BLOCK_SIZE)
    engine.add(request)
    blocks: dict[int, bytes] = {}
    while not request.is_finished:
        for output in engine.step():
            for number, block in enumerate(output.full_blocks, len(blocks)):
                data = bytearray(engine.layout.block_bytes)
                engine.export_blocks([block.block_id], [memoryview(data)])
                blocks[number] = bytes(data)
            engine.unpin([block.block_id for block in output.full_blocks])
    return [blocks[number] for number in sorted(blocks)]


def test_what_was_written_into_a_loan_is_imported_where_it_lies(tiny_model_dir: Path, engine: Engine) -> None:
    contents = exported(engine)
    expected = engine.generate([list(range(30))], PARAMS)[0]
    other = Engine.from_pretrained(tiny_model_dir, CONFIG)
    request = held(other)
    loan = other.lend_blocks(request, 5)
    assert loan is not None and list(loan.block_ids) == request.block_table[:5]
    for view, data in zip(loan.views, contents, strict=False):
        view[:] = data
    assert other.import_blocks("r", [Landed(view) for view in loan.views]) == 5
    other.end_loan(loan)
    other.check_integrity()
    other.release("r")
    assert request.num_store_hit_tokens == 20
    assert run(other, request) == expected
    other.check_integrity()


def test_garbage_that_was_never_imported_changes_nothing(engine: Engine) -> None:
    request = held(engine)
    loan = engine.lend_blocks(request, 7)
    assert loan is not None
    for view in loan.views:
        view[:] = b"\xff" * len(view)  # NaN
    engine.end_loan(loan)
    engine.release("r")
    tokens = run(engine, request)
    assert tokens == engine.generate([list(range(30))], PARAMS)[0]


END_HOLDS: dict[str, Callable[[Engine], None]] = {
    "abort": lambda engine: engine.abort("r"),
    "release": lambda engine: engine.release("r"),
}


@pytest.mark.parametrize("name", END_HOLDS)
def test_blocks_outlive_their_request_until_the_loan_ends(engine: Engine, name: str) -> None:
    request = held(engine)
    loan = engine.lend_blocks(request, 7)
    assert loan is not None
    END_HOLDS[name](engine)
    engine.check_integrity()
    engine.abort("r")
    assert engine.load().free_blocks == NUM_BLOCKS - 7
    with pytest.raises(NoRoom):
        held(engine, "next")
    engine.end_loan(loan)
    assert engine.load().free_blocks == NUM_BLOCKS
    engine.check_integrity()
    following = held(engine, "r")  # the name is free again
    again = engine.lend_blocks(following, 3)
    assert again is not None
    engine.end_loan(again)
    engine.abort("r")
    engine.check_integrity()


@pytest.mark.parametrize("ends_before", [True, False])
def test_kept_blocks_stay_pinned(engine: Engine, ends_before: bool) -> None:
    request = held(engine)
    loan = engine.lend_blocks(request, 7)
    assert loan is not None
    kept = list(loan.block_ids[1:3])
    if not ends_before:
        engine.abort("r")
    engine.end_loan(loan, kept)
    engine.check_integrity()
    engine.abort("r")
    assert engine.load().free_blocks == NUM_BLOCKS - 2
    engine.export_blocks(kept, [memoryview(bytearray(engine.layout.block_bytes)) for _ in kept])
    for block_id in kept:
        engine.unpin([block_id])
    assert engine.load().free_blocks == NUM_BLOCKS
    engine.check_integrity()


def test_a_second_loan_before_the_end_of_the_first_is_known(engine: Engine) -> None:
    request = held(engine)
    loans = [engine.lend_blocks(request, 3) for _ in range(2)]
    engine.abort("r")
    for loan in loans:
        assert loan is not None and loan.is_pinned
        engine.end_loan(loan)
    assert engine.load().free_blocks == NUM_BLOCKS


def test_who_holds_nothing_lends_nothing(engine: Engine) -> None:
    request = held(engine, num_tokens=3)
    assert engine.lend_blocks(request, 3) is None, "the block of the last token is computed"
    engine.abort("r")
    assert request.status is RequestStatus.FINISHED
    assert engine.lend_blocks(request, 3) is None
    waiting = Request("w", list(range(30)), 30, PARAMS, engine.layout.root(), BLOCK_SIZE)
    engine.add(waiting)
    assert engine.lend_blocks(waiting, 3) is None
