"""vLLM's side of benchmarks/engine.py, run by the Python of its own environment; the same lines in and out."""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    folder, begin_s = sys.argv[1], float(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")  # vLLM writes to standard output too
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=8192,
        max_num_seqs=64,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def run(prompts: list[list[int]], max_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == max_tokens for output in outputs)

    run([[1, 2, 3]], 1)
    print(json.dumps(time.time() - begin_s), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        start = time.perf_counter()
        run(task["prompts"], task["max_tokens"])
        print(json.dumps(time.perf_counter() - start), file=answers, flush=True)


if __name__ == "__main__":
    main()
