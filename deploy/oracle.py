"""The output of a single engine: `python -m deploy.oracle` reads requests as JSON and prints their tokens and texts.

A process of its own, so that its caller needs no torch. Knows no cluster: a prompt is tokenised, run alone on a fresh
fp32 engine, and turned back into text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.config import DeployError

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Question:
    """`token_ids` is the prompt; `sampling` has the names of `engine.request.SamplingParams`."""

    token_ids: Sequence[int]
    sampling: dict[str, Any]


def ask(model_dir: Path, questions: Sequence[Question]) -> list[list[int]]:
    """Output tokens, one list per question, from an engine in a process of its own. Raises `DeployError`."""
    text = json.dumps({"model_dir": str(model_dir), "questions": [asdict(question) for question in questions]})
    command = [sys.executable, "-m", "deploy.oracle"]
    # On cores that others use too, torch's threads spend most of their time waiting for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, input=text, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if result.returncode != 0:
        raise DeployError(f"the engine alone failed: {result.stderr.strip().splitlines()[-1:]}")
    answer: list[list[int]] = json.loads(result.stdout)
    return answer


def _run(model_dir: Path, questions: Sequence[Question]) -> list[list[int]]:
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.request import SamplingParams

    engine = Engine.from_pretrained(model_dir, EngineConfig(dtype="float32", enable_prefix_caching=False))
    return [engine.generate([q.token_ids], SamplingParams(**q.sampling))[0] for q in questions]


def main() -> None:
    given = json.load(sys.stdin)
    print(json.dumps(_run(Path(given["model_dir"]), [Question(**fields) for fields in given["questions"]])))


if __name__ == "__main__":
    main()
