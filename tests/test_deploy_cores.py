"""Which cores a node computes on: shares that do not overlap, of what is allowed, and only for what computes."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from conftest import ServerProcess
from hypothesis import given
from hypothesis import strategies as st
from node_harness import Machine, node_request, prompt_of, running_machine

from deploy import cores
from deploy.actors import ServerSpec, build
from deploy.cores import allowed_cores, hold_to, num_usable_cores, running_on, share
from deploy.node_config import NodeConfig
from engine.loop import EngineLoop

ALLOWED = sorted(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(len(ALLOWED) < 2, reason="one core has no two shares")


@given(st.sets(st.integers(0, 200)), st.integers(1, 20))
def test_shares_are_whole_and_even(numbers: set[int], count: int) -> None:
    shares = [share(sorted(numbers), index, count) for index in range(count)]
    assert [core for part in shares for core in part] == sorted(numbers), "each core is in one share"
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_threads_of_one_core_lie_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two packages of two cores of two threads, numbered as Linux does: second threads behind all first ones."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{cpu % 4 // 2}\n")
        (folder / "core_id").write_text(f"{cpu % 2}\n")
    monkeypatch.setattr(cores, "CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)) - {3})
    assert allowed_cores() == [0, 4, 1, 5, 2, 6, 7]
    monkeypatch.setattr(cores, "CPUS", tmp_path / "nowhere")
    assert allowed_cores() == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "6400000 100000\n"}, 16),
        ({"cpu.max": "no sense\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ({}, 16),
    ],
)
def test_a_container_s_quota_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert num_usable_cores(tmp_path) == expected


def test_a_thread_is_held_for_a_while() -> None:
    with running_on(ALLOWED[:1]):
        assert os.sched_getaffinity(0) == {ALLOWED[0]}
    assert sorted(os.sched_getaffinity(0)) == ALLOWED
    with running_on(()):
        assert sorted(os.sched_getaffinity(0)) == ALLOWED


def test_a_core_that_is_not_there_is_no_reason_to_fail(caplog: pytest.LogCaptureFixture) -> None:
    hold_to([1 << 15])
    assert "event=not_pinned" in caplog.text
    assert sorted(os.sched_getaffinity(0)) == ALLOWED


def test_workers_of_a_held_thread_are_held_too() -> None:
    """What pinning relies on: OpenMP makes the workers of a thread from that thread."""
    before, made = tasks(os.getpid()), {}
    num_threads = torch.get_num_threads()

    def compute() -> None:
        hold_to(ALLOWED[:1])
        torch.set_num_threads(2)
        torch.rand(512, 512) @ torch.rand(512, 512)
        made.update({task: cpus for task, cpus in tasks(os.getpid()).items() if task not in before})
        torch.set_num_threads(num_threads)

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert len(made) >= 2, "the thread, and its worker"
    assert set(made.values()) == {(ALLOWED[0],)}


def tasks(pid: int) -> dict[int, tuple[int, ...]]:
    """The cores of each thread of a process."""
    return {int(path.name): cores_of(int(path.name)) for path in Path(f"/proc/{pid}/task").iterdir()}


def cores_of(task: int) -> tuple[int, ...]:
    try:
        return tuple(sorted(os.sched_getaffinity(task)))
    except ProcessLookupError:  # it ended meanwhile
        return ()


# --- nodes ---


@pytest.fixture
async def machine(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[Machine]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        yield machine


@needs_two_cores
async def test_a_node_computes_on_its_share_and_serves_anywhere(
    machine: Machine, processes: list[ServerProcess]
) -> None:
    for _ in range(2):  # a restarted node gets the same cores again
        config = machine.node_config(node_id="pinned", store_dir="", core_share=1, num_core_shares=2)
        process = await ServerProcess.start("node", json.loads(config.to_json()))
        processes.append(process)
        own = tuple(sorted(share(allowed_cores(), 1, 2)))
        assert own in tasks(process.pid).values()
        assert cores_of(process.pid) == tuple(ALLOWED), "its event loop's"
        process.kill()
        await asyncio.wait_for(process.process.wait(), 30)


async def test_a_share_that_is_too_small_is_not_kept(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    node = await machine.node(store_dir="", core_share=0, num_core_shares=len(ALLOWED) + 1, engine={"num_threads": 2})
    assert await engine_cores(node.server.loop) == ALLOWED
    assert "event=not_pinned node=node-0" in caplog.text
    assert (await node.prefill(node_request(prompt_of(20)))).token is not None


async def test_threads_of_a_share_are_as_many_as_its_cores(machine: Machine) -> None:
    node = await machine.node(store_dir="", core_share=0, num_core_shares=len(ALLOWED), engine={"num_threads": 0})
    assert await engine_cores(node.server.loop) == [allowed_cores()[0]]
    assert await node.server.loop.call(lambda _: torch.get_num_threads()) == 1


async def engine_cores(loop: EngineLoop) -> list[int]:
    return sorted(await loop.call(lambda _: os.sched_getaffinity(0)))


def test_a_share_must_be_one_of_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="core_share: must be below num_core_shares = 2"):
        NodeConfig("n", "/m", "m", "redis://r", core_share=2, num_core_shares=2)


def test_a_server_s_environment_yields_to_the_machine_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_TEST_SET", "machine")
    monkeypatch.setenv("BATON_TEST_UNSET", "")
    monkeypatch.delenv("BATON_TEST_UNSET")
    config = NodeConfig("n", "/m", "m", "redis://r")
    build(ServerSpec("node", "n", config, tmp_path, environment={"BATON_TEST_SET": "a", "BATON_TEST_UNSET": "b"}))
    assert (os.environ["BATON_TEST_SET"], os.environ["BATON_TEST_UNSET"]) == ("machine", "b")
