"""Baton's side of benchmarks/engine.py: one engine in this process; a JSON task a line in, seconds a line out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import SamplingParams


def main() -> None:
    folder, threads, begin_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(threads)
    config = EngineConfig(
        dtype="bfloat16", kv_cache_bytes=2 << 30, max_num_batched_tokens=2048, enable_prefix_caching=False
    )
    engine = Engine.from_pretrained(folder, config)
    engine.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=1))
    print(json.dumps(time.time() - begin_s), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        params = SamplingParams(temperature=0.0, max_tokens=task["max_tokens"], ignore_eos=True)
        start = time.perf_counter()
        outputs = engine.generate(task["prompts"], params)
        seconds = time.perf_counter() - start
        assert all(len(tokens) == task["max_tokens"] for tokens in outputs)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
