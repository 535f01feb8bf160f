"""A node is emptied before it goes: also one that is slow to answer, and one that stops answering."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import eventually, free_port
from node_harness import Machine, finish, node_request, prompt_of, running_machine, sampling, start

from deploy import drain as module
from deploy.drain import drain


@pytest.fixture
async def machine(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[Machine]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        yield machine


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALL_S", 0.5)
    monkeypatch.setattr(module, "POLL_S", 0.02)


async def test_a_step_that_takes_longer_than_a_call_is_waited_for(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    call = await node.admit(node_request(prompt_of(20), sampling=sampling(max_tokens=50)))
    await start(call)
    node.server.loop.post(lambda engine: time.sleep(1.5))
    assert await asyncio.to_thread(drain, node.record.address, 60.0) == 0
    load = await node.load()
    assert load.draining and load.num_running == load.num_waiting == 0
    assert (await finish(call)).finished is not None


async def test_a_node_that_stops_answering_is_given_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had one request when it was heard last."""
    monkeypatch.setattr(module, "SILENCE_S", 1.5)
    node = await machine.node(store_dir="")
    call = await node.admit(node_request(prompt_of(20)))
    draining = asyncio.create_task(asyncio.to_thread(drain, node.record.address, 60.0))
    await eventually(lambda: node.server.admission.is_draining)
    await asyncio.sleep(0.3)
    assert not draining.done()
    node.server.loop.post(lambda engine: time.sleep(4.0))
    assert await asyncio.wait_for(draining, 30) == 1
    call.cancel()


async def test_whoever_interrupts_is_heard(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALL_S", 30.0)
    node = await machine.node(store_dir="")
    call = await node.admit(node_request(prompt_of(20)))
    assert await asyncio.to_thread(drain, node.record.address, 60.0, lambda: True) == 1
    call.cancel()


def test_a_node_that_is_gone_has_nothing_left() -> None:
    assert drain(f"127.0.0.1:{free_port()}", 60.0) == 0
