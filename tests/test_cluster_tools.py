"""Required calls of tools through the whole cluster: whatever is sampled is a call of the tool, in its schema."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from conftest import RedisProcess
from harness import ProcessCluster
from openai import AsyncOpenAI, BadRequestError
from tools_support import model_folder

from batonpb import common_pb2, inference_pb2

pytestmark = [pytest.mark.cluster]

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 31}},
}
SCHEMAS: dict[str, Any] = {"weather": WEATHER, "now": {"type": "object", "additionalProperties": False}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
HELLO: list[Any] = [{"role": "user", "content": "Is it raining in Rome? " * 8}]
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
ASKED: dict[str, Any] = {"model": "pocket", "messages": HELLO, "tools": TOOLS, "temperature": 1.3, "max_tokens": 400}
TAGS = (str(ord("{")), str(ord("<")))  # what an answer and a call begin with
CALLED = common_pb2.FINISH_REASON_TOOL_CALLS


@pytest.fixture
async def cluster(redis_process: RedisProcess, short_dir: Path, tmp_path: Path) -> AsyncIterator[ProcessCluster]:
    folder = model_folder(tmp_path / "pocket", with_weights=True)
    cluster = ProcessCluster(folder, redis_process.url, short_dir, max_num_batched_tokens=64)
    cluster.router_options = {"progress_timeout_s": 5.0}
    try:
        await cluster.start(prefill=1, decode=1, both=1)
        yield cluster
    finally:
        await cluster.stop()


def check_call(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


async def test_over_http_whatever_is_sampled_is_a_call(cluster: ProcessCluster) -> None:
    address = cluster.processes["router"].record["http_address"]
    async with AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
        create = client.chat.completions.create
        answers = await asyncio.gather(
            *(create(**ASKED, tool_choice="required", parallel_tool_calls=False, seed=seed) for seed in range(4)),
            *(create(**ASKED, tool_choice=NAMED, seed=seed) for seed in range(4)),
        )
        called = []
        for answer in answers:
            [choice] = answer.choices
            assert choice.finish_reason == "tool_calls" and choice.message.content is None
            [call] = choice.message.tool_calls or ()
            assert call.type == "function"
            check_call(call.function.name, call.function.arguments)
            called.append((call.function.name, call.function.arguments))
        assert {name for name, _ in called[:4]} == {"weather", "now"} and len(set(called)) > 4
        assert {name for name, _ in called[4:]} == {"weather"}

        options = {"tool_choice": NAMED, "seed": 1, "stream_options": {"include_usage": True}}
        async with client.chat.completions.stream(**ASKED, **options) as stream:
            final = await stream.get_final_completion()
        [call] = final.choices[0].message.tool_calls or ()
        assert final.choices[0].finish_reason == "tool_calls" and not final.choices[0].message.content
        assert (call.function.name, call.function.arguments) == called[4 + 1]  # the same as at once
        assert final.usage is not None and final.usage.completion_tokens > 10

        parallel = await create(**ASKED, tool_choice="required", seed=3, logit_bias={"257": -100})
        calls = parallel.choices[0].message.tool_calls or []
        assert len(calls) > 1 and parallel.choices[0].finish_reason == "length"
        for call in calls:
            assert call.type == "function"
            check_call(call.function.name, call.function.arguments)

        schema = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"]}
        form: Any = {"type": "json_schema", "json_schema": {"name": "r", "schema": schema | SCHEMAS["now"]}}
        either = await asyncio.gather(*(create(**ASKED, response_format=form, logit_bias={tag: 100}) for tag in TAGS))
        first, second = (answer.choices[0] for answer in either)
        assert first.finish_reason == "stop" and set(json.loads(first.message.content or "")) == {"rain"}
        assert second.message.tool_calls

        with pytest.raises(BadRequestError) as error:
            await create(**ASKED, response_format=form, tool_choice="required")
        assert error.value.param == "tool_choice"
        unknown: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "what"}}}
        with pytest.raises(BadRequestError) as error:
            await create(**ASKED | {"tools": [unknown]}, tool_choice="required")
        assert error.value.param == "tools"
    await cluster.assert_quiet()


async def test_over_grpc_and_when_a_node_is_killed_in_the_middle(cluster: ProcessCluster) -> None:
    chat = inference_pb2.ChatPrompt(tool_choice=inference_pb2.TOOL_CHOICE_REQUIRED, tool_name="weather")
    chat.messages.add(role="user", content=HELLO[0]["content"])
    chat.tools.add(name="weather", parameters=json.dumps(WEATHER))
    chat.tools.add(name="now")
    sampling = common_pb2.SamplingParams(temperature=1.3, seed=11, max_tokens=400)
    request = inference_pb2.GenerateRequest(chat=chat, sampling=sampling)

    async def run(kills: bool) -> tuple[str, str, int]:
        num_tokens, calls, last = 0, [], inference_pb2.GenerateResponse()
        async for last in cluster.stub.Generate(request):
            assert not last.text
            calls += last.tool_calls
            num_tokens += len(last.tokens)
            if kills and num_tokens >= 20:
                kills = False
                loads = {name: await cluster.load(name) for name in ("decode-0", "both-0")}
                cluster.kill(next(name for name, load in loads.items() if load.num_running))
        [call] = calls
        assert last.finish_reason == CALLED
        check_call(call.name, call.arguments)
        return call.name, call.arguments, last.timeline.migrations

    whole = await run(kills=False)
    killed = await run(kills=True)
    assert killed[:2] == whole[:2] and killed[2] > whole[2] == 0

    request.chat.tools[0].parameters = '{"uniqueItems": true}'
    with pytest.raises(grpc.aio.AioRpcError, match=r"prompt\.chat\.tools: parameters of 'weather': Unimplem") as error:
        await run(kills=False)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
