"""Faults in a cluster of real processes: kill -9, SIGSTOP, Redis gone, store gone. The client sees no error, and the
text is that of one engine alone; afterwards all blocks are free again."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from conftest import POCKET, RedisProcess, eventually
from harness import Answer, ProcessCluster, reference

from batonpb import common_pb2, inference_pb2

pytestmark = [pytest.mark.cluster]

LONG = [256, *("".join(f"Section {n} of the library reference. " for n in range(30)).encode())]
PROMPTS = [[*LONG[: 300 + 97 * n], *f"Question {n}.\n".encode()] for n in range(4)]
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return reference(POCKET, PROMPTS, NUM_TOKENS)


@pytest.fixture
async def cluster(redis_process: RedisProcess, short_dir: Path) -> AsyncIterator[ProcessCluster]:
    cluster = ProcessCluster(POCKET, redis_process.url, short_dir, max_num_batched_tokens=64)
    cluster.router_options = {"progress_timeout_s": 5.0}
    try:
        await cluster.start(prefill=2, decode=2)
        yield cluster
    finally:
        await cluster.stop()


async def ask_all(cluster: ProcessCluster, on_message=None) -> list[Answer]:
    options = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    return await asyncio.gather(*(cluster.generate(prompt, on_message, **options) for prompt in PROMPTS))


async def hits(cluster: ProcessCluster) -> bool:
    """Whether blocks move again: of prompts that no engine has yet, for those are not fetched."""
    prompts = [[*f"{random.random()} ".encode(), *LONG[:300]] for _ in range(2)]
    answers = await asyncio.gather(*(cluster.generate(prompt, max_tokens=8) for prompt in prompts))
    assert [answer.token_ids for answer in answers] == reference(POCKET, prompts, 8)
    return sum(answer.timeline.decode_store_hit_tokens for answer in answers) > 0


def after_tokens(count: int, act):
    """A message handler that runs `act(answer so far)` once, when the first stream has seen `count` tokens."""
    done = False

    def on_message(answer: Answer) -> None:
        nonlocal done
        if not done and len(answer.token_ids) >= count:
            done = True
            act()

    return on_message


async def test_sampled_text_goes_on_as_it_would_have(cluster: ProcessCluster) -> None:
    """Temperature, filters, penalties and a seed survive a kill, and so does the search for a stop string."""
    options = {
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 50,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.1,
        "seed": 5,
    }
    [alone] = reference(POCKET, PROMPTS[:1], NUM_TOKENS, **options)
    victims = iter(("decode-0", "decode-1"))

    def kill_next() -> None:
        cluster.kill(next(victims))

    answer = await cluster.generate(PROMPTS[0], after_tokens(9, kill_next), max_tokens=NUM_TOKENS, **options)
    assert answer.token_ids == alone
    needle = bytes(alone[25:29]).decode()
    text = bytes(alone).decode()
    stopped = await cluster.generate(
        PROMPTS[0], after_tokens(5, kill_next), max_tokens=NUM_TOKENS, stop=[needle], **options
    )
    assert stopped.text == text[: text.index(needle)]


@pytest.mark.parametrize("count", [1, 7, 25])
async def test_decode_node_killed_mid_stream(cluster: ProcessCluster, expected: list[list[int]], count: int) -> None:
    answers = await ask_all(cluster, after_tokens(count, lambda: cluster.kill("decode-0")))
    assert [answer.token_ids for answer in answers] == expected
    assert sum(answer.timeline.migrations for answer in answers) >= 1
    assert all(answer.timeline.decode_node == "decode-1" for answer in answers if answer.timeline.migrations)
    await cluster.assert_quiet()
    # The node comes back as a new incarnation and takes work again.
    old = cluster.processes["decode-0"].record["incarnation"]
    await cluster.start_node("decode-0", "decode")
    assert cluster.processes["decode-0"].record["incarnation"] != old

    async def used_again() -> bool:
        return "decode-0" in {answer.timeline.decode_node for answer in await ask_all(cluster)}

    await eventually(used_again, 30, "decode-0 takes work again")


async def test_prefill_node_killed_while_it_computes(cluster: ProcessCluster, expected: list[list[int]]) -> None:
    # Prompts that begin alike may all go to the other node, so there are some that have nothing in common.
    others = [[n, *(random.Random(n).choices(range(256), k=1000))] for n in range(6)]
    fillers = [asyncio.create_task(cluster.generate(prompt, max_tokens=4, ignore_eos=True)) for prompt in others]
    tasks = asyncio.create_task(ask_all(cluster))

    async def busy() -> bool:
        load = await cluster.load("prefill-0")
        return load.num_running + load.num_waiting > 0

    await eventually(busy, 20, "prefill-0 has work")
    cluster.kill("prefill-0")
    assert [answer.token_ids for answer in await tasks] == expected
    assert all(len(answer.token_ids) == 4 for answer in await asyncio.gather(*fillers))
    await cluster.assert_quiet()


async def test_logprobs_of_prompts_come_once_whoever_dies(cluster: ProcessCluster, expected: list[list[int]]) -> None:
    """With the first token, which a failover behind it does not bring again, and one before it does."""
    sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)

    async def ask(prompt: list[int], act: Callable[[], None]) -> tuple[list[int], list[float], int]:
        request = inference_pb2.GenerateRequest(sampling=sampling, prompt_logprobs=1, tokens={"token_ids": prompt})
        token_ids: list[int] = []
        logprobs: list[float] = []
        migrations = 0
        async for response in cluster.stub.Generate(request, timeout=120):
            token_ids += [token.token_id for token in response.tokens]
            logprobs += response.prompt_logprobs.logprobs
            migrations += response.timeline.migrations
            if len(token_ids) >= 3:
                act()
        return token_ids, logprobs, migrations

    async def ask_all(act: Callable[[], None] = lambda: None) -> list[tuple[list[int], list[float], int]]:
        return await asyncio.gather(*(ask(prompt, act) for prompt in PROMPTS))

    calm = await ask_all()
    behind = await ask_all(lambda: cluster.kill("decode-0"))
    asking = asyncio.create_task(ask_all())
    await asyncio.sleep(0.1)  # whatever it is at then
    cluster.kill("prefill-0")
    for answers in (calm, behind, await asking):
        assert [token_ids for token_ids, _, _ in answers] == expected
        for (_, logprobs, _), (_, first, _), prompt in zip(answers, calm, PROMPTS, strict=True):
            assert len(logprobs) == len(prompt) - 1 and logprobs == pytest.approx(first, abs=1e-4)
    assert sum(migrations for _, _, migrations in behind) >= 1
    await cluster.assert_quiet()


async def test_killed_at_random_moments(cluster: ProcessCluster, expected: list[list[int]]) -> None:
    rng = random.Random(0)
    for victim in ("decode-1", "prefill-1", "decode-0"):
        tasks = asyncio.create_task(ask_all(cluster))
        await asyncio.sleep(rng.uniform(0.0, 0.4))
        cluster.kill(victim)
        assert [answer.token_ids for answer in await tasks] == expected
        await cluster.start_node(victim, victim.split("-")[0])
        await asyncio.sleep(0.6)
    await cluster.assert_quiet()


async def test_the_last_decode_node_dies(cluster: ProcessCluster, expected: list[list[int]]) -> None:
    """Roles are labels: a prefill node decodes when nobody else is left."""
    cluster.kill("decode-1")
    answers = await ask_all(cluster, after_tokens(3, lambda: cluster.kill("decode-0")))
    assert [answer.token_ids for answer in answers] == expected


async def test_a_node_that_hangs_is_left(cluster: ProcessCluster, expected: list[list[int]]) -> None:
    answers = await ask_all(cluster, after_tokens(5, lambda: cluster.signal("decode-0", signal.SIGSTOP)))
    assert [answer.token_ids for answer in answers] == expected
    cluster.signal("decode-0", signal.SIGCONT)
    await cluster.assert_quiet()


async def test_redis_killed_and_restarted_empty(
    cluster: ProcessCluster, redis_process: RedisProcess, expected: list[list[int]]
) -> None:
    first = await ask_all(cluster, after_tokens(3, redis_process.kill))
    assert [answer.token_ids for answer in first] == expected
    # Without Redis requests go on, as misses.
    assert [answer.token_ids for answer in await ask_all(cluster)] == expected
    redis_process.start()
    await cluster.wait_for_nodes(4)

    await eventually(lambda: hits(cluster), 20, "the arena announces what it holds, and what comes")
    await cluster.assert_quiet()


async def test_store_killed_and_restarted(cluster: ProcessCluster, expected: list[list[int]]) -> None:
    answers = await ask_all(cluster, after_tokens(2, lambda: cluster.kill("store-0")))
    assert [answer.token_ids for answer in answers] == expected
    assert [answer.token_ids for answer in await ask_all(cluster)] == expected
    await cluster.processes["store-0"].stop()
    await cluster.start_store(0)

    await eventually(lambda: hits(cluster), 30, "nodes map the new arena")
    await cluster.assert_quiet()


async def test_two_hosts_share_blocks_over_the_wire(redis_url: str, short_dir: Path, expected: list[list[int]]) -> None:
    """Prefill and decode each with a store of its own: every block of the prompt crosses ZeroMQ."""
    cluster = ProcessCluster(POCKET, redis_url, short_dir)
    try:
        await cluster.start_store(0)
        await cluster.start_store(1)
        await asyncio.gather(
            cluster.start_router(),
            cluster.start_node("prefill-0", "prefill", store=0),
            cluster.start_node("decode-0", "decode", store=1),
        )
        await cluster.wait_for_nodes(2)
        answers = await ask_all(cluster)
        assert [answer.token_ids for answer in answers] == expected
        assert sum(answer.timeline.decode_store_hit_tokens for answer in answers) > 0
        await cluster.assert_quiet()
    finally:
        await cluster.stop()


async def test_no_node_and_all_busy(redis_url: str, short_dir: Path) -> None:
    """A pool of 20 blocks of 16 tokens: the second long request is refused while the first one streams."""
    cluster = ProcessCluster(POCKET, redis_url, short_dir, num_blocks=20)
    try:
        await cluster.start(prefill=0, decode=0, both=1)
        started = asyncio.Event()
        first = asyncio.create_task(
            cluster.generate(LONG[:200], lambda _: started.set(), max_tokens=115, ignore_eos=True)
        )
        await started.wait()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await cluster.generate(LONG[700:950], max_tokens=40)
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len((await first).token_ids) == 115
        await cluster.assert_quiet()
        cluster.kill("both-0")
        await eventually(lambda: unavailable(cluster), 20, "UNAVAILABLE without nodes")
    finally:
        await cluster.stop()


async def unavailable(cluster: ProcessCluster) -> bool:
    try:
        await cluster.generate("hello", max_tokens=2, timeout=30)
    except grpc.aio.AioRpcError as error:
        return error.code() == grpc.StatusCode.UNAVAILABLE
    return False
