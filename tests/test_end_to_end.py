"""The oracle: what the cluster puts out is what one engine, and `transformers` `generate`, put out.

One cluster of real processes (2 prefill, 2 decode, 1 store, 1 router), the pocket model in fp32.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from conftest import POCKET, RedisProcess, eventually
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from harness import ProcessCluster, reference
from openai import AsyncOpenAI

from batonpb import common_pb2, inference_pb2

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

SYSTEM = "The following is the reference manual of the Python language, written for people who know it.\n\n" * 3
QUESTIONS = ["What is a generator?\n", "How do I open a file?\n", "Why are strings immutable?\n", "What is a class?\n"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[ProcessCluster]:
    redis_process = RedisProcess()
    folder = Path(tempfile.mkdtemp(prefix="baton-", dir="/dev/shm"))
    cluster = ProcessCluster(POCKET, redis_process.url, folder, max_num_batched_tokens=64)
    try:
        await cluster.start(prefill=2, decode=2)
        yield cluster
    finally:
        await cluster.stop()
        redis_process.close()
        left = [str(path) for path in folder.rglob("*") if path.is_file()]
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, "the store left files behind"


def encode(text: str) -> list[int]:
    """The pocket model's tokens: a beginning, then bytes."""
    return [256, *text.encode()]


async def test_tokens_equal_one_engine_and_transformers(cluster: ProcessCluster) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompts = [encode(SYSTEM + question) for question in QUESTIONS]
    prompts += [prompts[0][:n] for n in (1, 15, 16, 17, 56)]
    answers = await asyncio.gather(*(cluster.generate(prompt, max_tokens=24) for prompt in prompts))
    assert [answer.token_ids for answer in answers] == reference(POCKET, prompts, 24)
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=257)
        assert answer.token_ids == out[0, len(prompt) :].tolist()
    await cluster.assert_quiet()


async def test_both_doors_give_the_same_text(cluster: ProcessCluster) -> None:
    """OpenAI's client, streaming and not, and gRPC: one engine's tokens."""
    prompt = encode(SYSTEM + QUESTIONS[0])
    [expected_ids] = reference(POCKET, [prompt], 24)
    ask: dict[str, Any] = {"model": "pocket", "prompt": SYSTEM + QUESTIONS[0], "max_tokens": 24, "temperature": 0}
    url = f"http://{cluster.processes['router'].record['http_address']}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answer = await client.completions.create(**ask, logprobs=1)
        stream = await client.completions.create(**ask, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert answer.choices[0].text == text == (await cluster.generate(prompt, max_tokens=24)).text
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.tokens is not None
    assert "".join(answer.choices[0].logprobs.tokens).encode() == bytes(id for id in expected_ids if id < 256)
    assert answer.usage is not None and answer.usage.completion_tokens == len(expected_ids)
    await cluster.assert_quiet()


async def test_a_long_prompt_takes_both_legs(cluster: ProcessCluster) -> None:
    prompt = encode("".join(f"Chapter {n} of the manual. " for n in range(40)))
    answer = await cluster.generate(prompt, max_tokens=8)
    assert answer.timeline.prefill_node.startswith("prefill-")
    assert answer.timeline.decode_node.startswith("decode-")
    # The decode node fetches all full blocks of the prompt but the one that holds its last token.
    assert answer.timeline.decode_store_hit_tokens >= (len(prompt) - 1) // 16 * 16 - 16
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.output_tokens == 8
    assert answer.timeline.first_token_s > 0 and answer.timeline.finished_s >= answer.timeline.first_token_s


async def test_second_turn_of_a_conversation_hits(cluster: ProcessCluster) -> None:
    turns = [("user", "What is a decorator, and what are decorators good for in real programs?")]
    first = await cluster.generate(turns, max_tokens=64)
    turns += [("assistant", first.text), ("user", "And what is a metaclass?")]
    second = await cluster.generate(turns, max_tokens=16)
    # The second prompt goes on from the first prompt and from what decoding made of it.
    assert second.usage.cached_tokens >= (first.usage.prompt_tokens + 48) // 16 * 16 - 16
    assert second.usage.cached_tokens == second.usage.local_hit_tokens + second.usage.store_hit_tokens


async def test_sampled_text_is_the_same_each_time(cluster: ProcessCluster) -> None:
    prompt = encode("The import system")
    options = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 7, "presence_penalty": 0.3}
    first, again = [await cluster.generate(prompt, max_tokens=48, **options) for _ in range(2)]
    assert first.token_ids == again.token_ids
    [alone] = reference(POCKET, [prompt], 48, **options)
    assert first.token_ids == alone
    other = await cluster.generate(prompt, max_tokens=48, **(options | {"seed": 8}))
    assert other.token_ids != first.token_ids


async def num_computed(cluster: ProcessCluster) -> int:
    """Tokens that all engines have computed: prompts, their tails behind hits, and decode steps."""
    loads = [await cluster.load(name) for name in cluster.baseline]
    return sum(load.steps.num_prefill_tokens + load.steps.num_decode_tokens for load in loads)


async def test_several_answers_compute_their_prompt_once(cluster: ProcessCluster) -> None:
    prompt = encode("".join(f"Section {n} of the manual of answers. " for n in range(12)))
    sampling = common_pb2.SamplingParams(temperature=0.9, max_tokens=8, seed=5, ignore_eos=True)
    request = inference_pb2.GenerateRequest(n=4, sampling=sampling, tokens={"token_ids": prompt})
    before = await num_computed(cluster)
    token_ids: list[list[int]] = [[], [], [], []]
    async for response in cluster.stub.Generate(request):
        token_ids[response.index] += [token.token_id for token in response.tokens]
    [one] = reference(POCKET, [prompt], 8, temperature=0.9, seed=5, ignore_eos=True)
    [last] = reference(POCKET, [prompt], 8, temperature=0.9, seed=8, ignore_eos=True)
    assert token_ids[0] == one and token_ids[3] == last
    await cluster.assert_quiet()
    # The prompt, and for each answer its output and, in each of two legs, the blocks that could not be a hit. Where the
    # machine is busy, one may find that computing is sooner than waiting; four that know nothing of each other make 4.
    assert await num_computed(cluster) - before <= 2 * len(prompt) + 4 * (8 + 2 * 2 * 16)


async def test_stop_strings_tokens_and_logprobs(cluster: ProcessCluster) -> None:
    prompt = encode("Iterators and generators")
    free = await cluster.generate(prompt, max_tokens=60, logprobs=3)
    assert free.finish_reason == common_pb2.FINISH_REASON_LENGTH and len(free.token_ids) == 60
    for token in free.tokens:
        assert len(token.logprobs.top) == 3
        assert token.logprobs.top[0].token_id == token.token_id
        assert abs(token.logprobs.top[0].logprob - token.logprobs.logprob) < 1e-6
    needle = free.text[20:24]
    stopped = await cluster.generate(prompt, max_tokens=60, stop=[needle])
    assert stopped.text == free.text[: free.text.index(needle)]
    assert stopped.finish_reason == common_pb2.FINISH_REASON_STOP
    by_token = await cluster.generate(prompt, max_tokens=60, stop_token_ids=[free.token_ids[30]])
    assert by_token.finish_reason == common_pb2.FINISH_REASON_STOP
    assert by_token.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[30]) + 1]
    one = await cluster.generate(prompt, max_tokens=1)
    assert one.token_ids == free.token_ids[:1] and one.finish_reason == common_pb2.FINISH_REASON_LENGTH
    await cluster.assert_quiet()


async def test_logprobs_of_prompts_are_those_of_transformers(cluster: ProcessCluster) -> None:
    """Over both doors, by one leg and by two, in chunks of 64, whatever of the prompts is cached."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    url = f"http://{cluster.processes['router'].record['http_address']}/v1"
    legs: set[bool] = set()
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        for prompt in (encode("It is"), encode(SYSTEM + QUESTIONS[0]), encode(SYSTEM * 3)):
            await cluster.generate(prompt, max_tokens=1)
            with torch.no_grad():
                expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            taken = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
            tops = expected.topk(3).values.flatten().tolist()
            request = inference_pb2.GenerateRequest(
                tokens=inference_pb2.TokenPrompt(token_ids=prompt),
                sampling=common_pb2.SamplingParams(max_tokens=3, temperature=0.0),
                prompt_logprobs=3,
            )
            found = [response async for response in cluster.stub.Generate(request, timeout=60)]
            assert [response.HasField("prompt_logprobs") for response in found] == [True, *[False] * (len(found) - 1)]
            scores = found[0].prompt_logprobs
            assert list(scores.token_ids) == prompt and scores.num_top == 3
            assert list(scores.logprobs) == pytest.approx(taken, abs=1e-4)
            assert list(scores.top_logprobs) == pytest.approx(tops, abs=1e-4)
            ids = [token.token_id for response in found for token in response.tokens]
            assert [ids] == reference(POCKET, [prompt], 3)
            assert found[-1].usage.cached_tokens == 0
            legs.add(bool(found[-1].timeline.prefill_node))
            for max_tokens in (1, 0):
                answer = await client.completions.create(
                    model="pocket", prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=3, temperature=0
                )
                lists = answer.choices[0].logprobs
                assert lists is not None and lists.token_logprobs is not None and lists.top_logprobs is not None
                assert lists.token_logprobs[0] is None and len(lists.token_logprobs) == len(prompt) + max_tokens
                assert lists.token_logprobs[1 : len(prompt)] == pytest.approx(taken, abs=1e-4)
                most_likely = expected.argmax(-1).tolist()
                for token_id, best, logprob, top in zip(
                    prompt[1:], most_likely, lists.token_logprobs[1:], lists.top_logprobs[1:], strict=False
                ):
                    assert (logprob == max(top.values())) == (token_id == best)
    assert True in legs, "no prompt took both legs"
    await cluster.assert_quiet()


async def test_two_continuations_are_told_apart_as_lm_eval_does(cluster: ProcessCluster) -> None:
    """The likelier end of a text has the larger sum, and the model's own is the greedy one."""
    context = encode(SYSTEM + "What is a ")
    [own] = reference(POCKET, [context], 6)
    ends = [own, [*b"zqxjkv"]]
    url = f"http://{cluster.processes['router'].record['http_address']}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answer = await client.completions.create(
            model="pocket",
            prompt=[[*context, *end] for end in ends],
            max_tokens=1,
            echo=True,
            logprobs=1,
            temperature=0,
        )
    sums, is_greedy = [], []
    for choice in sorted(answer.choices, key=lambda one: one.index):
        assert choice.logprobs is not None
        logprobs = (choice.logprobs.token_logprobs or [])[len(context) : -1]
        tops = (choice.logprobs.top_logprobs or [])[len(context) : -1]
        sums.append(sum(logprobs))
        is_greedy.append(all(one == max(top.values()) for one, top in zip(logprobs, tops, strict=True)))
    assert sums[0] > sums[1] and is_greedy == [True, False]
    await cluster.assert_quiet()


async def test_a_client_that_leaves_frees_everything(cluster: ProcessCluster) -> None:
    request = inference_pb2.GenerateRequest(text=SYSTEM * 4, sampling=common_pb2.SamplingParams(max_tokens=2000))
    for wait_for in (0, 1, 5):
        call = cluster.stub.Generate(request)
        seen = 0
        while seen < wait_for and await call.read() is not grpc.aio.EOF:
            seen += 1
        call.cancel()
    await cluster.assert_quiet()


async def test_a_deadline_frees_everything(cluster: ProcessCluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await cluster.generate(SYSTEM * 4, max_tokens=2000, ignore_eos=True, timeout=0.5)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await cluster.assert_quiet()


BAD: list[tuple[dict, str]] = [
    ({"text": ""}, "prompt"),
    ({}, "prompt"),
    ({"tokens": inference_pb2.TokenPrompt(token_ids=[])}, "prompt"),
    ({"tokens": inference_pb2.TokenPrompt(token_ids=[258])}, "258"),
    ({"text": "x" * 5000}, "4096"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(temperature=-0.5)}, "temperature"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(temperature=float("nan"))}, "temperature"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(max_tokens=0)}, "max_tokens"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(top_p=0.0)}, "top_p"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(top_k=-1)}, "top_k"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(min_p=1.5)}, "min_p"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(repetition_penalty=0.0)}, "repetition_penalty"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(presence_penalty=3.0)}, "presence_penalty"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(frequency_penalty=-3.0)}, "frequency_penalty"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(logprobs=21)}, "logprobs"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(min_tokens=9, max_tokens=8)}, "min_tokens"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(stop=[""])}, "stop"),
    ({"text": "x", "sampling": common_pb2.SamplingParams(stop_token_ids=[300])}, "stop_token_ids"),
    ({"text": "x", "model": "another"}, "model"),
    ({"text": "x", "request_id": "i" * 200}, "request_id"),
    ({"text": "x" * (5 << 20)}, "prompt"),
]


@pytest.mark.parametrize(("fields", "names"), BAD, ids=[names + str(n) for n, (_, names) in enumerate(BAD)])
async def test_bad_input_names_field_and_limit(cluster: ProcessCluster, fields: dict, names: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in cluster.stub.Generate(inference_pb2.GenerateRequest(**fields)):
            pass
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT, error.value.details()
    assert names in error.value.details()
    assert len((await cluster.generate("still here", max_tokens=2)).token_ids) == 2


async def test_invalid_utf8_and_garbage_are_refused(cluster: ProcessCluster) -> None:
    generate = cluster.channel.unary_stream("/baton.v1.Inference/Generate")
    for body in (b"\x1a\x02\xff\xfe", b"\xff" * 64, b"\x1a\xff\xff\xff\xff\x0f"):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in generate(body):
                pass
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT, error.value
        assert error.value.details()
    assert len((await cluster.generate("still here", max_tokens=2)).token_ids) == 2


async def test_health_reflection_and_model(cluster: ProcessCluster) -> None:
    model = await cluster.stub.GetModel(inference_pb2.GetModelRequest())
    assert (model.vocab_size, model.max_model_len, model.block_size) == (258, 4096, 16)
    assert model.has_chat_template
    for name in ("router", "prefill-0", "decode-1"):
        async with grpc.aio.insecure_channel(cluster.processes[name].record["address"]) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            async for reply in stub.ServerReflectionInfo(iter([request])):
                names = {service.name for service in reply.list_services_response.service}
            assert names >= ({"baton.v1.Inference"} if name == "router" else {"baton.v1.Prefill", "baton.v1.Decode"})


async def test_a_shared_system_prompt_does_not_herd(cluster: ProcessCluster) -> None:
    prompts = [SYSTEM * 2 + f"Question {n}: what then?" for n in range(16)]
    answers = await asyncio.gather(*(cluster.generate(prompt, max_tokens=16) for prompt in prompts))
    assert len({answer.timeline.decode_node for answer in answers}) == 2
    # First legs are shared out too, unless it is sooner to queue where the common part is just being computed.
    firsts = [answer for answer in answers if answer.timeline.prefill_node]
    computed = sum(answer.usage.prompt_tokens - answer.usage.cached_tokens for answer in firsts)
    is_shared_out = len({answer.timeline.prefill_node for answer in firsts}) == 2
    assert is_shared_out or computed <= sum(answer.usage.prompt_tokens for answer in firsts) / 2
    await cluster.assert_quiet()


async def test_drained_node_takes_nothing_new(cluster: ProcessCluster) -> None:
    from batonpb import node_pb2, node_pb2_grpc

    async with grpc.aio.insecure_channel(cluster.processes["decode-0"].record["address"]) as channel:
        control = node_pb2_grpc.NodeControlStub(channel)
        assert (await control.Drain(node_pb2.DrainRequest())).draining
        answers = await asyncio.gather(*(cluster.generate(SYSTEM + str(n), max_tokens=4) for n in range(6)))
        assert {answer.timeline.decode_node for answer in answers} == {"decode-1"}
        assert not (await control.Drain(node_pb2.DrainRequest(undo=True))).draining

        async def back() -> bool:
            answers = await asyncio.gather(*(cluster.generate(SYSTEM + str(n), max_tokens=4) for n in range(6)))
            return "decode-0" in {answer.timeline.decode_node for answer in answers}

        await eventually(back, 15, "decode-0 takes work again")
