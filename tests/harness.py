"""A cluster of real processes without Ray, for the tests that kill, stop and restart its parts.

One Redis, one store, nodes and a router, each `python -m deploy.process KIND JSON`, and a client over gRPC.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from conftest import ServerProcess, eventually

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc, node_pb2, node_pb2_grpc

GREEDY: dict[str, Any] = {"temperature": 0.0}


@dataclass
class Answer:
    """What a client saw of one request."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[common_pb2.Token] = field(default_factory=list)
    finish_reason: int = 0
    usage: inference_pb2.Usage | None = None
    timeline: inference_pb2.Timeline | None = None


OnMessage = Callable[[Answer], Awaitable[None] | None]


class ProcessCluster:
    """Starts with `start`; nodes are named `prefill-0`, `decode-1`, `both-0`. Always `stop` it."""

    def __init__(self, model: Path, redis_url: str, folder: Path, **engine_options: Any) -> None:
        self.model = model
        self.redis_url = redis_url
        self.folder = folder
        self.engine_options = {"dtype": "float32", "num_blocks": 512, "num_threads": 1} | engine_options
        self.router_options: dict[str, Any] = {}
        self.processes: dict[str, ServerProcess] = {}
        self.baseline: dict[str, int] = {}

    async def start(self, prefill: int = 1, decode: int = 1, both: int = 0, stores: int = 1) -> None:
        for index in range(stores):
            await self.start_store(index)
        roles = [("prefill", n) for n in range(prefill)] + [("decode", n) for n in range(decode)]
        roles += [("both", n) for n in range(both)]
        await asyncio.gather(self.start_router(), *(self.start_node(f"{role}-{n}", role) for role, n in roles))
        await self.wait_for_nodes(len(roles))

    async def launch(self, name: str, kind: str, config: dict[str, Any]) -> None:
        self.processes[name] = await ServerProcess.start(kind, config)

    async def start_store(self, index: int = 0) -> None:
        config = {
            "dir": str(self.folder / f"store-{index}"),
            "redis_url": self.redis_url,
            "cluster": "test",
            "slot_bytes": block_bytes(self.model, self.engine_options),
            "memory_bytes": 64 << 20,
            "host": f"host-{index}",
        }
        await self.launch(f"store-{index}", "store", config)

    async def start_node(
        self, name: str, role: str, store: int | None = 0, tp: int = 1, pp: int = 1, **fields: Any
    ) -> None:
        """A node; a wide one's ranks that follow are processes of their own, `decode-1.1` and so on."""
        config = {
            "node_id": name,
            "role": role,
            "model_dir": str(self.model),
            "model": "pocket",
            "engine": self.engine_options,
            "redis_url": self.redis_url,
            "cluster": "test",
            "store_dir": "" if store is None else str(self.folder / f"store-{store}"),
            "host": f"host-{store}",
            "tensor_parallel_size": tp,
            "pipeline_parallel_size": pp,
        } | fields
        ranks = {f"{name}.{rank}" if rank else name: config | {"rank": rank} for rank in range(tp * pp)}
        await asyncio.gather(
            *(self.launch(rank, "rank" if "." in rank else "node", options) for rank, options in ranks.items())
        )
        self.baseline[name] = self.processes[name].record["total_blocks"]

    async def start_router(self) -> None:
        config = {"model_dir": str(self.model), "redis_url": self.redis_url, "cluster": "test"} | self.router_options
        await self.launch("router", "router", config)
        self.address = self.processes["router"].record["address"]
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)

    async def wait_for_nodes(self, count: int, timeout_s: float = 20.0) -> None:
        """Until the registry holds `count` living nodes, and the router has had time to see them."""
        from kvstore.directory import Directory

        directory = Directory(self.redis_url, "test")

        async def there() -> bool:
            return len(await directory.nodes()) == count

        await eventually(there, timeout_s, f"{count} nodes")
        await directory.close()
        await asyncio.sleep(0.6)

    def kill(self, name: str) -> None:
        """kill -9"""
        self.processes[name].kill()

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.processes[name].pid, number)

    async def generate(
        self,
        prompt: str | list[int] | list[tuple[str, str]],
        on_message: OnMessage | None = None,
        timeout: float | None = 120.0,
        **sampling: Any,
    ) -> Answer:
        """Text, token ids or (role, content) turns in; the whole answer out. `on_message` sees it grow."""
        request = inference_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(**(GREEDY | sampling)))
        if isinstance(prompt, str):
            request.text = prompt
        elif prompt and isinstance(prompt[0], tuple):
            request.chat.messages.extend(inference_pb2.ChatMessage(role=r, content=c) for r, c in prompt)
        else:
            request.tokens.token_ids.extend(prompt)
        answer = Answer()
        async for message in self.stub.Generate(request, timeout=timeout):
            answer.text += message.text
            answer.tokens.extend(message.tokens)
            answer.token_ids.extend(token.token_id for token in message.tokens)
            if message.finish_reason:
                answer.finish_reason = message.finish_reason
                answer.usage, answer.timeline = message.usage, message.timeline
            if on_message is not None:
                result = on_message(answer)
                if result is not None:
                    await result
        return answer

    async def load(self, name: str) -> node_pb2.Load:
        async with grpc.aio.insecure_channel(self.processes[name].record["address"]) as channel:
            return await node_pb2_grpc.NodeControlStub(channel).GetLoad(node_pb2.GetLoadRequest())

    async def assert_quiet(self) -> None:
        """On every living node nothing runs and all blocks are free: nothing leaked."""

        async def quiet() -> bool:
            for name in self.baseline:
                if self.processes[name].process.returncode is None:
                    load = await self.load(name)
                    if load.num_running or load.num_waiting or load.free_blocks != load.total_blocks:
                        return False
            return True

        await eventually(quiet, 15, "blocks back at the baseline")

    async def stop(self) -> None:
        if hasattr(self, "channel"):
            await self.channel.close()
        for name in list(self.processes):
            self.processes[name].process.returncode is None and self.signal(name, signal.SIGCONT)
        order = sorted(self.processes, key=lambda name: (name.startswith("store"), name != "router"))
        await asyncio.gather(*(self.processes[name].stop() for name in order if not name.startswith("store")))
        await asyncio.gather(*(self.processes[name].stop() for name in order if name.startswith("store")))


def block_bytes(model: Path, engine_options: dict[str, Any]) -> int:
    from engine.config import EngineConfig, ModelConfig, kv_layout

    fields = ("dtype", "block_size", "kv_layer_pieces", "kv_head_pieces")
    options = EngineConfig(**{name: engine_options[name] for name in fields if name in engine_options})
    return kv_layout(ModelConfig.from_pretrained(model), options).block_bytes


def reference(model: Path, prompts: list[list[int]], max_tokens: int, **params: Any) -> list[list[int]]:
    """What one engine alone puts out, in fp32."""
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.request import SamplingParams

    engine = Engine.from_pretrained(model, EngineConfig(dtype="float32", num_blocks=512, num_threads=1))
    return engine.generate(prompts, SamplingParams(**({"temperature": 0.0} | params), max_tokens=max_tokens))
