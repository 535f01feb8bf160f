"""Nodes of several ranks: blocks go from each width to each other, and the text is that of one engine on one rank."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
import pytest_asyncio
from conftest import RedisProcess, eventually
from node_harness import node_request, prompt_of
from scraping import scrape
from wide_nodes import ENGINE, WideCluster, WideNode, running_cluster

from batonpb import common_pb2, node_pb2
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import SamplingParams
from kvstore.quotas import Owner
from node.ranks import ASK_S

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

WIDTHS = {"tp1": (1, 1), "tp2": (2, 1), "tp4": (4, 1), "pp2": (1, 2)}  # of a model with 2 layers and 2 key heads
GREEDY = {"temperature": 0.0, "seed": 7, "max_tokens": 12, "ignore_eos": True}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "max_tokens": 12, "ignore_eos": True}
NUM_PROMPT_TOKENS = 150  # nine blocks and a tail, in three chunks
START_WAIT_S = 2.0  # of `far`


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tiny_model_dir: Path) -> AsyncIterator[WideCluster]:
    redis_process = RedisProcess()
    folder = Path(tempfile.mkdtemp(prefix="baton-", dir="/dev/shm"))
    try:
        async with running_cluster(tiny_model_dir, redis_process.url, folder, 2, 2) as cluster:
            # Without its own cache even a node's own blocks come out of the store.
            options = {"engine": {"enable_prefix_caching": False}}
            starts = [cluster.start_node(name, *width, **options) for name, width in WIDTHS.items()]
            await cluster.open_store("there")
            far = cluster.start_node("far", 2, host="there", start_wait_s=START_WAIT_S, **options)
            await asyncio.gather(*starts, far)
            yield cluster
    finally:
        redis_process.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> Engine:
    return Engine.from_pretrained(tiny_model_dir, EngineConfig(**ENGINE))


async def journey(
    prefill: WideNode, decode: WideNode, prompt: Sequence[int], given: dict[str, Any] = GREEDY, **fields: Any
) -> tuple[list[int], int]:
    """All tokens of both legs, and how many blocks came from the store into the second."""
    request = node_request(prompt, sampling=common_pb2.SamplingParams(**given), **fields)
    answer = await prefill.prefill(request)
    decoded = await decode.decode(request, [answer.token.token_id], answer.coming_blocks)
    return [answer.token.token_id, *decoded.token_ids], decoded.store_hit_tokens // ENGINE["block_size"]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(WIDTHS, WIDTHS)))
async def test_every_width_reads_what_every_width_wrote(
    cluster: WideCluster, alone: Engine, first: str, second: str
) -> None:
    pair = list(itertools.product(WIDTHS, WIDTHS)).index((first, second))
    for given, seed in ((GREEDY, 2 * pair), (SAMPLED, 2 * pair + 1)):
        prompt = prompt_of(NUM_PROMPT_TOKENS, seed=seed + 1)
        tokens, num_fetched = await journey(cluster.nodes[first], cluster.nodes[second], prompt, given)
        assert tokens == alone.generate([prompt], SamplingParams(**given))[0]
        assert num_fetched == NUM_PROMPT_TOKENS // ENGINE["block_size"]


@pytest.mark.parametrize("first", ["tp1", "tp4", "pp2"])
async def test_each_rank_gets_its_pieces_from_another_machine(cluster: WideCluster, alone: Engine, first: str) -> None:
    prompt = prompt_of(NUM_PROMPT_TOKENS, seed=100 + list(WIDTHS).index(first))
    there = cluster.stores["there"].arena  # what it copies may be the first to go from the arena that it came from
    before = len(there.blocks())
    tokens, num_fetched = await journey(cluster.nodes[first], cluster.nodes["far"], prompt)
    assert tokens == alone.generate([prompt], SamplingParams(**GREEDY))[0]
    assert num_fetched == 9
    await eventually(lambda: len(there.blocks()) >= before + 4 * 9, what="what was fetched is published there too")


async def test_a_start_that_never_comes_frees_the_room_of_all_ranks(cluster: WideCluster, alone: Engine) -> None:
    """And what they have fetched for it until then."""
    node, prompt = cluster.nodes["far"], prompt_of(NUM_PROMPT_TOKENS, seed=150)
    request = node_request(prompt, sampling=common_pb2.SamplingParams(**GREEDY))
    await cluster.prefill_and_publish("tp2", request, num_blocks=9)
    call = node.decode_stub.Decode(timeout=60)
    await call.write(node_pb2.DecodeRequest(admit=node_pb2.Admit(request=request)))
    assert (await call.read()).WhichOneof("message") == "admitted"
    assert not await node.is_clean()
    with pytest.raises(grpc.aio.AioRpcError, match=f"start: did not come within {START_WAIT_S} s") as error:
        await call.read()
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(node.is_clean, what="all blocks are free")
    tokens, _ = await journey(cluster.nodes["tp2"], node, prompt)
    assert tokens == alone.generate([prompt], SamplingParams(**GREEDY))[0]


async def test_tenants_have_caches_and_quotas_of_their_own(cluster: WideCluster, alone: Engine) -> None:
    """Quotas are of bytes, whoever writes them: here those of four blocks, each in four pieces, by two ranks."""
    prompt, arena = prompt_of(NUM_PROMPT_TOKENS, seed=200), cluster.stores["here"].arena
    expected = alone.generate([prompt], SamplingParams(**GREEDY))[0]
    wide, narrow = cluster.nodes["tp2"], cluster.nodes["tp1"]
    assert await journey(wide, narrow, prompt, salt=b"a") == (expected, 9)
    decoded = await narrow.decode(node_request(prompt, sampling=common_pb2.SamplingParams(**GREEDY), salt=b"b"))
    assert (decoded.token_ids, decoded.store_hit_tokens) == (expected, 0)
    quota = {"salt": b"c", "kv_quota_bytes": 16 * cluster.layout.block_bytes}
    tokens, num_fetched = await journey(wide, narrow, prompt, **quota)
    assert tokens == expected
    assert num_fetched < 9
    assert 0 < arena.num_blocks_of(Owner.of_salt(b"c").tenant) <= 16


async def settled(page: str) -> dict[tuple[str, ...], float]:
    """A leader's page, once all ranks have told of what they did before."""
    now = await scrape(page)
    while True:
        before = now
        await asyncio.sleep(2 * ASK_S)
        now = await scrape(page)
        if all(now[key] == value for key, value in before.items() if key[0] == "baton_rank_bytes_total"):
            return now


@pytest.mark.parametrize(("width", "wait"), [("tp2", "collective"), ("tp4", "collective"), ("pp2", "pipeline")])
async def test_each_rank_tells_what_it_did(cluster: WideCluster, width: str, wait: str) -> None:
    """On the leader's page: where its time went, and that it moved its share of the bytes and no more."""
    node, (tp, pp) = cluster.nodes[width], WIDTHS[width]
    page = node.ranks[0].record["metrics_address"]
    ranks = [(str(rank), str(rank // tp)) for rank in range(tp * pp)]
    before = await settled(page)
    prompt = prompt_of(NUM_PROMPT_TOKENS, seed=300 + list(WIDTHS).index(width))
    request = node_request(prompt, sampling=common_pb2.SamplingParams(**GREEDY))
    answer = await cluster.prefill_and_publish(width, request, num_blocks=9)
    decoded = await node.decode(request, [answer.token.token_id], answer.coming_blocks)
    assert decoded.store_hit_tokens == 9 * ENGINE["block_size"]
    now: dict[tuple[str, ...], float] = {}

    def moved(kind: str) -> list[float]:
        keys = [("baton_rank_bytes_total", kind, *rank) for rank in ranks]
        return [now[key] - before[key] for key in keys]

    half = 4 * cluster.layout.block_bytes // 2  # of a block: of two layers, or of two key heads, at any of these widths
    fetched = [9 * half] * len(ranks)
    published = [10 * half if rank % max(1, tp // 2) == 0 else 0 for rank in range(len(ranks))]  # decoding fills one

    async def all_have_told() -> bool:
        now.update(await scrape(page))
        steps = {now["baton_rank_steps_total", *rank] for rank in ranks}
        return len(steps) == 1 and moved("fetched") == fetched and moved("published") == published

    await eventually(all_have_told, what="each rank's share")
    assert {key[-2:] for key in now if key[0] == "baton_rank_seconds_total"} == set(ranks)
    phases = ("compute", "collective", "pipeline")
    for rank in ranks:
        assert [phase for phase in phases if now["baton_rank_seconds_total", phase, *rank] > 0] == ["compute", wait]
    assert len(set(moved("collective"))) == 1 and any(moved("pipeline")) == (pp > 1)
    if pp > 1:
        assert moved("pipeline")[0] > NUM_PROMPT_TOKENS * 64 * 4, "activations of all tokens, in float32"


async def patiently(
    node: WideNode, request: node_pb2.NodeRequest, tokens: Sequence[int], coming_blocks: int
) -> list[int]:
    """The tokens behind `tokens`, once there is room."""
    while True:
        try:
            return (await node.decode(request, tokens, coming_blocks)).token_ids
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("width", ["tp2", "pp2"])
async def test_cancelled_at_random_moments(cluster: WideCluster, alone: Engine, width: str) -> None:
    """While blocks are fetched, before its Start, among its tokens; so many at a time that room runs short.

    What is not cancelled is right, and in the end all blocks are free.
    """
    random, node, writer = Random(width), cluster.nodes[width], cluster.nodes["tp4"]
    given = GREEDY | {"max_tokens": 48}
    prompts = [prompt_of(100 + 7 * n, seed=400 + 50 * list(WIDTHS).index(width) + n) for n in range(24)]
    expected = [alone.generate([prompt], SamplingParams(**given))[0] for prompt in prompts]

    async def one(number: int) -> None:
        request = node_request(prompts[number], sampling=common_pb2.SamplingParams(**given))
        request.request_id = f"random-{number}"
        tokens, coming_blocks = [], 0
        if number % 2:
            answer = await writer.prefill(request)
            tokens, coming_blocks = [answer.token.token_id], answer.coming_blocks
        running = asyncio.create_task(patiently(node, request, tokens, coming_blocks))
        if number % 3:
            assert [*tokens, *await running] == expected[number]
            return
        await asyncio.sleep(0.2 * random.random())
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    await asyncio.gather(*map(one, range(len(prompts))))
    await eventually(node.is_clean, what="all blocks are free")
