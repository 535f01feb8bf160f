"""JSON becomes the messages that gRPC takes: each option of each message, and nothing that is lost on the way."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from http_support import talking

from batonpb import common_pb2, inference_pb2
from router.errors import InvalidRequest
from router.http_body import parse_object
from router.http_models import ChatRequest, CompletionRequest, TokenizeRequest, read
from router.http_requests import Asked, ask_chat, ask_completion, ask_tokens
from router.validate import check_sampling

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}
SCHEMA_TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{}}}'
USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": True}}

# Each field of SamplingParams: what JSON says, and what the message holds then.
SAMPLING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({"temperature": 0}, {"temperature": 0.0}),
    "top_k": ({"top_k": 5}, {"top_k": 5}),
    "top_p": ({"top_p": 0.5}, {"top_p": 0.5}),
    "min_p": ({"min_p": 0.25}, {"min_p": 0.25}),
    "repetition_penalty": ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "presence_penalty": ({"presence_penalty": -1}, {"presence_penalty": -1.0}),
    "frequency_penalty": ({"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
    "seed": ({"seed": -1}, {"seed": 2**64 - 1}),
    "max_tokens": ({"max_tokens": 7}, {"max_tokens": 7}),
    "min_tokens": ({"min_tokens": 2}, {"min_tokens": 2}),
    "stop_token_ids": ({"stop_token_ids": [1, 2]}, {"stop_token_ids": [1, 2]}),
    "stop": ({"stop": "x"}, {"stop": ["x"]}),
    "logprobs": ({"logprobs": 3}, {"logprobs": 3}),
    "ignore_eos": ({"ignore_eos": True}, {"ignore_eos": True}),
    "include_stop_str_in_output": ({"no_stop_trim": True}, {"include_stop_str_in_output": True}),
    "logit_bias": ({"logit_bias": {"7": -1, "0": 2.5}}, {"logit_bias": {7: -1.0, 0: 2.5}}),
    "json_schema": ({"guided_json": SCHEMA}, {"json_schema": SCHEMA_TEXT}),
    "regex": ({"guided_regex": "a+"}, {"regex": "a+"}),
    "choice": ({"guided_choice": ["a", "b"]}, {"choice": common_pb2.ChoiceGrammar(choices=["a", "b"])}),
    "json_object": ({"response_format": {"type": "json_object"}}, {"json_object": True}),
}
# Likewise of GenerateRequest, for a completion.
REQUEST: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model": ({"model": "pocket"}, {"model": "pocket"}),
    "request_id": ({}, {"request_id": "id"}),
    "text": ({"prompt": "Hé"}, {"text": "Hé"}),
    "tokens": ({"prompt": [1, 2]}, {"tokens": inference_pb2.TokenPrompt(token_ids=[1, 2])}),
    "ttft_slo_ms": ({"ttft_slo_ms": 5}, {"ttft_slo_ms": 5}),
    "tpot_slo_ms": ({"tpot_slo_ms": 6}, {"tpot_slo_ms": 6}),
    "priority": ({"priority": -3}, {"priority": -3}),
    "n": ({"n": 4}, {"n": 4}),
    "echo": ({"echo": True}, {"echo": True}),
    "prompt_logprobs": ({"prompt_logprobs": 3}, {"prompt_logprobs": 3}),
}
ELSEWHERE = {"sampling", "chat"}  # whose fields have tests of their own


def names(descriptor: Descriptor) -> set[str]:
    return {field.name for field in descriptor.fields}


def completion(**body: Any) -> Asked:
    return ask_completion(read(CompletionRequest, parse_object(json.dumps(body).encode())), "id")


def chat(**body: Any) -> Asked:
    whole = {"messages": [USER]} | body
    return ask_chat(read(ChatRequest, parse_object(json.dumps(whole).encode())), "id")


def sampling_of(asked: Asked) -> common_pb2.SamplingParams:
    return asked.messages[0].sampling


def test_no_option_is_forgotten() -> None:
    """A field that somebody adds to the proto is to be had over HTTP, too, or this fails."""
    assert set(SAMPLING) | {"lark"} == names(common_pb2.SamplingParams.DESCRIPTOR)  # which no client may set
    assert set(REQUEST) | ELSEWHERE == names(inference_pb2.GenerateRequest.DESCRIPTOR)


@pytest.mark.parametrize("name", sorted(SAMPLING))
def test_sampling(name: str) -> None:
    body, fields = SAMPLING[name]
    expected = common_pb2.SamplingParams(**({"max_tokens": 16} | fields))
    assert sampling_of(completion(prompt="x", **body)) == expected
    check_sampling(expected)
    if name != "logprobs":
        assert sampling_of(chat(**body)) == common_pb2.SamplingParams(**fields)


@pytest.mark.parametrize("name", sorted(REQUEST))
def test_requests(name: str) -> None:
    body, fields = REQUEST[name]
    sampling = common_pb2.SamplingParams(max_tokens=16)
    given = {"request_id": "id", "sampling": sampling} | ({} if "prompt" in body else {"text": "x"}) | fields
    [message] = completion(**({"prompt": "x"} | body)).messages
    assert message == inference_pb2.GenerateRequest(**given)


def test_nothing_given_is_nothing_set() -> None:
    """Defaults are the core's; but a completion has OpenAI's 16 tokens."""
    expected = inference_pb2.GenerateRequest(request_id="id")
    expected.chat.messages.add(role="user", content="Hello")
    expected.sampling.SetInParent()
    nulls = dict.fromkeys(set(ChatRequest.model_fields) - {"messages"})
    for asked in (chat(), chat(**nulls), chat(user="me", store=True, metadata={"a": "b"}, service_tier="auto")):
        assert list(asked.messages) == [expected]
        assert not asked.is_stream and not asked.includes_usage and asked.num_answers == 1


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"response_format": {"type": "text"}}, {}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            {"json_schema": SCHEMA_TEXT},
        ),
        ({"guided_json": SCHEMA_TEXT}, {"json_schema": SCHEMA_TEXT}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA_TEXT}),
        ({"structured_outputs": {"regex": "a|b"}}, {"regex": "a|b"}),
        ({"structured_outputs": {"choice": ["a"]}}, {"choice": common_pb2.ChoiceGrammar(choices=["a"])}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"regex": "a|b"}, {"regex": "a|b"}),
        ({"json_schema": SCHEMA_TEXT}, {"json_schema": SCHEMA_TEXT}),
        ({"json_schema": SCHEMA}, {"json_schema": SCHEMA_TEXT}),
        ({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
        ({"include_stop_str_in_output": False, "no_stop_trim": False}, {}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop": []}, {}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
        ({"logprobs": False}, {}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
    ],
)
def test_other_ways_to_say_it(body: dict[str, Any], fields: dict[str, Any]) -> None:
    assert sampling_of(chat(**body)) == common_pb2.SamplingParams(**fields)


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0.0, "max_completion_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
        {"temperature": 0.7, "n": 1, "stream": True, "stop": None, "tools": [TOOL], "parallel_tool_calls": True},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "ignore_eos": True},
        {"messages": [{"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None}]},
        {"frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": None, "functions": None},
        {
            **{
                "no_stop_trim": False,
                "ignore_eos": False,
                "continue_final_message": False,
                "return_hidden_states": False,
            },
            **{"skip_special_tokens": True, "separate_reasoning": True, "stream_reasoning": True, "stream": False},
        },
        {
            **{"top_k": -1, "min_p": 0.0, "min_tokens": 0, "regex": None, "ebnf": None, "repetition_penalty": 1.0},
            **{"stop_token_ids": None, "lora_path": None, "session_params": None, "chat_template_kwargs": None},
            **{"rid": None, "bootstrap_host": None, "bootstrap_room": None, "reasoning_effort": "medium"},
        },
        {
            "add_generation_prompt": True,
            "spaces_between_special_tokens": True,
            "include_reasoning": True,
            "vllm_xargs": {},
            **{"truncation_side": None, "logprob_token_ids": None, "return_token_offsets": False},
            **{"stream_interval": None, "repetition_detection": None, "routed_experts_prompt_start": 0},
        },
    ],
    ids=[
        *("vllm bench", "langchain", "vllm bench, parts", "openai's own answer", "defaults spelled out"),
        *("sglang-router", "sglang's defaults", "vllm's defaults"),
    ],
)
def test_what_known_clients_send(body: dict[str, Any]) -> None:
    """Shapes that are sent by them, each taken as it is."""
    assert chat(model="pocket", **body).messages
    ask = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None, "stream": True}
    assert completion(model="pocket", prompt="x", stream_options={"include_usage": True}, **ask).includes_usage


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"session_params": {"id": "x"}}, "session_params"),
        ({"return_hidden_states": True}, "return_hidden_states"),
        ({"lora_path": "x"}, "lora_path"),
        ({"cache_salt": "x"}, "cache_salt"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"separate_reasoning": "no"}, "separate_reasoning"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"reasoning_effort": "a lot"}, "reasoning_effort"),
    ],
)
def test_what_would_change_the_answer_and_is_not_there(body: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**body)
    assert caught.value.field == name


def test_all_of_a_chat() -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1+2"}, {"type": "text", "text": "?"}], "name": "me"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    setting = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    setting |= {"add_generation_prompt": False, "continue_final_message": True}
    asked = chat(messages=turns, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **setting)
    prompt = inference_pb2.ChatPrompt(
        tool_choice=inference_pb2.TOOL_CHOICE_REQUIRED,
        single_tool_call=True,
        chat_template_kwargs='{"enable_thinking":false}',
        reasoning_effort="low",
        add_generation_prompt=False,
        continue_final_message=True,
    )
    prompt.messages.add(role="system", content="Be brief.")
    prompt.messages.add(role="user", content="1+2\n?", name="me")
    prompt.messages.add(role="assistant").tool_calls.add(id="c1", name="add", arguments="{}")
    prompt.messages.add(role="tool", content="3", tool_call_id="c1")
    prompt.tools.add(name="add", description="Adds.", parameters=SCHEMA_TEXT)
    assert asked.messages[0].chat == prompt and asked.is_single_call
    all_fields = {name for message in (prompt, *prompt.messages, *prompt.tools) for name in _set_fields(message)}
    every = [inference_pb2.ChatPrompt, inference_pb2.ChatMessage, inference_pb2.Tool]
    assert all_fields | {"tool_name"} == {name for kind in every for name in names(kind.DESCRIPTOR)}


def _set_fields(message: Any) -> list[str]:
    fields: list[FieldDescriptor] = [field for field, _ in message.ListFields()]
    return [field.name for field in fields]


@pytest.mark.parametrize(
    ("choice", "expected", "name"),
    [
        ("auto", inference_pb2.TOOL_CHOICE_AUTO, ""),
        ("none", inference_pb2.TOOL_CHOICE_NONE, ""),
        ("required", inference_pb2.TOOL_CHOICE_REQUIRED, ""),
        ({"type": "function", "function": {"name": "add"}}, inference_pb2.TOOL_CHOICE_REQUIRED, "add"),
    ],
)
def test_tool_choices(choice: Any, expected: int, name: str) -> None:
    prompt = chat(tools=[TOOL], tool_choice=choice).messages[0].chat
    assert (prompt.tool_choice, prompt.tool_name) == (expected, name)


def test_several_prompts() -> None:
    asked = completion(prompt=[[1], [2, 3]], n=2, seed=5)
    assert [list(message.tokens.token_ids) for message in asked.messages] == [[1], [2, 3]]
    assert [message.request_id for message in asked.messages] == ["id-0", "id-1"]
    assert {message.n for message in asked.messages} == {2} and asked.num_answers == 2


def test_what_is_tokenised() -> None:
    text = ask_tokens(read(TokenizeRequest, {"prompt": "x", "add_special_tokens": True}))
    assert text == inference_pb2.TokenizeRequest(text="x")
    setting = {"chat_template_kwargs": {"a": 1}, "reasoning_effort": "high", "add_generation_prompt": False}
    body = {"messages": [USER], "tools": [TOOL], "continue_final_message": True} | setting
    asked = ask_tokens(read(TokenizeRequest, body)).chat
    assert asked.messages[0].content == "Hello" and asked.tools[0].name == "add"
    assert asked == chat(**body).messages[0].chat and asked.continue_final_message
    neutral = {"chat_template_kwargs": {}, "add_generation_prompt": True, "continue_final_message": False}
    assert ask_tokens(read(TokenizeRequest, {"prompt": "x"} | neutral)).text == "x"
    wrong = [{}, {"messages": [USER]}, {"add_special_tokens": False}, {"reasoning_effort": "low"}]
    wrong += [{"chat_template_kwargs": {"a": 1}}, {"continue_final_message": True}]
    for body in ({}, *({"prompt": "x"} | given for given in wrong[1:])):
        with pytest.raises(InvalidRequest):
            ask_tokens(read(TokenizeRequest, body))


async def test_both_doors_send_nodes_the_same(redis_url: str) -> None:
    """The requests that nodes see, by gRPC and by HTTP, differ in nothing but their ids."""
    body = {name: value for given, _ in SAMPLING.values() for name, value in given.items()}
    grammars = {"guided_json", "guided_regex", "guided_choice", "response_format"}
    body = {name: value for name, value in body.items() if name not in grammars} | {"max_tokens": 7}
    async with talking(redis_url) as cluster:
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{cluster.http_url}/v1/completions", json=body | {"prompt": "Hé"}) as answer:
                assert answer.status == 200, await answer.text()
        async for _ in cluster.stub.Generate(completion(prompt="Hé", **body).messages[0]):
            pass
        first, second = cluster.nodes["decode0"].seen.admits
        first.request_id = second.request_id = ""
        assert first == second
