"""An engine on several ranks, each in a process of its own, that answers prompts: `python tests/rank_process.py JSON`.

Rank 0 reads JSON lines of prompts and answers with lines of tokens; the others follow it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.follower import Follower
from engine.parallel import RankGroup
from engine.request import SamplingParams
from engine.shard import Shard


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    shard = Shard.of_rank(options["rank"], options["tp"], options["pp"])
    group = RankGroup(shard, options["address"], torch.device("cpu"))
    config = EngineConfig(**options["engine"])
    if shard.rank:
        Follower(Path(options["folder"]), config, group).run()
        return
    engine = Engine.from_pretrained(Path(options["folder"]), config, group)
    print("READY", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(engine.generate(job["prompts"], SamplingParams(**job["params"]))), flush=True)
    engine.check_integrity()
    engine.close()


if __name__ == "__main__":
    main()
