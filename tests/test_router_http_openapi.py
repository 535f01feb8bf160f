"""/openapi.json, and what schemathesis makes of it: requests that fit and that do not, against a real router."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from http_support import get, talking
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from router_fakes import FakeCluster
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

SETTINGS = settings(
    max_examples=6,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
PATHS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{model}",
    "/tokenize",
    "/detokenize",
    "/health",
    "/ready",
    "/version",
}


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    async with talking(redis_url, metrics=True) as cluster:
        yield cluster


async def test_the_page(cluster: FakeCluster) -> None:
    status, _, page = await get(f"{cluster.http_url}/openapi.json")
    assert status == 200 and page["openapi"] == "3.1.0" and set(page["paths"]) == PATHS
    fields = page["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["temperature"]["maximum"] == 2 and "user" in fields and fields["suffix"] == {"enum": [None, ""]}
    for schema in page["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
async def test_what_schemathesis_sends(redis_url: str, mode: GenerationMode) -> None:
    """No request breaks the router, and each answer is one that the page knows: status, type, headers and body."""
    async with talking(redis_url, metrics=True, max_model_len=48) as cluster:
        _, _, page = await get(f"{cluster.http_url}/openapi.json")
        counts = await asyncio.to_thread(send_all, page, cluster.http_url, mode)
        assert (await get(f"{cluster.http_url}/health"))[0] == 200
        assert cluster.active == 0
    if mode == GenerationMode.POSITIVE:
        assert set(counts) == PATHS
        assert all(counts[path][200] for path in PATHS - {"/v1/models/{model}"}), counts
    else:
        assert counts["/v1/chat/completions"][400] and counts["/v1/completions"][400]


def mend(body: dict[str, Any]) -> None:
    """Keeps the rules that no JSON schema says: what goes with what, what the model takes, what is still to come."""
    body.pop("messages" if body.get("prompt") else "prompt", None)
    if not {"messages", "prompt", "tokens"} & set(body):
        body["prompt"] = "x"  # one of them must be there
    for turn in body.get("messages") or ():
        turn["content"] = turn.get("content") or "x"
        turn["role"] = "user" if turn["role"] in ("tool", "assistant") else turn["role"]
        for name in ("tool_calls", "tool_call_id", "name"):
            turn.pop(name, None)
    for name in MENDED & set(body):
        del body[name]


MENDED = set(
    "stream_options best_of tools tool_choice response_format structured_outputs guided_json guided_regex model n stop "
    "guided_choice max_completion_tokens max_tokens min_tokens top_logprobs echo stop_token_ids logit_bias ttft_slo_ms "
    "tpot_slo_ms add_special_tokens".split()
)


def send_all(page: dict[str, Any], url: str, mode: GenerationMode) -> dict[str, Counter[int]]:
    """Paths to how often they gave which status."""
    counts: dict[str, Counter[int]] = {}
    for operation in (found.ok() for found in schemathesis.openapi.from_dict(page).get_all_operations()):
        statuses = counts[operation.path] = Counter()
        try:
            strategy = operation.as_strategy(generation_mode=mode)
            _send(strategy, url, statuses, is_mended=mode == GenerationMode.POSITIVE)
        except Unsatisfiable:  # nothing about it can be wrong
            continue
    return counts


def _send(strategy: SearchStrategy[schemathesis.Case], url: str, statuses: Counter[int], is_mended: bool) -> None:
    @given(case=strategy)
    @SETTINGS
    def send(case: schemathesis.Case) -> None:
        if is_mended and isinstance(case.body, dict):
            mend(case.body)
        response = case.call(base_url=url, timeout=20)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    send()
