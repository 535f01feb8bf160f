"""Log probabilities of prompts, from fake nodes to what clients read: by gRPC, and with the official client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest
from conftest import POCKET, eventually
from http_support import events, give_logprobs, post
from openai import AsyncOpenAI
from router_fakes import EOS, FakeCluster, expected, request, running, saying, scores_of

from batonpb import common_pb2, inference_pb2, node_pb2
from router.http_answers import ChatChoice
from router.http_models import ChatRequest, read
from router.http_reply import Reply
from router.http_requests import ask_chat
from router.tokenizer import Tokenizer
from router.validate import MAX_PROMPT_LOGPROBS

TEXT = "Naïve 😀"
PROMPT = [256, *TEXT.encode()]
BEHIND = " and so on"
HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(params=["both legs", "one leg"])
async def cluster(request: pytest.FixtureRequest, redis_url: str) -> AsyncIterator[FakeCluster]:
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "decode0") if request.param == "both legs" else ("both0",):
            give_logprobs(await cluster.add(node_id, saying(BEHIND), prefill_tokens_per_s=10.0))
        await cluster.open()
        yield cluster


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asking(
    prompt: str | list[int] = TEXT, prompt_logprobs: int | None = None, echo: bool = False, n: int = 0, **sampling: Any
) -> inference_pb2.GenerateRequest:
    message = request(prompt, **({"max_tokens": 4} | sampling))
    message.echo, message.n = echo, n
    if prompt_logprobs is not None:
        message.prompt_logprobs = prompt_logprobs
    return message


async def answers(cluster: FakeCluster, message: inference_pb2.GenerateRequest) -> list[inference_pb2.GenerateResponse]:
    return [response async for response in cluster.stub.Generate(message, timeout=30.0)]


def chat_ids(messages: list[Any]) -> list[int]:
    tokenizer = Tokenizer(POCKET)
    return tokenizer.encode(tokenizer.render(messages), is_template=True)


def told(num_top: int) -> common_pb2.PromptLogprobs | None:
    return scores_of(node_pb2.NodeRequest(token_ids=PROMPT, num_prompt_tokens=len(PROMPT), prompt_logprobs=num_top))


# --- gRPC ---


@pytest.mark.parametrize(
    ("fields", "num_top"),
    [
        ({"prompt_logprobs": 3}, 3),
        ({"prompt_logprobs": 0}, 0),
        ({"echo": True, "logprobs": 2}, 2),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 1}, 1),
        ({"echo": True}, None),
        ({"logprobs": 2}, None),
    ],
    ids=str,
)
async def test_they_come_once_with_the_first_token(
    cluster: FakeCluster, fields: dict[str, Any], num_top: int | None
) -> None:
    first, *others = await answers(cluster, asking(**fields))
    assert first.HasField("prompt_logprobs") == (num_top is not None) and len(first.tokens) == 1
    assert num_top is None or first.prompt_logprobs == told(num_top)
    assert not any(response.HasField("prompt_logprobs") for response in others)
    assert others[-1].finish_reason and others[-1].usage.prompt_tokens == len(PROMPT)
    # Only the leg that computes the prompt is asked for them.
    nodes = cluster.nodes
    if "both0" not in nodes:
        assert not nodes["decode0"].seen.admits[0].HasField("prompt_logprobs")
        assert nodes["prefill0"].seen.prefills[0].HasField("prompt_logprobs") == (num_top is not None)


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}], ids=str)
async def test_each_of_n_answers_has_them_and_they_are_computed_once(
    cluster: FakeCluster, fields: dict[str, Any]
) -> None:
    found = await answers(cluster, asking(n=3, **fields))
    with_scores = [response for response in found if response.HasField("prompt_logprobs")]
    assert sorted(response.index for response in with_scores) == [0, 1, 2]
    assert all(response.prompt_logprobs == told(1) and response.prompt_tokens for response in with_scores)
    assert [response.usage.output_tokens for response in found if response.finish_reason] == [4, 4, 4]
    seen = [one for node in cluster.nodes.values() for one in (*node.seen.prefills, *node.seen.admits)]
    assert sum(one.HasField("prompt_logprobs") for one in seen) == 1
    assert len({one.request_id for one in seen}) == 3


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}, {"echo": True}], ids=str)
async def test_no_token_at_all(cluster: FakeCluster, fields: dict[str, Any]) -> None:
    found = await answers(cluster, asking(max_tokens=0, **fields))
    assert not any(response.tokens for response in found)
    assert "".join(response.text for response in found) == (TEXT if "echo" in fields else "")
    assert found[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert (found[-1].usage.prompt_tokens, found[-1].usage.output_tokens) == (len(PROMPT), 0)
    assert found[0].HasField("prompt_logprobs") == (fields != {"echo": True})


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (asking(prompt_logprobs=21), "prompt_logprobs: must be in [0, 20], got 21"),
        (
            asking([1] * 4000, prompt_logprobs=20),
            "",
        ),
        (
            asking([1] * 8000, prompt_logprobs=20),
            f"prompt_logprobs: prompt tokens times it and one more may be {MAX_PROMPT_LOGPROBS} at most, got 168000",
        ),
        (asking([1] * 8000, echo=True, logprobs=20), "prompt_logprobs: prompt tokens times"),
    ],
    ids=range(4),
)
async def test_limits(redis_url: str, message: inference_pb2.GenerateRequest, words: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0", saying(BEHIND), max_model_len=10_000)
        await cluster.open()
        if not words:
            [first, *_] = await answers(cluster, message)
            assert len(first.prompt_logprobs.top_logprobs) == 3999 * 20
            return
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await answers(cluster, message)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert (error.value.details() or "").startswith(words)


async def test_a_node_that_dies_costs_no_second_copy(redis_url: str) -> None:
    """Before the first token the next node is asked for them again, behind it nobody is."""
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "prefill1", "decode0", "decode1"):
            give_logprobs(await cluster.add(node_id))
        await cluster.open()
        nodes = cluster.nodes
        nodes["prefill0"].faults["prefill"] = nodes["prefill1"].faults["prefill"] = once(grpc.StatusCode.INTERNAL)
        for node_id in ("decode0", "decode1"):
            nodes[node_id].faults["token 2"] = once_for(cluster, nodes[node_id].kill)
        prompt = [256, *range(60)]
        found = await answers(cluster, asking(prompt, prompt_logprobs=2, max_tokens=8, seed=7))
        ids = [token.token_id for response in found for token in response.tokens]
        assert ids == expected(prompt, 8, 7)
        assert [index for index, response in enumerate(found) if response.HasField("prompt_logprobs")] == [0]
        assert len(found[0].prompt_logprobs.logprobs) == 60
        asked = [seen for node in nodes.values() for seen in (*node.seen.prefills, *node.seen.admits)]
        for seen in asked:
            assert not (seen.HasField("prompt_logprobs") and len(seen.token_ids) > 61)
        assert found[-1].timeline.migrations == 2


def once(code: grpc.StatusCode) -> Any:
    """A fault of the first of all calls that share it."""
    left = [code]

    def fault() -> None:
        if left:
            raise ValueError(left.pop())

    return fault


def once_for(cluster: FakeCluster, kill: Any) -> Any:
    async def fault() -> None:
        if not hasattr(cluster, "has_killed"):
            cluster.has_killed = True  # type: ignore[attr-defined]
            await kill()

    return fault


@pytest.mark.parametrize("missing", ["all", "one"])
async def test_a_node_that_tells_too_little_is_left(redis_url: str, missing: str) -> None:
    """An answer without them is none, and half of them would break whoever reads them."""
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("both0", "both1"):
            await cluster.add(node_id, saying(BEHIND))
        await cluster.open(max_attempts=2, node_wait_s=0.3)

        def short(request: node_pb2.NodeRequest) -> common_pb2.PromptLogprobs | None:
            scores = scores_of(request)
            if missing == "all" or scores is None:
                return None
            del scores.logprobs[-1]
            return scores

        cluster.nodes["both0"].scores_of = short
        found = await asyncio.gather(*(answers(cluster, asking(prompt_logprobs=1)) for _ in range(4)))
        assert all(one[0].prompt_logprobs == told(1) for one in found)
        cluster.nodes["both1"].scores_of = short
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await answers(cluster, asking(prompt_logprobs=1))
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "did not tell the prompt's logprobs" in (error.value.details() or "")


# --- HTTP ---

WORDS = [
    *("<|begin|>", "N", "a", "bytes:\\xc3", "bytes:\\xaf", "v", "e", " "),
    *("bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80"),
]
OFFSETS = [0, 0, 1, 2, 2, 3, 4, 5, 6, 6, 6, 6]


@pytest.mark.parametrize("prompt", [TEXT, PROMPT], ids=["text", "tokens"])
async def test_echo_with_logprobs(client: AsyncOpenAI, prompt: str | list[int]) -> None:
    ask: dict[str, Any] = {"model": "pocket", "prompt": prompt, "max_tokens": 4, "echo": True, "logprobs": 1}
    [choice] = (await client.completions.create(**ask)).choices
    lists = choice.logprobs
    assert choice.text == TEXT + BEHIND[:4] and lists is not None
    assert lists.tokens == [*WORDS, *BEHIND[:4]]
    assert lists.text_offset == [*OFFSETS, 7, 8, 9, 10]
    assert lists.token_logprobs is not None and lists.top_logprobs is not None
    assert lists.token_logprobs[:3] == [None, -0.125, -0.25] and len(lists.token_logprobs) == 16
    assert lists.top_logprobs[:3] == [None, {"O": -1.0, "N": -0.125}, {"b": -1.0, "a": -0.25}]
    assert lists.token_logprobs[12] == pytest.approx(-0.032)  # the output's own
    stream = await client.completions.create(**ask, stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for chunk in chunks if chunk.logprobs for one in getattr(chunk.logprobs, name)] == getattr(
            lists, name
        )
    bare = (await client.completions.create(**(ask | {"logprobs": 0}))).choices[0].logprobs
    assert bare is not None and bare.top_logprobs is None and bare.token_logprobs == lists.token_logprobs


async def test_scoring_two_continuations_as_lm_eval_does(client: AsyncOpenAI) -> None:
    """Its local-completions: token ids, echo, logprobs, one token; the context and the last token are cut off."""
    context, ends = PROMPT, [[32, 97], [32, 98]]
    prompts = [[*context, *end] for end in ends]
    for max_tokens, cut in ((1, -1), (0, None)):
        answer = await client.completions.create(
            model="pocket", prompt=prompts, max_tokens=max_tokens, echo=True, logprobs=1, temperature=0, seed=1
        )
        for choice, prompt in zip(sorted(answer.choices, key=lambda one: one.index), prompts, strict=True):
            assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
            values = choice.logprobs.token_logprobs[len(context) : cut]
            assert values == [-place / 8 for place in range(len(context), len(prompt))]
            tops = choice.logprobs.top_logprobs
            assert tops is not None and len(tops[len(context) : cut]) == 2
            assert choice.finish_reason == "length"
        assert answer.usage is not None and answer.usage.completion_tokens == 2 * max_tokens
        assert answer.usage.prompt_tokens == sum(map(len, prompts))


async def test_vllms_prompt_logprobs(client: AsyncOpenAI, cluster: FakeCluster) -> None:
    ask: dict[str, Any] = {"model": "pocket", "max_tokens": 2, "extra_body": {"prompt_logprobs": 1}}
    completion = await client.completions.create(prompt=TEXT, **ask)
    entries = completion.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    assert len(entries) == len(PROMPT) and entries[0] is None
    assert entries[1] == {
        "78": {"logprob": -0.125, "rank": 1, "decoded_token": "N"},
        "79": {"logprob": -1.0, "rank": 1, "decoded_token": "O"},
    }
    assert entries[3]["195"]["decoded_token"] == "\ufffd"
    assert completion.choices[0].logprobs is None and completion.choices[0].text == BEHIND[:2]
    chat = await client.chat.completions.create(messages=HI, **ask)
    whole = chat.prompt_logprobs  # type: ignore[attr-defined]
    assert len(whole) == chat.usage.prompt_tokens and whole[0] is None and len(whole[1]) == 2  # type: ignore[union-attr]
    plain = await client.completions.create(model="pocket", prompt=TEXT, max_tokens=2)
    assert not hasattr(plain.choices[0], "prompt_logprobs")


async def test_vllms_prompt_logprobs_in_streams(client: AsyncOpenAI) -> None:
    """Each choice of a completion has them in its first event; a chat has them beside the choice of its first one."""
    ask: dict[str, Any] = {"model": "pocket", "max_tokens": 3, "n": 2, "extra_body": {"prompt_logprobs": 1}}
    answer = await client.completions.create(prompt=[TEXT, "x"], **ask)
    found: dict[int, Any] = {}
    async for chunk in await client.completions.create(prompt=[TEXT, "x"], stream=True, **ask):
        [choice] = chunk.choices
        assert hasattr(choice, "prompt_logprobs") == (choice.index not in found)
        found.setdefault(choice.index, getattr(choice, "prompt_logprobs", None))
    assert found == {choice.index: choice.prompt_logprobs for choice in answer.choices}  # type: ignore[attr-defined]
    assert [len(found[index]) for index in range(4)] == [len(PROMPT)] * 2 + [2] * 2
    chat = await client.chat.completions.create(messages=HI, **ask)
    stream = await client.chat.completions.create(messages=HI, stream=True, **ask)
    first, *others = [chunk async for chunk in stream]
    assert first.prompt_logprobs == chat.prompt_logprobs and first.choices[0].index == 0
    assert not any(hasattr(chunk, "prompt_logprobs") for chunk in others)


async def test_a_stream_of_nothing_but_prompt_logprobs(cluster: FakeCluster) -> None:
    scoring = {"max_tokens": 0, "prompt_logprobs": 0, "stream": True}
    chunk, done = await events(f"{cluster.http_url}/v1/completions", {"prompt": TEXT} | scoring)
    [choice] = chunk["choices"]
    assert (choice["text"], choice["finish_reason"], len(choice["prompt_logprobs"])) == ("", "length", len(PROMPT))
    chunk, done = await events(f"{cluster.http_url}/v1/chat/completions", {"messages": HI} | scoring)
    assert done == "[DONE]" and chunk["choices"][0]["finish_reason"] == "length"
    assert len(chunk["prompt_logprobs"]) == len(chat_ids(HI))


def test_a_chats_wait_for_an_event_to_go_with() -> None:
    """Its first token may be half a character."""
    asked = ask_chat(read(ChatRequest, {"messages": HI, "prompt_logprobs": 0, "stream": True}), "id")
    reply = Reply({"id": "x"}, asked, [ChatChoice(0, bytes, None, False)], lambda token_id: b"\xc3")
    halves = inference_pb2.GenerateResponse(prompt_logprobs=told(0)), inference_pb2.GenerateResponse(text="é")
    assert reply.is_long(halves[0]) and reply.event(0, halves[0]) is None
    event = reply.event(0, halves[1])
    assert event is not None and len(event["prompt_logprobs"]) == len(PROMPT)
    last = reply.event(0, inference_pb2.GenerateResponse(finish_reason=common_pb2.FINISH_REASON_STOP))
    assert last is not None and "prompt_logprobs" not in last


async def test_what_cannot_be_asked_over_http(client: AsyncOpenAI, cluster: FakeCluster) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
    ]
    for change, param in wrong:
        status, _, answer = await post(f"{cluster.http_url}/v1/completions", {"prompt": "x"} | change)
        assert (status, answer["error"]["param"]) == (400, param), change
        assert param != "prompt_logprobs" or change[param] is True or "[0, 20]" in answer["error"]["message"]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="pocket", prompt=[1] * 4095, echo=True, logprobs=21)
    assert caught.value.param == "logprobs"


async def test_a_limit_is_named_as_the_client_said_it(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0", saying(BEHIND), max_model_len=10_000)
        await cluster.open()
        for change, param in (
            ({"echo": True, "logprobs": 20}, "logprobs"),
            ({"prompt_logprobs": 20}, "prompt_logprobs"),
            ({"echo": True, "logprobs": 1, "prompt_logprobs": 20}, "prompt_logprobs"),
        ):
            body = {"prompt": [1] * 8000, "max_tokens": 0} | change
            status, _, answer = await post(f"{cluster.http_url}/v1/completions", body)
            assert (status, answer["error"]["param"]) == (400, param)
            assert answer["error"]["message"].startswith(f"{param}: ")
            assert str(MAX_PROMPT_LOGPROBS) in answer["error"]["message"]


async def test_an_answer_has_so_many_and_no_more(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many prompts a call has. A stream keeps none of them."""
    monkeypatch.setattr("router.http_scores.MAX_ENTRIES", 3 * 2 * len(PROMPT))
    url, body = f"{cluster.http_url}/v1/completions", {"max_tokens": 0, "echo": True, "logprobs": 1}
    for prompts, status_of in ((3, 200), (4, 400)):
        status, _, answer = await post(url, body | {"prompt": [PROMPT] * prompts})
        assert status == status_of
    assert answer["error"]["param"] == "logprobs" and "of all prompts" in answer["error"]["message"]
    *chunks, done = await events(url, body | {"prompt": [PROMPT] * 4, "stream": True})
    assert done == "[DONE]" and {chunk["choices"][0]["index"] for chunk in chunks} == set(range(4))
    await eventually(lambda: cluster.active == 0, 5, "the other legs are cancelled")
    monkeypatch.setattr("router.http_scores.MAX_ENTRIES", 2 * len(chat_ids(HI)))
    chat = {"messages": HI, "max_tokens": 1, "prompt_logprobs": 1, "n": 3}  # which shows them once
    status, _, answer = await post(f"{cluster.http_url}/v1/chat/completions", chat)
    assert status == 200 and len(answer["prompt_logprobs"]) == len(chat_ids(HI)) and len(answer["choices"]) == 3


async def test_an_end_token_that_is_not_wanted_is_not_shown(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0", lambda *_: EOS)
        await cluster.open()
        body = {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 0}
        status, _, answer = await post(f"{cluster.http_url}/v1/completions", body)
        [choice] = answer["choices"]
        assert status == 200 and (choice["text"], choice["finish_reason"]) == (TEXT, "length")
        assert choice["logprobs"]["tokens"] == WORDS
