"""A node as a server and as a process: registry, health, drain, start and stop, kills, and what is left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from conftest import REPOSITORY, ServerProcess, eventually
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from node_harness import (
    BLOCK_SIZE,
    Machine,
    Node,
    decode,
    finish,
    journey,
    node_request,
    prompt_of,
    running_machine,
    sampling,
    start,
)

from batonpb import node_pb2
from deploy.node import NodeConfig, NodeServer
from engine.config import EngineConfig
from engine.engine import Engine, Progress
from kvstore.blocks import hash_blocks
from kvstore.directory import NodeRecord

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def machine(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[Machine]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        yield machine


async def record_of(machine: Machine, node_id: str) -> NodeRecord | None:
    return next((record for record in await machine.directory.nodes() if record.node_id == node_id), None)


async def health_of(node: Node, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(node.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


def test_config_survives_json() -> None:
    config = NodeConfig(node_id="n", model_dir="/m", model="m", redis_url="r", engine=EngineConfig(num_blocks=7))
    assert NodeConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="role: must be one of prefill, decode, both, got 'cook'"):
        dataclasses.replace(config, role="cook")


# --- registry and health ---


async def test_registry_tells_what_a_router_needs(machine: Machine) -> None:
    store, node = await machine.store(), await machine.node(role="prefill")
    record = await record_of(machine, "node-0")
    assert record == node.record
    assert (record.role, record.model, record.host, record.draining) == ("prefill", "tiny", "here", False)
    assert (record.kv_root, record.block_bytes) == (machine.layout.root().hex(), machine.layout.block_bytes)
    assert (record.block_size, record.vocab_size, record.max_model_len) == (16, 258, 512)
    assert (record.arena_id, record.total_blocks, record.free_blocks) == (store.record().arena_id, 64, 64)


async def test_a_node_is_told_of_when_it_is_warm(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up, may_end = Engine.warm_up, threading.Event()

    def warm_up_late(engine: Engine, progress: Progress) -> None:
        assert threading.current_thread().name == "engine", "thread pools belong to a thread"
        may_end.wait(30)
        warm_up(engine, progress)

    monkeypatch.setattr(Engine, "warm_up", warm_up_late)
    parts: list[float] = []
    server = NodeServer(machine.node_config(store_dir=""), parts.append)
    starting = asyncio.create_task(server.start())
    await asyncio.sleep(0.3)
    assert not starting.done() and not await machine.directory.nodes()
    may_end.set()
    machine.nodes.append(Node(server, await starting))
    assert await record_of(machine, "node-0") is not None
    assert parts == sorted(parts) and parts[-1] == 1.0


async def test_a_node_that_cannot_warm_up_does_not_start(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: Engine, progress: Progress) -> None:
        raise MemoryError("no memory for the first step")

    monkeypatch.setattr(Engine, "warm_up", fail)
    with pytest.raises(MemoryError, match="first step"):
        await machine.node(store_dir="")
    assert not await machine.directory.nodes()


async def test_heartbeat_tells_the_load(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    call = await node.admit(node_request(prompt_of(100)))

    async def is_told() -> bool:
        record = await record_of(machine, "node-0")
        return record is not None and (record.free_blocks, record.num_waiting) == (57, 1)

    await eventually(is_told)
    call.cancel()
    await node.prefill(node_request(prompt_of(200)))

    async def speed_is_told() -> bool:
        record = await record_of(machine, "node-0")
        return record is not None and record.prefill_tokens_per_s > 0 and record.free_blocks == 64

    await eventually(speed_is_told)


async def test_load_tells_where_the_time_of_steps_went(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    before = (await node.load()).steps
    assert before.num_steps == 0, "what comes before the node is up is not counted"
    await decode(node, node_request(prompt_of(100), sampling=sampling(max_tokens=4)))
    steps = (await node.load()).steps
    assert (steps.num_prefill_tokens, steps.num_decode_tokens, steps.num_steps) == (100, 3, 5)
    assert min(steps.schedule_s, steps.build_s, steps.forward_s, steps.sample_s) > 0.0


async def test_each_start_is_a_new_incarnation_and_stop_leaves(machine: Machine) -> None:
    incarnations = set()
    for _ in range(2):
        node = await machine.node(node_id="same", store_dir="")
        incarnations.add(node.record.incarnation)
        await node.close()
        assert await record_of(machine, "same") is None
        machine.nodes.clear()
    assert len(incarnations) == 2


async def test_a_store_that_comes_later_is_found(machine: Machine) -> None:
    node = await machine.node()
    assert node.record.arena_id == ""
    arena_id = (await machine.store()).record().arena_id

    async def is_told() -> bool:
        record = await record_of(machine, "node-0")
        return record is not None and record.arena_id == arena_id

    await eventually(is_told)


async def test_drain_is_told_and_undone(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    for drains in (True, False):
        load = await node.control.Drain(node_pb2.DrainRequest(undo=not drains))
        assert load.draining is drains

        async def is_told(drains: bool = drains) -> bool:
            record = await record_of(machine, "node-0")
            told = await health_of(node, "baton.v1.Decode") == (NOT_SERVING if drains else SERVING)
            return told and record is not None and record.draining is drains

        await eventually(is_told)
        assert await health_of(node, "") == SERVING


async def test_an_engine_that_hangs_is_sick_until_it_moves(machine: Machine) -> None:
    node = await machine.node(store_dir="", stall_s=0.5)
    await machine_hang(node, 2.0)

    async def is_sick() -> bool:
        record = await record_of(machine, "node-0")
        return await health_of(node, "") == NOT_SERVING and record is not None and record.draining

    async def is_well() -> bool:
        record = await record_of(machine, "node-0")
        return await health_of(node, "") == SERVING and record is not None and not record.draining

    await eventually(is_sick)
    await eventually(is_well)


async def machine_hang(node: Node, seconds: float) -> None:
    """Keeps the engine's thread busy, as a step that does not come back would."""
    import time

    node.server.loop.post(lambda engine: time.sleep(seconds))


async def test_reflection_lists_the_services(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    stub = reflection_pb2_grpc.ServerReflectionStub(node.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    call.cancel()
    assert {"baton.v1.Prefill", "baton.v1.Decode", "baton.v1.NodeControl", "grpc.health.v1.Health"} <= names


# --- stop ---


async def test_stop_lets_running_requests_end(machine: Machine) -> None:
    node = await machine.node(store_dir="")
    call = await node.admit(node_request(prompt_of(20), sampling=sampling(max_tokens=100)))
    await start(call)
    assert (await call.read()).WhichOneof("message") == "tokens"
    stopping = asyncio.create_task(node.server.stop())
    decoded = await finish(call)
    await stopping
    assert decoded.finished is not None
    await node.channel.close()
    machine.nodes.clear()


async def test_stop_cuts_short_what_does_not_end(machine: Machine) -> None:
    node = await machine.node(store_dir="", drain_s=0.2)
    call = await node.admit(node_request(prompt_of(20)))
    await node.server.stop()
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()
    await node.channel.close()
    machine.nodes.clear()


# --- processes ---


def process_config(machine: Machine, **fields: object) -> dict:
    return json.loads(machine.node_config(**fields).to_json())


def run_process(kind: str, config: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.process", kind, config]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


async def test_process_stops_cleanly_at_sigterm(machine: Machine, processes: list[ServerProcess]) -> None:
    process = await ServerProcess.start("node", process_config(machine, store_dir=""))
    processes.append(process)
    assert await record_of(machine, process.record["node_id"]) is not None
    process.process.terminate()
    assert await asyncio.wait_for(process.process.wait(), 60) == 0
    assert await record_of(machine, process.record["node_id"]) is None


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model_dir": "/nowhere"}, "/nowhere"),
        ({"engine": {"dtype": "float7"}}, "dtype 'float7' is not supported"),
        ({"bind_host": "203.0.113.1"}, "203.0.113.1"),
        ({"roel": "both"}, "roel"),
    ],
)
def test_process_that_cannot_start_says_why_in_one_line(
    tiny_model_dir: Path, fields: dict[str, object], problem: str
) -> None:
    config = {"node_id": "n", "model_dir": str(tiny_model_dir), "model": "tiny", "redis_url": "redis://127.0.0.1:1"}
    done = run_process("node", json.dumps(config | fields))
    errors = [line for line in done.stderr.splitlines() if line.startswith("baton node: ")]
    assert done.returncode == 1 and done.stdout == ""
    assert len(errors) == 1 and problem in errors[0]
    assert "Traceback" not in done.stderr


def test_process_of_no_kind_and_of_no_json() -> None:
    assert run_process("kitchen", "{}").returncode == 2
    done = run_process("store", "no json")
    assert done.returncode == 1 and done.stderr.startswith("baton store: JSONDecodeError")


def test_only_a_node_costs_torch() -> None:
    code = "import sys, deploy.process, deploy.node_config; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_a_failed_engine_ends_the_process(tiny_model_dir: Path) -> None:
    code = f"""
import asyncio
from deploy.node import NodeConfig, NodeServer

async def main():
    server = NodeServer(NodeConfig("n", {str(tiny_model_dir)!r}, "tiny", "redis://127.0.0.1:1"))
    await server.start()
    server.loop.post(lambda engine: 1 / 0)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    assert b"event=node_dies" in done.stderr and b"ZeroDivisionError" in done.stderr


# --- kills ---


async def test_killed_node_leaves_no_dirt(machine: Machine, processes: list[ServerProcess]) -> None:
    store = await machine.store()
    doomed = await ServerProcess.start("node", process_config(machine, node_id="doomed"))
    processes.append(doomed)
    survivor = await machine.node()
    requests = [node_request(prompt_of(400, seed=seed)) for seed in range(4)]
    node = Node(survivor.server, NodeRecord(**doomed.record))
    calls = [asyncio.create_task(node.prefill(request)) for request in requests]
    await calls[0]
    hashes = hash_blocks(machine.layout.root(), prompt_of(400), BLOCK_SIZE)

    async def is_published() -> bool:
        return [len(slots) for slots in (await machine.directory.locate(hashes)).values()] == [25]

    await eventually(is_published, what="the last blocks of the answer that came")
    doomed.kill()
    for call in calls[1:]:
        await asyncio.wait((call,))
    await node.channel.close()
    # What it had published lives on, and a slot that it was writing is nobody's.
    answer = await survivor.prefill(requests[0])
    assert answer.store_hit_tokens == 384
    assert answer.token.token_id == machine.expected(prompt_of(400))[0]
    await eventually(lambda: not [path for path in (machine.store_dir / "writers").iterdir() if is_dead(path)])
    store.arena.check_integrity()
    # A killed node's record runs out by itself.
    await eventually(lambda: is_forgotten(machine, "doomed"))
    await survivor.close()
    await store.stop()
    machine.nodes.clear()
    machine.stores.clear()
    assert list(machine.store_dir.parent.iterdir()) == []


def is_dead(lock: Path) -> bool:
    """Whether nobody holds this writer's lock."""
    import fcntl

    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


async def is_forgotten(machine: Machine, node_id: str) -> bool:
    return await record_of(machine, node_id) is None


async def test_a_stalled_store_stalls_nobody(machine: Machine, processes: list[ServerProcess]) -> None:
    store = await ServerProcess.start("store", dataclasses.asdict(machine.store_config()))
    processes.append(store)
    first, second = await machine.node(), await machine.node()
    await journey(first, second, node_request(prompt_of(100)))
    os.kill(store.pid, signal.SIGSTOP)
    try:
        for seed in (1, 2):
            tokens, _ = await journey(first, second, node_request(prompt_of(100, seed=seed)))
            assert tokens == machine.expected(prompt_of(100, seed=seed))
    finally:
        os.kill(store.pid, signal.SIGCONT)


async def test_a_killed_store_costs_time_only(machine: Machine, processes: list[ServerProcess]) -> None:
    config = dataclasses.asdict(machine.store_config())
    store = await ServerProcess.start("store", config)
    processes.append(store)
    node = await machine.node()
    call = await node.admit(node_request(prompt_of(60), sampling=sampling(max_tokens=200)))
    await start(call)
    assert (await call.read()).WhichOneof("message") == "tokens"
    store.kill()
    assert (await finish(call)).finished is not None
    decoded = await decode(node, node_request(prompt_of(90, seed=1)))
    assert decoded.token_ids == machine.expected(prompt_of(90, seed=1))
    again = await ServerProcess.start("store", config)  # removes what the killed one left
    processes.append(again)

    async def is_mapped() -> bool:
        record = await record_of(machine, "node-0")
        return record is not None and record.arena_id == again.record["arena_id"]

    await eventually(is_mapped)
