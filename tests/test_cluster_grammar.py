"""Grammars through the whole cluster: what a client gets, also when nodes are killed in the middle of a text."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import POCKET, RedisProcess
from harness import Answer, ProcessCluster

from batonpb import common_pb2

pytestmark = [pytest.mark.cluster]

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 20},
        "pages": {"type": "integer", "minimum": 1, "maximum": 9999},
        "parts": {"type": "array", "items": {"enum": ["syntax", "types", "modules"]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["title", "pages", "parts"],
    "additionalProperties": False,
}
REGEX = "[a-z]{3,9}( [a-z]{1,9}){2,4}[.!]"
CHOICES = ["a generator", "a function", "None of them"]
PROMPT = "".join(f"Section {n} of the library reference. " for n in range(12)) + "Which book is that?\n"
OPTIONS: dict[str, Any] = {"json_schema": json.dumps(SCHEMA), "temperature": 0.9, "seed": 3, "max_tokens": 400}


@pytest.fixture
async def cluster(redis_process: RedisProcess, short_dir: Path) -> AsyncIterator[ProcessCluster]:
    cluster = ProcessCluster(POCKET, redis_process.url, short_dir, max_num_batched_tokens=64)
    cluster.router_options = {"progress_timeout_s": 5.0, "max_attempts": 8}
    try:
        await cluster.start(prefill=1, decode=1, both=1)
        yield cluster
    finally:
        await cluster.stop()


async def test_each_kind_of_grammar_and_a_bias(cluster: ProcessCluster) -> None:
    answers = await asyncio.gather(
        cluster.generate(PROMPT, **OPTIONS),
        cluster.generate(PROMPT, regex=REGEX, temperature=1.2, seed=5, max_tokens=100),
        cluster.generate(PROMPT, choice=common_pb2.ChoiceGrammar(choices=CHOICES)),
        cluster.generate(PROMPT, json_object=True, logit_bias={ord("}"): 100.0}),
        cluster.generate(PROMPT, logit_bias={ord("x"): 100.0}, max_tokens=5),
        cluster.generate(PROMPT, max_tokens=5, ignore_eos=True),
    )
    assert [answer.finish_reason for answer in answers[:4]] == 4 * [common_pb2.FINISH_REASON_STOP]
    jsonschema.validate(json.loads(answers[0].text), SCHEMA)
    assert re.fullmatch(REGEX, answers[1].text) and answers[2].text in CHOICES and answers[3].text == "{}"
    assert answers[4].text == "xxxxx" and answers[5].usage.output_tokens == 5
    await cluster.assert_quiet()


async def test_a_text_goes_on_when_its_node_is_killed_at_any_token(cluster: ProcessCluster) -> None:
    whole = await cluster.generate(PROMPT, **OPTIONS)
    jsonschema.validate(json.loads(whole.text), SCHEMA)
    count = len(whole.token_ids)
    for place in (1, 2, count // 2, count - 2, count - 1):
        killed: list[str] = []

        async def kill(answer: Answer, place: int = place, killed: list[str] = killed) -> None:
            if len(answer.token_ids) >= place and not killed:
                loads = {name: await cluster.load(name) for name in ("decode-0", "both-0")}
                killed += [name for name, load in loads.items() if load.num_running] or ["both-0"]
                cluster.kill(killed[0])

        answer = await cluster.generate(PROMPT, kill, **OPTIONS)
        assert (answer.text, answer.token_ids) == (whole.text, whole.token_ids), f"killed {killed} at {place}"
        assert answer.finish_reason == common_pb2.FINISH_REASON_STOP and killed
        name = killed[0]
        await cluster.processes[name].stop()
        await cluster.start_node(name, name.split("-")[0])
        await cluster.wait_for_nodes(3)
