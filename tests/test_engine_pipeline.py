"""Two stages compute different chunks of one prompt at the same time, and neither gets far ahead of the other.

Nothing here is measured by a clock: stages wait for each other inside of their work, or one of them is stopped.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_driver import make_engine, make_prompt
from test_engine_parallel import OPTIONS, Ranks, folders, running_ranks

from engine.ranks import MAX_PARTS_A_STAGE
from engine.request import SamplingParams

__all__ = ["folders"]

PROMPT = make_prompt(240, seed=9)
NUM_STEPS = len(PROMPT) // OPTIONS["max_num_batched_tokens"]
ONE_TOKEN = {"temperature": 0.0, "max_tokens": 1}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with running_ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> list[list[int]]:
    engine = make_engine(folders["llama"], max_num_batched_tokens=OPTIONS["max_num_batched_tokens"])
    return engine.generate([PROMPT], SamplingParams(**ONE_TOKEN))


def test_a_stage_computes_a_chunk_while_the_other_is_in_the_one_before(
    ranks: Ranks, folders: dict[str, Path], alone: list[list[int]], tmp_path: Path
) -> None:
    """Within each part of each step but the first, the first stage waits until the second one is in the part before."""
    num_parts = 2 * NUM_STEPS
    assert num_parts == 10
    work = {"prompts": [PROMPT], "params": [ONE_TOKEN], "meets": str(tmp_path), "num_parts": num_parts}
    ranks.send(folders["llama"], 1, 2, **work)
    assert json.loads(ranks.hear())[0] == [alone]
    begun = {file.name for file in tmp_path.iterdir()}
    assert begun == {f"{stage}-{part}" for stage in (0, 1) for part in range(num_parts)}


def test_a_stage_that_is_held_up_holds_up_the_others(
    ranks: Ranks, folders: dict[str, Path], alone: list[list[int]], tmp_path: Path
) -> None:
    """More than one part is under way, but not more than two for each stage: what waits takes memory."""
    log = tmp_path / "log"
    work = {"prompts": [PROMPT], "params": [ONE_TOKEN], "log": str(log)}
    ranks.send(folders["llama"], 1, 2, waits=True, **work)
    leader, follower = ranks.processes
    follower.send_signal(signal.SIGSTOP)
    try:
        ranks.say(leader, "go on")
        deadline_s = time.monotonic() + 20
        while num_parts(log) < 2 * MAX_PARTS_A_STAGE and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.5)  # in which it would go on
        assert num_parts(log) == 2 * MAX_PARTS_A_STAGE < 2 * NUM_STEPS
    finally:
        follower.send_signal(signal.SIGCONT)
    assert json.loads(ranks.hear())[0] == [alone]
    assert num_parts(log) == 2 * NUM_STEPS


def num_parts(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0
