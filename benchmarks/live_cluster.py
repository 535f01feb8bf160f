"""A small live cluster for benchmarks: Redis, one store, a prefill node, a decode node and a router, each a process.

And a trace that is sent to it, with what came back: the client's times, and the router's own of the same request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc
from benchmarks.server_process import server_process
from deploy.redis import EmbeddedRedis
from engine.config import EngineConfig, ModelConfig, kv_layout
from kvstore.directory import Directory
from loadtest.arrival import Arrivals
from loadtest.exchange import Clock
from loadtest.prompts import Prompt
from loadtest.runner import drive

ANSWER_LIMIT_S = 120.0
CLUSTER = "sim-live"


@dataclass(frozen=True)
class Ask:
    """What to send, and when, in seconds since the start."""

    prompt: Prompt
    output_tokens: int
    at_s: float = 0.0


@dataclass(frozen=True)
class Served:
    """One request that came back whole. `times_s` has an entry for each token, on the clock of the run."""

    sent_s: float
    times_s: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    timeline: inference_pb2.Timeline

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.times_s[-1] - self.times_s[0]) / max(1, len(self.times_s) - 1)

    @property
    def prefill_s(self) -> float:
        """What the router waited for the first leg."""
        return float(self.timeline.first_token_s - self.timeline.prefill_start_s)


@dataclass(frozen=True)
class LiveCluster:
    """The router's stub, and what the simulator is to know of the nodes."""

    stub: inference_pb2_grpc.InferenceStub
    max_model_len: int
    vocab_size: int
    block_bytes: int
    num_blocks: int  # of each engine
    num_slots: int  # of the store

    async def send(self, ask: Ask, clock: Clock, began: asyncio.Event | None = None) -> Served:
        """One request; `began` is set with its first token. Raises `RuntimeError` for an answer that is not whole."""
        sampling = common_pb2.SamplingParams(temperature=0.0, seed=0, max_tokens=ask.output_tokens, ignore_eos=True)
        request = inference_pb2.GenerateRequest(sampling=sampling)
        request.tokens.token_ids.extend(ask.prompt)
        times_s: list[float] = []
        last, sent_s = inference_pb2.GenerateResponse(), clock()
        async for last in self.stub.Generate(request, timeout=ANSWER_LIMIT_S):
            times_s += [clock()] * len(last.tokens)
            if began is not None and times_s:
                began.set()
        if len(times_s) != ask.output_tokens:
            raise RuntimeError(f"{len(times_s)} of {ask.output_tokens} tokens came")
        return Served(sent_s, tuple(times_s), last.usage.prompt_tokens, last.usage.cached_tokens, last.timeline)

    async def replay(self, asks: Sequence[Ask]) -> list[Served]:
        """Each when it is due; the answers in the order of sending."""
        found: dict[int, Served] = {}
        times_s, clock = [ask.at_s for ask in asks], Clock()

        async def play(index: int, _ready_s: float) -> None:
            found[index] = await self.send(asks[index], clock)

        await drive(Arrivals(times_s), play, clock, times_s)
        return [found[index] for index in range(len(asks))]

    async def one_by_one(self, asks: Sequence[Ask], seconds: float, load: float = 1.0) -> list[Served]:
        """Each when the one before it has its first token, so none waits for a prompt; no new ones after `seconds`.

        All decode beside each other, as they do under load; pauses leave the prefill node busy for `load` of the time.
        """
        clock = Clock()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for ask in asks:
                if clock() >= seconds:
                    break
                began, begin_s = asyncio.Event(), clock()
                tasks.append(group.create_task(self.send(ask, clock, began)))
                waiting = asyncio.create_task(began.wait())
                await asyncio.wait((tasks[-1], waiting), return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                await asyncio.sleep((clock() - begin_s) * (1.0 / load - 1.0))
        return [task.result() for task in tasks]


@asynccontextmanager
async def live_cluster(folder: Path, model: Path, num_blocks: int, memory_bytes: int) -> AsyncIterator[LiveCluster]:
    """`folder` is to be short and in shared memory: the store lives in it. Engines compute on a core each."""
    server = EmbeddedRedis(folder)
    server.start()
    config = ModelConfig.from_pretrained(model)
    layout = kv_layout(config, EngineConfig())
    common: dict[str, Any] = {"redis_url": server.url, "cluster": CLUSTER}
    store = {"dir": str(folder / "store"), "slot_bytes": layout.block_bytes, "memory_bytes": memory_bytes}
    engine = {"num_blocks": num_blocks, "num_threads": 1}
    node = {"model_dir": str(model), "model": "live", "engine": engine, "num_core_shares": 2, "store_dir": store["dir"]}
    try:
        async with AsyncExitStack() as stack:

            async def start(kind: str, config: dict[str, Any]) -> dict[str, Any]:
                return await stack.enter_async_context(server_process(kind, common | config))

            await start("store", store | {"host": "here"})
            for share, role in enumerate(("prefill", "decode")):
                await start("node", node | {"node_id": role, "role": role, "core_share": share, "host": "here"})
            router = await start("router", {"model_dir": str(model), "http": False})
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(router["address"]))
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            await _until_there(server.url)
            yield LiveCluster(
                stub,
                config.max_position_embeddings,
                config.vocab_size,
                layout.block_bytes,
                num_blocks,
                memory_bytes // layout.block_bytes,
            )
    finally:
        server.stop()


async def _until_there(redis_url: str) -> None:
    directory = Directory(redis_url, CLUSTER)
    while len(await directory.nodes()) < 2:
        await asyncio.sleep(0.05)
    await directory.close()
    await asyncio.sleep(1.0)  # for the router to have seen them
