"""One rank of models on several: `python tests/rank_process.py RANK`. Each line of its input is a job, as JSON.

A job names a folder, how it is cut, where its ranks meet, and prompts; rank 0 answers with a line, all tokens and the
last prompt's logprobs, the others follow it. One process does many jobs, for most of the time of each would go into
importing torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.follower import Follower
from engine.parallel import RankGroup, open_meeting
from engine.request import PromptLogprobs, Request, SamplingParams
from engine.shard import Shard


def main() -> None:
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        shard = Shard.of_rank(rank, job["tp"], job["pp"])
        group = RankGroup(shard, open_meeting(job["address"], leads=rank == 0), torch.device("cpu"))
        config, folder = EngineConfig(**job["engine"]), Path(job["folder"])
        if rank:
            Follower(folder, config, group).run()
            continue
        engine = Engine.from_pretrained(folder, config, group)
        print("READY", flush=True)
        if job.get("waits"):
            sys.stdin.readline()
        answers = [engine.generate(job["prompts"], SamplingParams(**params)) for params in job["params"]]
        scores = logprobs_of(engine, job["prompts"][-1])
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
    main()
