"""Real nodes for the node tests: each an engine of the tiny model, its services on a port, beside a real store."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from conftest import eventually

from batonpb import common_pb2, node_pb2, node_pb2_grpc
from deploy.node import NodeConfig, NodeServer
from engine.config import EngineConfig, ModelConfig, kv_layout
from engine.engine import Engine
from engine.request import SamplingParams
from engine.speed import SpeedMeter
from kvstore.directory import Directory, NodeRecord
from kvstore.server import StoreConfig, StoreServer

BLOCK_SIZE = 16
ENGINE = EngineConfig(block_size=BLOCK_SIZE, num_blocks=64, max_model_len=512, max_num_batched_tokens=64, num_threads=1)


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    """Tokens that look random and share no prefix between seeds."""
    return [(seed * 101 + index * 37 + index * index * 11) % 251 for index in range(num_tokens)]


def sampling(**fields: Any) -> common_pb2.SamplingParams:
    defaults = {"temperature": 0.0, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    return common_pb2.SamplingParams(**(defaults | fields))


def node_request(token_ids: Sequence[int], num_prompt_tokens: int = 0, **fields: Any) -> node_pb2.NodeRequest:
    message = node_pb2.NodeRequest(
        request_id="r", token_ids=token_ids, num_prompt_tokens=num_prompt_tokens or len(token_ids), sampling=sampling()
    )
    message.MergeFrom(node_pb2.NodeRequest(**fields))
    return message


def ids(tokens: Sequence[common_pb2.Token]) -> list[int]:
    return [token.token_id for token in tokens]


@dataclass
class Decoded:
    """All that a Decode call sent, and how it ended."""

    token_ids: list[int] = field(default_factory=list)
    messages: list[node_pb2.DecodeResponse] = field(default_factory=list)
    local_hit_tokens: int = 0
    store_hit_tokens: int = 0
    finished: node_pb2.Finished | None = None


class Node:
    """A running node and its stubs."""

    def __init__(self, server: NodeServer, record: NodeRecord) -> None:
        self.server = server
        self.record = record
        self.channel = grpc.aio.insecure_channel(record.address)
        self._prefill = node_pb2_grpc.PrefillStub(self.channel)
        self._decode = node_pb2_grpc.DecodeStub(self.channel)
        self.control = node_pb2_grpc.NodeControlStub(self.channel)

    async def prefill(self, request: node_pb2.NodeRequest, timeout: float = 60) -> node_pb2.PrefillResponse:
        """The answer, once all that it says is coming has come."""
        answer = await self.answer(request, timeout)
        await self.server.publisher.flush()
        return answer

    async def answer(self, request: node_pb2.NodeRequest, timeout: float = 60) -> node_pb2.PrefillResponse:
        """The answer as soon as it is there: its last blocks may be on their way."""
        return await self._prefill.Prefill(node_pb2.PrefillRequest(request=request), timeout=timeout)

    async def admit(self, request: node_pb2.NodeRequest, timeout: float = 60) -> grpc.aio.StreamStreamCall:
        """An open Decode call, behind its Admitted."""
        call = self._decode.Decode(timeout=timeout)
        await call.write(node_pb2.DecodeRequest(admit=node_pb2.Admit(request=request)))
        first = await call.read()
        assert first.WhichOneof("message") == "admitted"
        return call

    def open(self, timeout: float = 60) -> grpc.aio.StreamStreamCall:
        return self._decode.Decode(timeout=timeout)

    async def load(self) -> node_pb2.Load:
        token = self.server.config.cluster_token
        metadata = [("authorization", f"Bearer {token}")] if token else None
        return await self.control.GetLoad(node_pb2.GetLoadRequest(), metadata=metadata)

    async def is_clean(self) -> bool:
        """Whether nothing of any request is left in the engine."""
        load = await self.load()
        return load.free_blocks == load.total_blocks and load.num_running == load.num_waiting == 0

    async def close(self) -> None:
        await self.channel.close()
        await self.server.stop()


async def start(call: grpc.aio.StreamStreamCall, tokens: Sequence[int] = (), coming_blocks: int = 0) -> None:
    message = node_pb2.Start(
        tokens=[common_pb2.Token(token_id=token_id) for token_id in tokens], coming_blocks=coming_blocks
    )
    await call.write(node_pb2.DecodeRequest(start=message))


async def finish(call: grpc.aio.StreamStreamCall) -> Decoded:
    """Reads a started call to its end."""
    decoded = Decoded()
    await call.done_writing()  # no other leg follows in this call
    while (message := await call.read()) is not grpc.aio.EOF:
        decoded.messages.append(message)
        decoded.token_ids += ids(message.tokens.tokens)
        if message.HasField("tokens"):
            decoded.local_hit_tokens = message.tokens.local_hit_tokens
            decoded.store_hit_tokens = message.tokens.store_hit_tokens
            if reason := message.tokens.finish_reason:
                decoded.finished = node_pb2.Finished(finish_reason=reason)
        if message.HasField("finished"):
            decoded.finished = message.finished
    return decoded


async def decode(node: Node, request: node_pb2.NodeRequest, tokens: Sequence[int] = ()) -> Decoded:
    call = await node.admit(request)
    await start(call, tokens)
    return await finish(call)


async def journey(prefill: Node, decode: Node, request: node_pb2.NodeRequest) -> tuple[list[int], Decoded]:
    """Both legs, as a router would run them: all tokens, and what the decode leg sent."""
    call = await decode.admit(request)
    answer = await prefill.answer(request)
    await start(call, [answer.token.token_id], answer.coming_blocks)
    decoded = await finish(call)
    return [answer.token.token_id, *decoded.token_ids], decoded


class Machine:
    """One machine: its nodes, and a store when it is asked for. All are checked and stopped in the end."""

    def __init__(self, model_dir: Path, redis_url: str, store_dir: Path) -> None:
        self.model_dir = model_dir
        self.redis_url = redis_url
        self.store_dir = store_dir / "store"
        self.layout = kv_layout(ModelConfig.from_pretrained(model_dir), ENGINE)
        self.directory = Directory(redis_url)
        self.stores: list[StoreServer] = []
        self.nodes: list[Node] = []

    def store_config(self, **fields: Any) -> StoreConfig:
        defaults = {
            "slot_bytes": self.layout.block_bytes,
            "memory_bytes": 512 * self.layout.block_bytes,
            "host": "here",
        }
        return StoreConfig(dir=str(self.store_dir), redis_url=self.redis_url, **(defaults | fields))

    def node_config(self, **fields: Any) -> NodeConfig:
        defaults = {"node_id": f"node-{len(self.nodes)}", "heartbeat_s": 0.2, "ttl_s": 2.0, "drain_s": 20.0}
        engine = dataclasses.replace(ENGINE, **fields.pop("engine", {}))
        defaults |= {"model_dir": str(self.model_dir), "model": "tiny", "store_dir": str(self.store_dir)}
        return NodeConfig(redis_url=self.redis_url, engine=engine, host="here", **(defaults | fields))

    async def store(self, **fields: Any) -> StoreServer:
        store = StoreServer(self.store_config(**fields))
        await store.start()
        self.stores.append(store)
        return store

    async def node(self, is_measured: bool = False, **fields: Any) -> Node:
        """A node that does not know how fast it is, unless `is_measured`: what it fetches then depends on no clock."""
        server = NodeServer(self.node_config(**fields))
        node = Node(server, await server.start())
        if not is_measured:
            server.intake.prefill_tokens_per_s = 0.0
            server.loop.engine._speed = SpeedMeter(sys.maxsize)
        self.nodes.append(node)
        return node

    def expected(self, prompt: Sequence[int], params: common_pb2.SamplingParams | None = None) -> list[int]:
        """What one engine alone makes of a prompt."""
        message = params or sampling()
        given = {spec.name: value for spec, value in message.ListFields()}
        engine = Engine.from_pretrained(self.model_dir, ENGINE)
        return engine.generate([list(prompt)], SamplingParams(**given))[0]

    async def close(self) -> None:
        for node in self.nodes:
            await node.close()
        for store in self.stores:
            await store.stop()
        await self.directory.close()


@asynccontextmanager
async def running_machine(model_dir: Path, redis_url: str, store_dir: Path) -> AsyncIterator[Machine]:
    """A machine whose nodes must hold nothing any more when the test is over."""
    machine = Machine(model_dir, redis_url, store_dir)
    try:
        yield machine
        for node in machine.nodes:
            await eventually(node.is_clean, what=f"{node.record.node_id} gives all blocks back")
    finally:
        await asyncio.shield(machine.close())
