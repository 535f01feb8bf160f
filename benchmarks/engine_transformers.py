"""The side of transformers in benchmarks/engine.py: `generate` of all prompts as one batch."""

from __future__ import annotations

import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.engine_worker import Step, Task, serve
from benchmarks.worker_process import take_stdout


class Clock(BaseStreamer):  # type: ignore[misc]  # transformers is not typed for us
    """Is given the prompts first, and then the tokens of each step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._start_s = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        tokens = value.numel() if value.dim() == 1 else 0  # prompts have two dimensions
        self.steps.append(Step(time.perf_counter() - self._start_s, tokens))

    def end(self) -> None:
        pass


def main() -> None:
    answers = take_stdout()
    folder, threads, begin_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None

    def run(task: Task) -> list[Step]:
        clock = Clock()
        ids = torch.tensor(task.prompts)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task.max_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        return clock.steps

    serve(answers, begin_s, f"transformers {transformers.__version__}, torch {torch.__version__}", run)


if __name__ == "__main__":
    main()
