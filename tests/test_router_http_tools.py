"""Tools and grammars over HTTP, with the official `openai` client: what it sends, and what it reads."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from http_support import post
from openai import AsyncOpenAI
from pydantic import BaseModel
from router_fakes import FakeCluster, running, saying
from tools_support import model_folder

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
SPOKEN = "Let me look.\n" + CALL
ARGUMENTS = '{"city": "Zürich"}'
HELLO: list[Any] = [{"role": "user", "content": "Is it raining?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS}}
]


class City(BaseModel):
    city: str


@asynccontextmanager
async def client_of(redis_url: str, folder: Path, text: str) -> AsyncIterator[tuple[AsyncOpenAI, FakeCluster]]:
    """A model that says `text`, and knows tools."""
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0", saying(text))
        await cluster.open(model_folder(folder / "pocket"))
        async with AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client:
            yield client, cluster


async def test_a_call_and_its_answer(redis_url: str, tmp_path: Path) -> None:
    async with client_of(redis_url, tmp_path, SPOKEN) as (client, cluster):
        answer = await client.chat.completions.create(model="pocket", messages=HELLO, tools=TOOLS)
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
        [call] = choice.message.tool_calls or ()
        assert call.type == "function" and call.id.startswith("call_")
        assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)
        turns = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
        await client.chat.completions.create(model="pocket", messages=turns, tools=TOOLS, tool_choice="auto")
        prompt = bytes(id for id in cluster.nodes["both0"].seen.admits[1].token_ids if id < 256).decode()
        assert "Of a city." in prompt and CALL in prompt and "It rains." in prompt and call.id in prompt


async def test_streamed_calls(redis_url: str, tmp_path: Path) -> None:
    async with client_of(redis_url, tmp_path, f"{SPOKEN}\n{CALL}") as (client, _):
        ask: dict[str, Any] = {"model": "pocket", "messages": HELLO, "tools": TOOLS}
        async with client.chat.completions.stream(**ask) as stream:
            final = await stream.get_final_completion()
        calls = final.choices[0].message.tool_calls or []
        assert final.choices[0].finish_reason == "tool_calls" and final.choices[0].message.content == "Let me look."
        assert [call.function.arguments for call in calls] == [ARGUMENTS] * 2
        assert len({call.id for call in calls}) == 2
        single = await client.chat.completions.create(**ask, parallel_tool_calls=False)
        assert len(single.choices[0].message.tool_calls or ()) == 1


async def test_a_call_alone_has_no_content(redis_url: str, tmp_path: Path) -> None:
    async with client_of(redis_url, tmp_path, CALL) as (client, _):
        tools = [openai.pydantic_function_tool(City, name="weather")]  # with strict: true
        answer = await client.chat.completions.parse(model="pocket", messages=HELLO, tools=tools)
        message = answer.choices[0].message
        assert message.content is None and message.tool_calls is not None
        assert message.tool_calls[0].function.parsed_arguments == City(city="Zürich")


async def test_an_answer_in_a_schema(redis_url: str, tmp_path: Path) -> None:
    async with client_of(redis_url, tmp_path, ARGUMENTS) as (client, cluster):
        answer = await client.chat.completions.parse(model="pocket", messages=HELLO, response_format=City)
        assert answer.choices[0].message.parsed == City(city="Zürich")
        [request] = cluster.nodes["both0"].seen.admits
        assert json.loads(request.sampling.json_schema)["required"] == ["city"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}, "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"guided_json": "{"}, "guided_json"),
        ({"logit_bias": {"7": 101}}, "logit_bias"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"n": 17}, "n"),
    ],
)
async def test_what_is_refused_is_named_as_the_client_named_it(
    redis_url: str, tmp_path: Path, body: dict[str, Any], param: str
) -> None:
    async with client_of(redis_url, tmp_path, SPOKEN) as (_, cluster):
        status, _, answer = await post(f"{cluster.http_url}/v1/chat/completions", {"messages": HELLO} | body)
        assert (status, answer["error"]["param"]) == (400, param), answer
        assert answer["error"]["message"].startswith(f"{param}: ")
