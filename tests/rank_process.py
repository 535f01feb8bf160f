"""One rank of models on several: `python tests/rank_process.py RANK`. Each line of its input is a job, as JSON.

A job names a folder, how it is cut, where its ranks meet, and prompts; rank 0 answers with a line, all tokens and, with
`scores`, the last prompt's logprobs; the others follow it. One process does many jobs, for most of each would go
into importing torch.

With `meets`, a folder, two stages keep each other waiting: see `Meeting`. With `log`, a file, rank 0 notes each part of
a step that it has computed.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import RanksDisagree
from engine.follower import Follower
from engine.parallel import RankGroup, open_meeting
from engine.request import PromptLogprobs, Request, SamplingParams
from engine.shard import Shard

MEET_S = 20.0


class Meeting:
    """The first of two stages does not go on within part k + 1 before the second is within part k, and the reverse.

    Each part's begin is a file. Stages that take turns would wait for each other in vain.
    """

    def __init__(self, folder: Path, num_parts: int) -> None:
        self._folder, self._last = folder, num_parts - 1
        self._parts = [0, 0]  # begun by this process, of either stage

    def begin(self, stage: int) -> None:
        part = self._parts[stage]
        self._parts[stage] += 1
        (self._folder / f"{stage}-{part}").touch()
        other = part - 1 if stage == 0 else part + 1
        if 0 <= other <= self._last:
            self._wait_for(self._folder / f"{1 - stage}-{other}")

    def _wait_for(self, file: Path) -> None:
        deadline_s = time.monotonic() + MEET_S
        while not file.exists():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{file.name} has not begun")
            time.sleep(0.001)


def before(fn: Any, do: Any) -> Any:
    def call(*arguments: Any) -> Any:
        do()
        return fn(*arguments)

    return call


def behind(fn: Any, do: Any) -> Any:
    def call(*arguments: Any) -> Any:
        answer = fn(*arguments)
        do()
        return answer

    return call


def note(log: Path) -> None:
    with log.open("a") as file:
        file.write(f"{time.monotonic()}\n")


def main() -> None:
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        shard = Shard.of_rank(rank, job["tp"], job["pp"])
        group = RankGroup(shard, open_meeting(job["address"], leads=rank == 0), torch.device("cpu"))
        config, folder = (
            EngineConfig(**job["engine"]),
            Path(job["folders"][rank] if "folders" in job else job["folder"]),
        )
        meeting = Meeting(Path(job["meets"]), job["num_parts"]) if "meets" in job else None
        if rank:
            if meeting is not None:  # what it computes on is there
                group.take_over = behind(group.take_over, partial(meeting.begin, 1))
            Follower(folder, config, group).run()
            continue
        engine = Engine.from_pretrained(folder, config, group)
        led: Any = engine._led
        if meeting is not None:
            led._model = before(led._model, partial(meeting.begin, 0))
        if "log" in job:
            led._model = behind(led._model, partial(note, Path(job["log"])))
        print("READY", flush=True)
        if job.get("waits"):
            sys.stdin.readline()
        answers = [engine.generate(job["prompts"], SamplingParams(**params)) for params in job["params"]]
        scores = logprobs_of(engine, job["prompts"][-1]) if job.get("scores") else []
        engine.check_integrity()
        engine.close()
        print(json.dumps([answers, scores]), flush=True)


def logprobs_of(engine: Engine, prompt: list[int]) -> list[float]:
    scores, root = PromptLogprobs(num_top=1), engine.layout.root()
    request = Request("scores", list(prompt), len(prompt), SamplingParams(max_tokens=1), root, engine.layout.block_size)
    request.prompt_logprobs = scores
    engine.add(request)
    while not request.is_finished:
        for output in engine.step():
            engine.unpin([block.block_id for block in output.full_blocks])
    return scores.logprobs


if __name__ == "__main__":
    try:
        main()
    except RanksDisagree as error:
        sys.exit(print(error, flush=True) or 1)
