"""The heartbeat by itself: what goes wrong in one beat does not keep the next one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from conftest import eventually
from grpc_health.v1 import health

from deploy.heartbeat import Heartbeat
from engine.request import EngineLoad
from kvstore.directory import NodeRecord

RECORD = NodeRecord(
    node_id="n",
    incarnation="i",
    role="both",
    address="127.0.0.1:1",
    model="m",
    kv_root="00" * 16,
    block_size=16,
    block_bytes=64,
    vocab_size=258,
    max_model_len=64,
)
LOAD = EngineLoad(1, 2, 3, 4, 5, 6.0, 7.0)


class Store:
    """Its first question fails in a way that nobody thought of."""

    num_asked = 0

    @property
    def local_arena_id(self) -> str:
        self.num_asked += 1
        if self.num_asked == 1:
            raise RuntimeError("injected")
        return "a"


class Directory:
    def __init__(self) -> None:
        self.heard: list[NodeRecord] = []

    async def heartbeat_node(self, record: NodeRecord, ttl_s: float) -> None:
        self.heard.append(record)

    async def remove_node(self, node_id: str, incarnation: str) -> None: ...


async def test_a_beat_that_fails_is_not_the_last() -> None:
    async def load() -> EngineLoad:
        return LOAD

    loop: Any = SimpleNamespace(stalled_s=0.0)
    admission: Any = SimpleNamespace(load=load, is_draining=False)
    store: Any = Store()
    directory: Any = Directory()
    heartbeat = Heartbeat(RECORD, loop, admission, store, directory, health.aio.HealthServicer())
    beating = asyncio.create_task(heartbeat.run(0.01, 1.0, 30.0))
    await eventually(lambda: beating.done() or directory.heard, 5, "a beat")
    assert directory.heard and directory.heard[0].arena_id == "a"
    await heartbeat.leave(beating)
