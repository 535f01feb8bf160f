"""/metrics of a node: the figures of `GetLoad`, over HTTP. And nodes beside a store that drains: right tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq.asyncio
from conftest import eventually
from node_harness import Machine, journey, node_request, prompt_of, running_machine
from scraping import scrape

from kvstore.operate import StoreOperator


@pytest.fixture
async def machine(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[Machine]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        yield machine


async def test_figures_are_those_of_getload(machine: Machine) -> None:
    await machine.store()
    prefill, decode = await machine.node(role="prefill"), await machine.node(role="decode")
    prompt = prompt_of(200)
    tokens, _ = await journey(prefill, decode, node_request(prompt))
    assert tokens == machine.expected(prompt)
    load, page = await decode.load(), await scrape(decode.record.metrics_address)
    fetched = load.fetches.local
    assert fetched.num_blocks >= 12, "200 tokens are 12 full blocks, handed over in memory"
    assert page["baton_kv_fetch_blocks_total", "local"] == fetched.num_blocks
    assert page["baton_kv_fetch_bytes_total", "local"] == fetched.num_bytes
    assert page["baton_kv_fetch_seconds_total", "local"] == pytest.approx(fetched.seconds)
    assert page["baton_kv_fetch_blocks_total", "remote"] == 0
    assert page["baton_kv_chosen_blocks_total", "fetch"] == load.fetches.chosen_fetch_blocks
    assert page["baton_kv_chosen_blocks_total", "compute"] == load.fetches.chosen_compute_blocks
    assert page["baton_kv_predictions_total",] == load.fetches.num_predictions
    assert page["baton_kv_predicted_seconds_total", "fetch"] == pytest.approx(load.fetches.predicted_fetch_s)
    assert page["baton_kv_predicted_seconds_total", "compute"] == pytest.approx(load.fetches.predicted_compute_s)
    assert page["baton_engine_steps_total",] == load.steps.num_steps > 0
    for phase in ("schedule", "build", "forward", "sample"):
        assert page["baton_engine_step_seconds_total", phase] == pytest.approx(getattr(load.steps, f"{phase}_s"))
    assert page["baton_engine_tokens_total", "decode"] == load.steps.num_decode_tokens
    steps = (await prefill.load()).steps
    assert (await scrape(prefill.record.metrics_address))[
        "baton_engine_tokens_total", "prefill"
    ] == steps.num_prefill_tokens
    assert (await machine.directory.nodes())[0].metrics_address == prefill.record.metrics_address


async def test_without(machine: Machine) -> None:
    node = await machine.node(store_dir="", metrics=False)
    assert node.record.metrics_address == ""


async def test_beside_a_store_that_drains_nodes_go_on(machine: Machine) -> None:
    store = await machine.store()
    prefill, decode = await machine.node(role="prefill"), await machine.node(role="decode")
    old, new = prompt_of(200), prompt_of(210, seed=7)
    await journey(prefill, decode, node_request(old))
    await decode.server.publisher.flush()
    held = len(store.arena.blocks())
    context = zmq.asyncio.Context()
    operator = StoreOperator(context, f"ipc://{store.config.dir}/control")
    await operator.drain()
    for _ in range(2):
        tokens, _ = await journey(prefill, decode, node_request(new))
        assert tokens == machine.expected(new)
    assert len(store.arena.blocks()) == held and store.arena.writers() == set(), "nothing was published"
    third = await machine.node(role="decode")
    tokens, decoded = await journey(prefill, third, node_request(old))
    assert tokens == machine.expected(old) and decoded.store_hit_tokens >= 192, "what it holds is read"
    assert (await operator.stats())[0].num_draining > 0

    await operator.drain(undo=True)
    await eventually(lambda: prefill.server.publisher._store.can_publish, what="its writers try again")
    tokens, _ = await journey(prefill, decode, node_request(prompt_of(220, seed=9)))
    await prefill.server.publisher.flush()
    assert len(store.arena.blocks()) > held
    context.destroy(linger=0)
