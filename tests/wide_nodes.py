"""Wide nodes for the tests: each rank a process, beside a store and a Redis; a leader is called as any node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from conftest import ServerProcess, eventually
from node_harness import Decoded, finish, start

from batonpb import node_pb2, node_pb2_grpc
from engine.config import EngineConfig, ModelConfig, kv_layout
from kvstore.server import StoreConfig, StoreServer

ENGINE: dict[str, Any] = {"block_size": 16, "num_blocks": 64, "max_model_len": 512, "max_num_batched_tokens": 64}
ENGINE |= {"num_threads": 1, "dtype": "float32"}


@dataclass
class WideNode:
    """A node of one rank or more."""

    name: str
    ranks: list[ServerProcess] = field(default_factory=list)  # the leader first
    token: str = ""

    @property
    def metadata(self) -> list[tuple[str, str]] | None:
        return [("authorization", f"Bearer {self.token}")] if self.token else None

    def connect(self) -> None:
        self.channel = grpc.aio.insecure_channel(self.ranks[0].record["address"])
        self.prefill_stub = node_pb2_grpc.PrefillStub(self.channel)
        self.decode_stub = node_pb2_grpc.DecodeStub(self.channel)
        self.control = node_pb2_grpc.NodeControlStub(self.channel)

    async def prefill(self, request: node_pb2.NodeRequest) -> node_pb2.PrefillResponse:
        return await self.prefill_stub.Prefill(
            node_pb2.PrefillRequest(request=request), timeout=60, metadata=self.metadata
        )

    async def decode(
        self, request: node_pb2.NodeRequest, tokens: Sequence[int] = (), coming_blocks: int = 0
    ) -> Decoded:
        call = self.decode_stub.Decode(timeout=60, metadata=self.metadata)
        await call.write(node_pb2.DecodeRequest(admit=node_pb2.Admit(request=request)))
        assert (await call.read()).WhichOneof("message") == "admitted"
        await start(call, tokens, coming_blocks)
        return await finish(call)

    async def is_clean(self) -> bool:
        """Whether nothing of any request is left: the ranks that follow know of none, their leader has all pins."""
        load = await self.control.GetLoad(node_pb2.GetLoadRequest(), metadata=self.metadata)
        return load.free_blocks == load.total_blocks and load.num_running == load.num_waiting == 0


class WideCluster:
    """Stores whose slots hold pieces, each as on a machine of its own, and nodes of any width beside them."""

    def __init__(self, model_dir: Path, redis_url: str, folder: Path, layer_pieces: int, head_pieces: int) -> None:
        self.model_dir, self.redis_url, self.folder = model_dir, redis_url, folder
        self.engine = ENGINE | {"kv_layer_pieces": layer_pieces, "kv_head_pieces": head_pieces}
        self.layout = kv_layout(ModelConfig.from_pretrained(model_dir), EngineConfig(**self.engine))
        self.nodes: dict[str, WideNode] = {}
        self.stores: dict[str, StoreServer] = {}
        self.token = ""  # of nodes that are started from now on

    async def open_store(self, host: str) -> StoreServer:
        slots = {"slot_bytes": self.layout.block_bytes, "memory_bytes": 4096 * self.layout.block_bytes}
        config = StoreConfig(dir=str(self.folder / host), redis_url=self.redis_url, host=host, **slots)
        store = self.stores[host] = StoreServer(config)
        await store.start()
        return store

    def config(self, name: str, rank: int, tp: int, pp: int, **fields: Any) -> dict[str, Any]:
        shared = {"node_id": name, "model_dir": str(self.model_dir), "model": "tiny", "redis_url": self.redis_url}
        engine = self.engine | fields.pop("engine", {})
        sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "rank": rank, "engine": engine}
        host = fields.pop("host", "here")
        return shared | sizes | {"store_dir": str(self.folder / host), "host": host} | fields

    async def start_node(self, name: str, tp: int = 1, pp: int = 1, **fields: Any) -> WideNode:
        kinds = ["node"] + ["rank"] * (tp * pp - 1)
        secrets = {"BATON_CLUSTER_TOKEN": self.token}
        starts = [
            ServerProcess.start(kind, self.config(name, rank, tp, pp, **fields), extra=secrets)
            for rank, kind in enumerate(kinds)
        ]
        node = self.nodes[name] = WideNode(name, list(await asyncio.gather(*starts)), self.token)
        node.connect()
        return node

    async def prefill_and_publish(
        self, name: str, request: node_pb2.NodeRequest, num_blocks: int
    ) -> node_pb2.PrefillResponse:
        """The answer, once all ranks have brought their pieces of so many blocks, which are new to the store."""
        arena = self.stores["here"].arena
        wanted = len(arena.blocks()) + num_blocks * self.layout.num_pieces
        answer = await self.nodes[name].prefill(request)
        await eventually(lambda: len(arena.blocks()) >= wanted, what="all pieces are in the store")
        return answer

    async def close(self) -> None:
        for node in self.nodes.values():
            await node.channel.close()
        await asyncio.gather(*(rank.stop() for node in self.nodes.values() for rank in node.ranks))
        for store in self.stores.values():
            await store.stop()


@asynccontextmanager
async def running_cluster(
    model_dir: Path, redis_url: str, folder: Path, layer_pieces: int = 1, head_pieces: int = 1
) -> AsyncIterator[WideCluster]:
    """Its nodes must hold nothing any more, and its store's books must balance, when the test is over."""
    cluster = WideCluster(model_dir, redis_url, folder, layer_pieces, head_pieces)
    try:
        await cluster.open_store("here")
        yield cluster
        for node in cluster.nodes.values():
            if node.ranks[0].process.returncode is None:
                await eventually(node.is_clean, what=f"{node.name} gives all blocks back")
        for store in cluster.stores.values():
            store.arena.check_integrity()
    finally:
        await asyncio.shield(cluster.close())
