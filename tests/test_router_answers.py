"""What a client may ask of an answer: several of them, the prompt in front, calls of tools; and tokens without any."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from conftest import eventually
from router_fakes import EOS, FakeCluster, expected, request, running, saying
from tools_support import model_folder

from batonpb import common_pb2, inference_pb2
from deploy.cli import main
from router.frontend import LEADING_TOKENS

INVALID = grpc.StatusCode.INVALID_ARGUMENT
SHORT, LONG = [256, *range(40)], [256, *(n % 200 for n in range(LEADING_TOKENS))]
STOP, CALLS = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_TOOL_CALLS


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "decode0"):
            await cluster.add(node_id)
        await cluster.open()
        yield cluster


async def answers(
    cluster: FakeCluster, message: inference_pb2.GenerateRequest
) -> list[list[inference_pb2.GenerateResponse]]:
    """The responses by index."""
    found: list[list[inference_pb2.GenerateResponse]] = [[] for _ in range(message.n or 1)]
    async for response in cluster.stub.Generate(message, timeout=30.0):
        assert not found[response.index] or not found[response.index][-1].finish_reason, "the last one is the last one"
        found[response.index].append(response)
    return found


async def refusal(cluster: FakeCluster, message: inference_pb2.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await answers(cluster, message)
    return error.value


def ids_of(responses: list[inference_pb2.GenerateResponse]) -> list[int]:
    return [token.token_id for response in responses for token in response.tokens]


def text_of(responses: list[inference_pb2.GenerateResponse]) -> str:
    return "".join(response.text for response in responses)


def asking(prompt: str | list[int], n: int = 0, echo: bool = False, request_id: str = "", **sampling: object):
    message = request(prompt, **sampling)
    message.n, message.echo, message.request_id = n, echo, request_id
    return message


# --- n ---


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("seed", [7, 2**64 - 2])
async def test_each_answer_has_the_next_seed_and_an_end_of_its_own(
    cluster: FakeCluster, prompt: list[int], seed: int
) -> None:
    found = await answers(cluster, asking(prompt, n=4, request_id="mine", max_tokens=8, seed=seed))
    for index, responses in enumerate(found):
        assert ids_of(responses) == expected(prompt, 8, (seed + index) % 2**64)
        assert {response.request_id for response in responses} == {"mine"}
        last = responses[-1]
        assert last.finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert (last.usage.prompt_tokens, last.usage.output_tokens) == (len(prompt), 8)
        assert last.timeline.decode_node == "decode0" and 0 < last.timeline.first_token_s <= last.timeline.finished_s
    admits = cluster.nodes["decode0"].seen.admits
    assert sorted(admit.request_id for admit in admits) == [f"mine-{index}" for index in range(4)]


async def test_without_a_seed_each_answer_has_one_of_its_own(cluster: FakeCluster) -> None:
    found = await answers(cluster, asking(SHORT, n=16, max_tokens=6))
    assert len({tuple(ids_of(responses)) for responses in found}) == 16


@pytest.mark.parametrize("n", [0, 1])
async def test_one_answer_is_as_ever(cluster: FakeCluster, n: int) -> None:
    [responses] = await answers(cluster, asking(SHORT, n=n, request_id="mine", max_tokens=4, seed=3))
    assert ids_of(responses) == expected(SHORT, 4, 3)
    assert [admit.request_id for admit in cluster.nodes["decode0"].seen.admits] == ["mine"]


async def test_the_others_wait_for_the_first_token_of_a_long_prompt(cluster: FakeCluster) -> None:
    nodes, go_on = cluster.nodes, asyncio.Event()
    for node in nodes.values():
        node.faults["prefill"] = node.faults["start"] = go_on.wait
    for prompt, at_first in ((SHORT, 3), (LONG, 1)):
        go_on.clear()
        before = len(nodes["decode0"].seen.admits)
        asking_it = asyncio.create_task(answers(cluster, asking(prompt, n=3, max_tokens=2)))
        await eventually(lambda: len(nodes["decode0"].seen.admits) >= before + at_first, 5, "it set out")  # noqa: B023
        await asyncio.sleep(0.05)
        assert len(nodes["decode0"].seen.admits) == before + at_first
        go_on.set()
        await asking_it
        assert len(nodes["decode0"].seen.admits) == before + 3


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "long"])
async def test_a_failure_of_one_is_one_of_the_call(cluster: FakeCluster, prompt: list[int]) -> None:
    """And nothing of it is left on any node."""
    node, moments = cluster.nodes["decode0"], [0]

    async def third_fails() -> None:
        moments[0] += 1
        if moments[0] == 3:
            raise ValueError("injected")  # INTERNAL to the router, which goes elsewhere, where nobody is
        await asyncio.sleep(0)

    node.faults["admit"] = third_fails
    node.step_s = 0.02
    await cluster.router.stop()
    await cluster.open(max_attempts=1)
    error = await refusal(cluster, asking(prompt, n=3, max_tokens=500, ignore_eos=True))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    await eventually(lambda: cluster.active == 0, 5, "its siblings are cancelled")
    node.faults.clear()
    assert len(await answers(cluster, asking(prompt, n=3, max_tokens=2))) == 3


async def test_a_client_that_leaves_takes_all_answers_along(cluster: FakeCluster) -> None:
    cluster.nodes["decode0"].step_s = 0.02
    for prompt in (SHORT, LONG):
        call = cluster.stub.Generate(asking(prompt, n=5, max_tokens=2000))
        await call.read()
        call.cancel()
        await eventually(lambda: cluster.active == 0, 5, "nothing goes on")


async def test_a_call_that_has_begun_waits_for_room(cluster: FakeCluster) -> None:
    """Its client has part of the answer already: the others are not refused, neither as late nor as too many."""
    node = cluster.nodes["decode0"]

    def fill_up() -> None:
        node.faults = {"admit": grpc.StatusCode.RESOURCE_EXHAUSTED}
        asyncio.get_running_loop().call_later(0.3, node.faults.clear)

    node.faults["start"] = fill_up
    message = asking(LONG, n=2, max_tokens=3, seed=1)
    message.ttft_slo_ms = 20_000
    found = await answers(cluster, message)
    assert [ids_of(responses) for responses in found] == [expected(LONG, 3, 1), expected(LONG, 3, 2)]
    assert len(node.seen.admits) > 2


async def test_explain_knows_a_call_by_its_own_id(cluster: FakeCluster) -> None:
    for n in (1, 3, 1):
        await answers(cluster, asking(SHORT, n=n, request_id="mine", max_tokens=2))
        explained = await cluster.stub.Explain(inference_pb2.ExplainRequest(request_id="mine"))
        assert len(explained.decisions) == 1 and explained.ttft_s > 0
    assert (await cluster.stub.Explain(inference_pb2.ExplainRequest(request_id="mine-2"))).decisions


BAD = [
    (asking("x", n=17), "n: must be in [1, 16], got 17"),
    (asking("x", n=2, request_id="i" * 126), "request_id: 125 characters at most with n, got 126"),
    (asking("x", max_tokens=0), "sampling.max_tokens: must be at least 1 (0 with echo or prompt_logprobs), got 0"),
    (
        asking("x", echo=True, max_tokens=0, min_tokens=1),
        "sampling.min_tokens: must be in [0, 0] (max_tokens, or what is left), got 1",
    ),
    (
        inference_pb2.GenerateRequest(echo=True, chat={"messages": [{"role": "user", "content": "x"}]}),
        "echo: goes with a text or token prompt only",
    ),
    (
        inference_pb2.GenerateRequest(
            chat={"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f"}], "tool_choice": 2}
        ),
        "prompt.chat.tools: this model's chat template knows no tools",
    ),
    (
        inference_pb2.GenerateRequest(chat={"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f"}]}),
        "prompt.chat.tools: this model's chat template knows no tools",
    ),
]


@pytest.mark.parametrize(("message", "names"), BAD, ids=range(len(BAD)))
async def test_what_cannot_be_asked(cluster: FakeCluster, message: inference_pb2.GenerateRequest, names: str) -> None:
    error = await refusal(cluster, message)
    assert (error.code(), error.details()) == (INVALID, names)


# --- echo ---


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prompt", ["Naïve 😀 text, ", [256, *"Naïve 😀 text, ".encode()]], ids=["text", "tokens"])
async def test_the_prompt_comes_first(cluster: FakeCluster, prompt: str | list[int], n: int) -> None:
    found = await answers(cluster, asking(prompt, n=n, echo=True, max_tokens=5, seed=1))
    for index, responses in enumerate(found):
        output = expected([256, *"Naïve 😀 text, ".encode()], 5, 1 + index)
        assert responses[0].text == "Naïve 😀 text, " + chr(output[0])
        assert text_of(responses) == "Naïve 😀 text, " + bytes(output).decode()
        assert responses[-1].usage.output_tokens == 5


async def test_the_command_line_prints_several_answers(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "Hello", "--address", cluster.address, "--n", "2", "--echo", "--max-tokens", "4", "--seed", "1"]
    texts = ["Hello" + bytes(expected([256, *b"Hello"], 4, seed)).decode() for seed in (1, 2)]
    assert await asyncio.to_thread(main, argv) == 0
    assert capsys.readouterr().out == f"--- answer 0\n{texts[0]}\n--- answer 1\n{texts[1]}\n"
    assert await asyncio.to_thread(main, [*argv, "--json"]) == 0
    assert [answer["text"] for answer in json.loads(capsys.readouterr().out)] == texts
    assert await asyncio.to_thread(main, [*argv[:5], "17"]) == 1
    assert "--n must be from 1 to 16, got 17" in capsys.readouterr().err


async def test_stop_strings_are_not_looked_for_in_the_prompt(cluster: FakeCluster) -> None:
    [responses] = await answers(cluster, asking("stop ", echo=True, max_tokens=3, seed=1, stop=["stop"]))
    assert text_of(responses).startswith("stop ") and responses[-1].usage.output_tokens == 3


# --- tools ---

SPOKEN = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TWICE = SPOKEN + SPOKEN.removeprefix("Let me look.")
NO_CALL = 'I would write <tool_call>{"name": "weather"} here.'
WEATHER = {"name": "weather", "description": "Of a city.", "parameters": '{"type": "object"}'}


def chatting(n: int = 0, choice: int = inference_pb2.TOOL_CHOICE_AUTO, has_tools: bool = True, **sampling: object):
    message = inference_pb2.GenerateRequest(n=n, request_id="mine", sampling=common_pb2.SamplingParams(**sampling))
    message.chat.messages.add(role="user", content="Is it raining?")
    message.chat.tool_choice = choice
    if has_tools:
        message.chat.tools.add(**WEATHER)
    return message


async def speak(redis_url: str, folder: Path, text: str, message: inference_pb2.GenerateRequest):
    """What comes of a model that says `text`: its answers, and the prompts that it got."""
    async with running(FakeCluster(redis_url)) as cluster:
        node = await cluster.add("both0", saying(text))
        await cluster.open(model_folder(folder / "pocket"))
        found = await answers(cluster, message)
        return found, [bytes(admit.token_ids).decode() for admit in node.seen.admits]


@pytest.mark.parametrize(("spoken", "num_calls", "text"), [(SPOKEN, 1, "Let me look."), (TWICE, 2, "Let me look.")])
async def test_calls_of_tools_are_taken_out_of_the_text(
    redis_url: str, tmp_path: Path, spoken: str, num_calls: int, text: str
) -> None:
    found, prompts = await speak(redis_url, tmp_path, spoken, chatting(n=2))
    assert all('"description": "Of a city."' in prompt for prompt in prompts)
    seen: set[str] = set()
    for responses in found:
        calls = [call for response in responses for call in response.tool_calls]
        assert [(call.name, call.arguments) for call in calls] == [("weather", '{"city": "Zürich"}')] * num_calls
        seen |= {call.id for call in calls}
        assert text_of(responses) == text
        assert responses[-1].finish_reason == CALLS
        assert ids_of(responses)[-1] == EOS and responses[-1].usage.output_tokens == len(spoken.encode()) + 1
    assert len(seen) == 2 * num_calls


async def test_what_is_no_call_stays_text(redis_url: str, tmp_path: Path) -> None:
    [responses], _ = await speak(redis_url, tmp_path, NO_CALL, chatting())
    assert text_of(responses) == NO_CALL and responses[-1].finish_reason == STOP
    assert not any(response.tool_calls for response in responses)


@pytest.mark.parametrize(
    "fields", [{"choice": inference_pb2.TOOL_CHOICE_NONE}, {"has_tools": False}], ids=["choice", "no tools"]
)
async def test_without_tools_nothing_is_looked_for(redis_url: str, tmp_path: Path, fields: dict) -> None:
    [responses], [prompt] = await speak(redis_url, tmp_path, SPOKEN, chatting(**fields))
    assert text_of(responses) == SPOKEN and responses[-1].finish_reason == STOP
    assert "weather" not in prompt


async def test_a_call_cut_by_max_tokens_is_text_and_a_length(redis_url: str, tmp_path: Path) -> None:
    [responses], _ = await speak(redis_url, tmp_path, SPOKEN, chatting(max_tokens=40))
    assert text_of(responses) == SPOKEN[:40]
    assert responses[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH


# --- tokens and text ---


async def test_tokens_are_those_that_a_prompt_would_be(cluster: FakeCluster) -> None:
    text = "Naïve 😀 text"
    response = await cluster.stub.Tokenize(inference_pb2.TokenizeRequest(text=text))
    assert list(response.token_ids) == [256, *text.encode()] and response.max_model_len == 4096
    chat = inference_pb2.ChatPrompt(messages=[{"role": "user", "content": "Hi"}])
    response = await cluster.stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
    await answers(cluster, inference_pb2.GenerateRequest(chat=chat, sampling={"max_tokens": 1}))
    assert response.token_ids == cluster.nodes["decode0"].seen.admits[0].token_ids
    long = await cluster.stub.Tokenize(inference_pb2.TokenizeRequest(text="x" * 10_000))
    assert len(long.token_ids) == 10_001, "also what is too long for the model"


@pytest.mark.parametrize("times", [1, 1000])
async def test_text_of_tokens(cluster: FakeCluster, times: int) -> None:
    token_ids = [256, *"Naïve 😀".encode() * times, EOS]
    response = await cluster.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=token_ids))
    assert response.text == "Naïve 😀" * times
    assert not (await cluster.stub.Detokenize(inference_pb2.DetokenizeRequest())).text


@pytest.mark.parametrize(
    ("method", "body", "names"),
    [
        ("Tokenize", b"", "prompt: one of text and chat must be set"),
        ("Tokenize", b"\x0a\x00", "prompt.text: must not be empty"),
        ("Tokenize", b"\x0a\x01\xff", "prompt.text: must be valid UTF-8"),
        ("Tokenize", b"\x12\x00", "prompt.chat.messages: must not be empty"),
        ("Tokenize", b"\xff" * 9, "message: is no baton.v1.TokenizeRequest"),
        ("Detokenize", b"\x08\x82\x02", "token_ids: token ids must be below 258 (the vocabulary), got 258"),
        ("Detokenize", b"\x0a\x81\x80\x40" + bytes((1 << 20) + 1), "token_ids: 1048576 at most, got 1048577"),
        ("Detokenize", b"\xff" * 9, "message: is no baton.v1.DetokenizeRequest"),
        ("Explain", b"\xff" * 9, "message: is no baton.v1.ExplainRequest"),
    ],
    ids=range(9),
)
async def test_what_is_no_prompt_and_no_token(cluster: FakeCluster, method: str, body: bytes, names: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await cluster.channel.unary_unary(f"/baton.v1.Inference/{method}")(body)
    assert (error.value.code(), error.value.details()) == (INVALID, names)
