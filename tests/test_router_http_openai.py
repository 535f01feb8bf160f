"""The HTTP door as people use it: with the official `openai` client, unmodified."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
from conftest import POCKET, eventually
from http_support import TALK, events, get, post, talking
from openai import AsyncOpenAI
from router_fakes import FakeCluster, expected, running
from tools_support import model_folder

from batonpb import inference_pb2
from router.frontend import Frontend
from router.http_models import TokenizeRequest, read
from router.http_requests import ask_tokens
from router.tokenizer import Tokenizer

NEEDS_CORE = pytest.mark.skipif(not hasattr(Frontend, "tokenize"), reason="the core has no n, echo, tools yet")
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    async with talking(redis_url) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt_ids(text: str) -> list[int]:
    return Tokenizer(POCKET).encode(text)


async def test_a_chat(client: AsyncOpenAI, cluster: FakeCluster) -> None:
    answer = await client.chat.completions.create(model="pocket", messages=HELLO, max_tokens=100)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TALK, "stop")
    assert answer.object == "chat.completion" and answer.model == "pocket" and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage is not None and usage.completion_tokens == len(TALK.encode()) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chat = Tokenizer(POCKET).render(HELLO)
    assert list(cluster.nodes["decode0"].seen.admits[0].token_ids) == Tokenizer(POCKET).encode(chat, True)


async def test_a_streamed_chat_is_the_same_text(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="pocket", messages=HELLO, stream=True, stream_options={"include_usage": True}, max_completion_tokens=100
    )
    chunks = [chunk async for chunk in stream]
    *pieces, last = chunks
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == TALK
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[1].choices[0].delta.role is None
    assert [piece.choices[0].finish_reason for piece in pieces][-2:] == [None, "stop"]
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == len(TALK.encode()) + 1
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


async def test_a_stream_ends_with_done_and_has_usage_only_where_it_was_asked_for(cluster: FakeCluster) -> None:
    body = {"messages": HELLO, "stream": True, "max_tokens": 5}
    *chunks, done = await events(f"{cluster.http_url}/v1/chat/completions", body)
    assert done == "[DONE]" and all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_completion_of_text_and_of_tokens(client: AsyncOpenAI, cluster: FakeCluster) -> None:
    text = await client.completions.create(model="pocket", prompt="Once", max_tokens=100)
    tokens = await client.completions.create(model="pocket", prompt=prompt_ids("Once"), max_tokens=100)
    assert text.choices[0].text == tokens.choices[0].text == TALK
    assert text.object == "text_completion"
    first, second = cluster.nodes["decode0"].seen.admits
    assert list(first.token_ids) == list(second.token_ids) == prompt_ids("Once")
    stream = await client.completions.create(model="pocket", prompt="Once", max_tokens=100, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TALK


async def test_a_completion_has_16_tokens_as_openais_has(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="pocket", prompt="Once")
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


async def test_several_prompts_are_numbered_in_order(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0")
        await cluster.open()
        prompts = ["one", "two", "three"]
        texts = [bytes(expected(prompt_ids(prompt), 8, 7)).decode() for prompt in prompts]
        async with AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none") as client:
            answer = await client.completions.create(model="pocket", prompt=prompts, max_tokens=8, seed=7)
            assert [choice.text for choice in answer.choices] == texts
            assert [choice.index for choice in answer.choices] == [0, 1, 2]
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 24
            assert answer.usage.prompt_tokens == sum(len(prompt_ids(prompt)) for prompt in prompts)
            ids = [prompt_ids(prompt) for prompt in prompts]
            stream = await client.completions.create(model="pocket", prompt=ids, max_tokens=8, seed=7, stream=True)
            got = ["", "", ""]
            async for chunk in stream:
                got[chunk.choices[0].index] += chunk.choices[0].text
            assert got == texts


async def test_stop_strings_and_cached_tokens(client: AsyncOpenAI, cluster: FakeCluster) -> None:
    for node in cluster.nodes.values():
        node.hits = (4, 3)
    answer = await client.chat.completions.create(model="pocket", messages=HELLO, stop="façade")
    assert answer.choices[0].message.content == "Naïve 😀 " and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 7
    several = await client.chat.completions.create(model="pocket", messages=HELLO, stop=["日", "façade"])
    assert several.choices[0].message.content == "Naïve 😀 "


async def test_logprobs_of_a_chat(client: AsyncOpenAI) -> None:
    ask = {"model": "pocket", "messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    answer = await client.chat.completions.create(**ask)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.bytes for entry in logprobs.content] == [[byte] for byte in TALK.encode()[:4]]
    assert [entry.token for entry in logprobs.content] == ["N", "a", "\ufffd", "\ufffd"]
    assert logprobs.content[0].logprob == pytest.approx(-0.078)
    assert [(top.token, top.logprob) for top in logprobs.content[0].top_logprobs] == [("N", -1.0), ("O", -2.0)]
    stream = await client.chat.completions.create(**ask, stream=True)
    entries = [entry async for chunk in stream for entry in chunk.choices[0].logprobs.content]
    assert entries == logprobs.content
    plain = await client.chat.completions.create(model="pocket", messages=HELLO, max_tokens=1, logprobs=True)
    assert plain.choices[0].logprobs.content[0].top_logprobs == []


async def test_logprobs_of_a_completion(client: AsyncOpenAI) -> None:
    ask = {"model": "pocket", "prompt": "x", "max_tokens": 6, "logprobs": 1}
    lists = (await client.completions.create(**ask)).choices[0].logprobs
    assert lists is not None
    assert lists.tokens == ["N", "a", "bytes:\\xc3", "bytes:\\xaf", "v", "e"]
    assert lists.text_offset == [0, 1, 2, 2, 3, 4]
    assert lists.top_logprobs is not None and lists.token_logprobs is not None
    assert lists.token_logprobs[0] == pytest.approx(-0.078)
    assert list(lists.top_logprobs[0]) == ["N"]
    stream = await client.completions.create(**ask, stream=True)
    tokens = [token async for chunk in stream for token in chunk.choices[0].logprobs.tokens]
    assert tokens == lists.tokens
    none = await client.completions.create(**(ask | {"logprobs": 0}))
    assert none.choices[0].logprobs.top_logprobs is None and len(none.choices[0].logprobs.tokens) == 6
    special = {"max_tokens": len(TALK.encode()) + 3, "extra_body": {"ignore_eos": True}}
    lists = (await client.completions.create(**(ask | special))).choices[0].logprobs
    assert lists is not None and lists.tokens is not None and lists.text_offset is not None
    assert lists.tokens[-3:] == ["<|end|>"] * 3 and lists.text_offset[-3:] == [len(TALK)] * 3, "they are no text"


@NEEDS_CORE
async def test_n_answers(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0")
        await cluster.open()
        async with AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none") as client:
            ask = {"model": "pocket", "prompt": ["a", "b"], "n": 2, "max_tokens": 6, "seed": 3}
            answer = await client.completions.create(**ask)
            texts = [bytes(expected(prompt_ids(prompt), 6, seed)).decode() for prompt in "ab" for seed in (3, 4)]
            assert [choice.text for choice in answer.choices] == texts
            assert answer.usage is not None and answer.usage.completion_tokens == 24
            assert answer.usage.prompt_tokens == len(prompt_ids("a")) + len(prompt_ids("b"))
            got = ["", "", "", ""]
            async for chunk in await client.completions.create(**ask, stream=True):
                got[chunk.choices[0].index] += chunk.choices[0].text
            assert got == texts


@NEEDS_CORE
async def test_echo(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="pocket", prompt="Once", max_tokens=4, echo=True)
    assert answer.choices[0].text == "OnceNaï"


@NEEDS_CORE
async def test_tokens_there_and_back(cluster: FakeCluster) -> None:
    status, _, answer = await post(f"{cluster.http_url}/tokenize", {"prompt": "Naïve"})
    assert status == 200 and answer["tokens"] == prompt_ids("Naïve") and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 4096
    status, _, back = await post(f"{cluster.http_url}/detokenize", {"tokens": list("Naïve".encode())})
    assert status == 200 and back == {"prompt": "Naïve"}
    status, _, chat = await post(f"{cluster.http_url}/tokenize", {"messages": HELLO})
    assert status == 200 and chat["tokens"] == Tokenizer(POCKET).encode(Tokenizer(POCKET).render(HELLO), True)


async def test_the_models(client: AsyncOpenAI) -> None:
    [model] = [model async for model in client.models.list()]
    assert model.id == "pocket" and (await client.models.retrieve("pocket")).id == "pocket"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


async def test_errors_are_the_clients_own(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="pocket", messages=HELLO, temperature=3)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    assert "[0, 2]" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="gpt-4o", messages=HELLO)


async def test_a_stream_that_breaks_is_no_success(redis_url: str) -> None:
    async with talking(redis_url, max_attempts=1, node_wait_s=0.2) as cluster:
        node = cluster.nodes["decode0"]
        node.faults["token 4"] = node.kill
        body = {"messages": HELLO, "stream": True}
        client = AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0)
        text = ""
        with pytest.raises(openai.APIError) as caught:
            async for chunk in await client.chat.completions.create(model="pocket", **body):
                text += chunk.choices[0].delta.content or ""
        assert TALK.startswith(text) and 0 < len(text) < 6
        assert caught.value.code == "cluster_unavailable"
        await client.close()


async def test_hanging_up_frees_everything(client: AsyncOpenAI, cluster: FakeCluster) -> None:
    for node in cluster.nodes.values():
        node.step_s = 0.05
    stream = await client.chat.completions.create(model="pocket", messages=HELLO, stream=True)
    async for _ in stream:
        break
    assert cluster.active > 0
    await stream.close()
    await eventually(lambda: cluster.active == 0, 5, "a stream's leg is aborted")
    asking = asyncio.create_task(client.completions.create(model="pocket", prompt=["x", "y"], max_tokens=100))
    await eventually(lambda: cluster.active > 0, 5, "it runs")
    asking.cancel()
    await eventually(lambda: cluster.active == 0, 5, "a plain call's legs are aborted")
    assert (await get(f"{cluster.http_url}/health"))[0] == 200


async def test_what_an_answer_says_goes_in_again(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="pocket", messages=HELLO)
    turns = [
        *HELLO,
        answer.choices[0].message.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
    ]
    assert (await client.chat.completions.create(model="pocket", messages=turns)).choices[0].message.content == TALK


async def test_vllms_extras_are_taken(client: AsyncOpenAI, cluster: FakeCluster) -> None:
    extras = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2}
    extras |= {"stop_token_ids": [5], "priority": 3, "skip_special_tokens": True, "use_beam_search": False}
    await client.completions.create(
        model="pocket", prompt="x", max_tokens=4, user="me", logprobs=None, best_of=1, extra_body=extras
    )
    sampling = cluster.nodes["decode0"].seen.admits[0].sampling
    assert sampling.ignore_eos and sampling.top_k == 0 and list(sampling.stop_token_ids) == [5]


async def test_what_ends_a_text_may_be_shown(client: AsyncOpenAI) -> None:
    for name in ("include_stop_str_in_output", "no_stop_trim"):
        ask = {"model": "pocket", "messages": HELLO, "stop": ["façade"], "extra_body": {name: True}}
        answer = await client.chat.completions.create(**ask)
        assert answer.choices[0].message.content == "Naïve 😀 façade" and answer.choices[0].finish_reason == "stop"
        stream = await client.chat.completions.create(**ask, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Naïve 😀 façade"


async def test_the_chat_template_is_told_what_the_client_says(redis_url: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "pocket")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] += "{{ enable_thinking | default('unset') }} {{ reasoning_effort }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    async with talking(redis_url, model=folder) as cluster:
        async with AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client:
            extra = {"chat_template_kwargs": {"enable_thinking": False}}
            await client.chat.completions.create(
                model="pocket", messages=HELLO, reasoning_effort="low", extra_body=extra
            )
            begun = [*HELLO, {"role": "assistant", "content": "It is"}]
            extra = {"continue_final_message": True, "add_generation_prompt": False}
            await client.chat.completions.create(model="pocket", messages=begun, extra_body=extra)
        prompts = [bytes(seen.token_ids).decode() for seen in cluster.nodes["decode0"].seen.admits]
        assert prompts == ["[user]\nHello\n[assistant]\nFalse low", "[user]\nHello\n[assistant]\nIt is"]
        asked = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": 1}, "add_generation_prompt": False}
        _, _, answer = await post(f"{cluster.http_url}/tokenize", asked)
        assert bytes(answer["tokens"]).decode() == "[user]\nHello\n1 "
        chat = ask_tokens(read(TokenizeRequest, asked)).chat
        response = await cluster.stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
        assert list(response.token_ids) == answer["tokens"]


async def test_the_synchronous_client_works_too(cluster: FakeCluster) -> None:
    def ask() -> str:
        with openai.OpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client:
            with client.chat.completions.create(model="pocket", messages=HELLO, stream=True) as stream:
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == TALK
