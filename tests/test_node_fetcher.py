"""Blocks follow the prefill that makes them: what is on its way is waited for, what does not come is computed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import eventually
from node_harness import (
    BLOCK_SIZE,
    Machine,
    Node,
    decode,
    finish,
    ids,
    journey,
    node_request,
    prompt_of,
    running_machine,
    start,
)

from engine.request import RequestOutput
from kvstore.blocks import BlockHash, piece_hashes
from kvstore.client import Match
from kvstore.directory import ON_DISK
from node.fetcher import DIRECTORY_PACE, LOCAL_PACE
from node.intake import MAX_PATIENCE_S, MIN_WIRE_LIMIT_S, PATIENCE_S, Intake


@pytest.fixture
async def machine(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[Machine]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        yield machine


def hold_up(node: Node, gate: asyncio.Event) -> None:
    """Nothing that `node` publishes reaches the arena before the gate is open."""
    store: Any = node.server.publisher._store
    publish = store.publish

    async def late(*arguments: Any) -> int:
        await gate.wait()
        return int(await publish(*arguments))

    store.publish = late


def count_calls(node: Node) -> list[str]:
    """Grows with each call of a fetcher on the engine's thread, each of which waits for the end of a step."""
    calls: list[str] = []
    call = node.server.loop.call

    async def counted(fn: Callable[[Any], Any]) -> Any:
        if fn.__qualname__.startswith("Fetcher."):
            calls.append(fn.__qualname__)
        return await call(fn)

    node.server.loop.call = counted  # type: ignore[method-assign]
    return calls


async def test_the_token_does_not_wait_for_the_blocks_but_the_second_one_does(machine: Machine) -> None:
    await machine.store()
    first, second = await machine.node(), await machine.node()
    second.server.intake.prefill_tokens_per_s = 1.0  # whatever comes is worth waiting for
    gate = asyncio.Event()
    hold_up(first, gate)
    call = await second.admit(node_request(prompt_of(200)))
    calls = count_calls(second)
    answer = await first.answer(node_request(prompt_of(200)))
    assert answer.coming_blocks == 12
    await start(call, [answer.token.token_id], answer.coming_blocks)
    reading = asyncio.create_task(finish(call))
    await asyncio.sleep(0.3)
    assert not reading.done()
    assert not calls
    gate.set()
    decoded = await reading
    assert not [name for name in calls if ".release" in name], "it came with the last blocks, not a step later"
    assert [answer.token.token_id, *decoded.token_ids] == machine.expected(prompt_of(200))
    assert decoded.store_hit_tokens == 192


async def test_what_never_comes_is_computed(machine: Machine) -> None:
    store = await machine.store()
    node = await machine.node()
    node.server.intake.prefill_tokens_per_s = 1000.0
    outputs = machine.expected(prompt_of(100))
    call = await node.admit(node_request(prompt_of(100)))
    began_s = time.monotonic()
    await start(call, outputs[:1], coming_blocks=6)
    tokens = outputs[:1] + ids((await call.read()).tokens.tokens)
    assert 0.09 < time.monotonic() - began_s < 1.0, "as long as computing them takes, and not longer"
    assert tokens + (await finish(call)).token_ids == outputs
    assert store.arena.num_free <= store.record().num_slots


async def test_who_publishes_nothing_promises_nothing(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    assert (await node.answer(node_request(prompt_of(100)))).coming_blocks == 0


async def test_patience(machine: Machine) -> None:
    intake = (await machine.node(store_dir="")).server.intake
    assert intake.patience_s(5) == PATIENCE_S
    intake.prefill_tokens_per_s = 100.0
    assert intake.patience_s(5) == pytest.approx(5 * BLOCK_SIZE / 100.0)
    assert intake.patience_s(5000) == MAX_PATIENCE_S


async def test_the_wire_may_take_no_longer_than_computing(machine: Machine) -> None:
    intake = (await machine.node(store_dir="")).server.intake
    assert intake.wire_limit_s(5) == math.inf
    intake.prefill_tokens_per_s = 100.0
    assert intake.wire_limit_s(50) == pytest.approx(50 * BLOCK_SIZE / 100.0)
    assert intake.wire_limit_s(1) == MIN_WIRE_LIMIT_S


@pytest.mark.parametrize("pace", [LOCAL_PACE, DIRECTORY_PACE])
def test_a_chunk_is_seen_soon_for_its_time_and_looked_for_seldom(pace: Any) -> None:
    for chunk_s in (0.02, 0.5, 5.0):
        now_s, num_looks = 0.0, 0
        while now_s < chunk_s:
            now_s += pace.pause_s(now_s)
            num_looks += 1
        assert now_s - chunk_s <= max(chunk_s / 4, 0.01)
        assert num_looks <= 35 + 20 * chunk_s


async def test_both_sides_of_the_choice_are_told(machine: Machine) -> None:
    await machine.store()
    first, second, third = [await machine.node() for _ in range(3)]
    await journey(first, second, node_request(prompt_of(200)))
    fetches = (await second.load()).fetches
    assert (fetches.local.num_blocks, fetches.remote.num_blocks) == (12, 0)
    assert fetches.local.num_bytes == 12 * machine.layout.block_bytes and fetches.local.seconds > 0
    assert (fetches.chosen_fetch_blocks, fetches.chosen_compute_blocks) == (12, 0)
    # A link that brings a byte a second: the same blocks are computed, and both predictions are told.
    intake = third.server.intake
    intake.prefill_tokens_per_s = 1000.0
    arena_id = machine.stores[0].record().arena_id
    intake.store.links.begin(arena_id, 1).end(1, time.monotonic() - machine.layout.block_bytes, time.monotonic())
    before = (await third.load()).fetches
    computed = await decode(third, node_request(prompt_of(200)))
    assert computed.token_ids == machine.expected(prompt_of(200))
    fetches = (await third.load()).fetches
    assert computed.store_hit_tokens == 0 and fetches.local.num_blocks == before.local.num_blocks
    assert fetches.chosen_fetch_blocks == 0 and fetches.chosen_compute_blocks >= 12
    assert fetches.num_predictions >= 1
    assert fetches.predicted_fetch_s > 12 > fetches.predicted_compute_s >= 12 * BLOCK_SIZE / 1000.0


async def test_a_node_that_ran_tails_alone_knows_what_computing_takes(machine: Machine) -> None:
    """From its warm-up; so it does not fetch over a link that brings a byte a second. Routers hear of no speed."""
    store = await machine.store()
    first, second = await machine.node(), await machine.node(is_measured=True)
    await journey(first, second, node_request(prompt_of(192)))  # 12 blocks, and a tail of one token
    load = second.server.loop.engine.load()
    assert load.prefill_tokens_per_s == 0.0 < load.decode_step_s
    intake = second.server.intake
    assert intake.prefill_tokens_per_s > 0.0
    await first.prefill(node_request(prompt_of(192, seed=1)))
    block_bytes, now_s = machine.layout.block_bytes, time.monotonic()
    intake.store.links.begin(store.record().arena_id, 1).end(1, now_s - block_bytes, now_s)
    computed = await decode(second, node_request(prompt_of(192, seed=1)))
    assert computed.token_ids == machine.expected(prompt_of(192, seed=1))
    assert computed.store_hit_tokens == 0


async def test_bytes_from_another_machine_are_counted_apart(
    machine: Machine, tiny_model_dir: Path, redis_url: str, short_dir: Path
) -> None:
    await machine.store()
    first = await machine.node()
    async with running_machine(tiny_model_dir, redis_url, short_dir / "other") as other:
        await other.store(host="there")
        far = await other.node(node_id="far")
        for seed in range(2):
            tokens, decoded = await journey(first, far, node_request(prompt_of(200, seed)))
            assert tokens == machine.expected(prompt_of(200, seed))
            assert decoded.store_hit_tokens == 192
        fetches = (await far.load()).fetches
        assert (fetches.local.num_blocks, fetches.remote.num_blocks) == (0, 24)
        assert fetches.remote.num_bytes == 24 * machine.layout.block_bytes and fetches.remote.seconds > 0


async def test_a_hit_that_begins_here_and_ends_on_another_machine(
    machine: Machine, tiny_model_dir: Path, redis_url: str, short_dir: Path
) -> None:
    await machine.store()
    first = await machine.node()
    async with running_machine(tiny_model_dir, redis_url, short_dir / "other") as other:
        await other.store(host="there")
        beginning, whole = await other.node(node_id="far-0"), await other.node(node_id="far-1")
        await beginning.prefill(node_request(prompt_of(100)))
        await first.prefill(node_request(prompt_of(200)))  # publishes here what it had to compute
        answer = await whole.prefill(node_request(prompt_of(200)))
        assert answer.token.token_id == machine.expected(prompt_of(200))[0]
        assert answer.store_hit_tokens == 192
        fetches = (await whole.load()).fetches
        assert (fetches.local.num_blocks, fetches.remote.num_blocks) == (6, 6)


async def test_what_one_reader_fetched_from_another_machine_the_next_one_here_reads_mapped(
    machine: Machine, tiny_model_dir: Path, redis_url: str, short_dir: Path
) -> None:
    await machine.store()
    first = await machine.node()
    await first.prefill(node_request(prompt_of(200)))
    async with running_machine(tiny_model_dir, redis_url, short_dir / "other") as other:
        store = await other.store(host="there")
        hot, second = await other.node(node_id="far-0"), await other.node(node_id="far-1")
        assert (await hot.prefill(node_request(prompt_of(200)))).store_hit_tokens == 192
        fetches = (await hot.load()).fetches
        assert (fetches.local.num_blocks, fetches.remote.num_blocks) == (0, 12)
        await eventually(lambda: len(store.arena.blocks()) == 12, what="the replicas are in the arena")
        answer = await second.prefill(node_request(prompt_of(200)))
        assert answer.token.token_id == machine.expected(prompt_of(200))[0] and answer.store_hit_tokens == 192
        fetches = (await second.load()).fetches
        assert (fetches.local.num_blocks, fetches.remote.num_blocks) == (12, 0)
        assert len(machine.stores[0].arena.blocks()) == 12, "and there they are as before"


async def test_follows_a_prefill_chunk_by_chunk(machine: Machine) -> None:
    await machine.store()
    first, second = await machine.node(engine={"max_num_batched_tokens": 16}), await machine.node()
    engine = first.server.loop.engine
    step = engine.step

    def slow_step() -> list[RequestOutput]:
        time.sleep(0.02)
        return step()

    engine.step = slow_step  # type: ignore[method-assign]
    call = await second.admit(node_request(prompt_of(400)))
    (held,) = second.server.admission.requests
    seen: set[int] = set()
    answering = asyncio.create_task(first.answer(node_request(prompt_of(400))))
    while not answering.done():
        seen.add(held.num_store_hit_tokens)
        await asyncio.sleep(0.005)
    await eventually(lambda: held.num_store_hit_tokens == 384, what="all but the last block, before Start")
    assert len(seen) > 5, "it came piece by piece"
    await start(call, [answering.result().token.token_id], answering.result().coming_blocks)
    tokens = [answering.result().token.token_id, *(await finish(call)).token_ids]
    assert tokens == machine.expected(prompt_of(400))


@pytest.mark.parametrize("num_pieces", [1, 4])
def test_each_block_counts_once_for_where_it_was(num_pieces: int) -> None:
    store: Any = SimpleNamespace(local_arena_id="here")
    intake = Intake(store, BLOCK_SIZE, 64, pieces=range(num_pieces))
    tiers = (("here", 3), ("here", ON_DISK), ("there", 5), ("there", 6), ("there", ON_DISK))
    hashes = piece_hashes([BlockHash(bytes([n]) * 16) for n in range(5)], intake.pieces)
    places = tuple(place for place in tiers for _ in intake.pieces)
    intake.arrived(Match(tuple(hashes), places), 4)
    assert intake.hits == {"memory": 1, "disk": 1, "remote": 2}
