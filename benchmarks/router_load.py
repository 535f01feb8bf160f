"""Requests, and tokens, through router processes that are kept busy. A part of `benchmarks.router`.

Constant nodes behind the routers, prompts of 2,000 characters, 32 requests in flight. The client, the node and the
routers share the machine's cores, so beside requests by the clock stands what one router's processor time is good for.
"""

from __future__ import annotations

import asyncio
import random
import string
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc

from batonpb import common_pb2, inference_pb2
from benchmarks.fake_node import fake_node
from benchmarks.router_process import RouterProcess, router, wait_for_nodes
from benchmarks.rows import Row
from loadtest.exchange import Target
from loadtest.grpc_client import GrpcClient
from loadtest.report import percentile

IN_FLIGHT = 32
NUM_PROMPTS = 1000
ALPHABET = string.ascii_letters + string.digits + " .,\n"


@dataclass(frozen=True)
class Load:
    """What is sent: `num_requests` for each repeat."""

    name: str
    characters: int
    output_tokens: int
    num_requests: int
    num_routers: int = 1
    roles: Sequence[str] = ("both",)


@dataclass(frozen=True)
class Measured:
    """One repeat."""

    wall_s: float
    cpu_s: float  # of all routers
    times_s: list[float]  # of each request
    first_s: list[float]  # to its first token


async def under_load(load: Load, redis_url: str, repeats: int) -> list[Row]:
    """The rows of one load."""
    cluster = f"load-{load.name.replace(' ', '-').replace(',', '')}"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(fake_node(redis_url, cluster, load.roles))
        routers = [await stack.enter_async_context(router(redis_url, cluster)) for _ in range(load.num_routers)]
        for process in routers:
            async with GrpcClient(Target(process.address, timeout_s=30.0)) as client:
                await wait_for_nodes(client, redis_url, cluster, len(load.roles))
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(process.address)) for process in routers]
        calls = [channel.unary_stream("/baton.v1.Inference/Generate") for channel in channels]
        bodies = _bodies(load)
        await _run(calls, routers, bodies, 10 * IN_FLIGHT)  # warm-up
        runs = [await _run(calls, routers, bodies, load.num_requests) for _ in range(repeats)]
    return _rows(load, runs)


async def at_rate(rate: float, redis_url: str, num_requests: int, repeats: int) -> list[Row]:
    """TTFT where requests come at a steady rate, in requests/s, both legs."""
    cluster, roles = "load-rate", ("prefill", "decode")
    load = Load("rate", 2000, 16, num_requests, roles=roles)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(fake_node(redis_url, cluster, roles))
        process = await stack.enter_async_context(router(redis_url, cluster))
        async with GrpcClient(Target(process.address, timeout_s=30.0)) as client:
            await wait_for_nodes(client, redis_url, cluster, len(roles))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(process.address))
        call, bodies = channel.unary_stream("/baton.v1.Inference/Generate"), _bodies(load)
        await _run([call], [process], bodies, 10 * IN_FLIGHT)
        runs = [await _paced(call, bodies, rate, num_requests) for _ in range(repeats)]
    name = f"TTFT at {rate:.0f} requests/s, two legs"
    return [
        Row(f"{name}, p{percent}", "ms", tuple(1e3 * percentile(times_s, percent) for times_s in runs))
        for percent in (50, 99)
    ]


def _bodies(load: Load) -> list[bytes]:
    generator = random.Random(0)
    sampling = common_pb2.SamplingParams(temperature=0.0, seed=0, max_tokens=load.output_tokens, ignore_eos=True)
    texts = ("".join(generator.choices(ALPHABET, k=load.characters)) for _ in range(NUM_PROMPTS))
    return [inference_pb2.GenerateRequest(text=text, sampling=sampling).SerializeToString() for text in texts]


async def _one(call: Callable[[bytes], grpc.aio.UnaryStreamCall], body: bytes) -> tuple[float, float]:
    """Seconds to the first message and to the last."""
    begin_s, first_s = time.perf_counter(), 0.0
    async for _ in call(body):
        first_s = first_s or time.perf_counter() - begin_s
    return first_s, time.perf_counter() - begin_s


async def _run(
    calls: Sequence[Callable[[bytes], grpc.aio.UnaryStreamCall]],
    routers: Sequence[RouterProcess],
    bodies: Sequence[bytes],
    num_requests: int,
) -> Measured:
    """`IN_FLIGHT` requests at a time, shared out among the routers."""
    left, times = iter(range(num_requests)), list[tuple[float, float]]()

    async def client(call: Callable[[bytes], grpc.aio.UnaryStreamCall]) -> None:
        for index in left:
            times.append(await _one(call, bodies[index % len(bodies)]))

    begin_s, begin_cpu_s = time.perf_counter(), sum(process.cpu_s() for process in routers)
    await asyncio.gather(*(client(calls[index % len(calls)]) for index in range(IN_FLIGHT)))
    cpu_s = sum(process.cpu_s() for process in routers) - begin_cpu_s
    return Measured(time.perf_counter() - begin_s, cpu_s, [last for _, last in times], [first for first, _ in times])


async def _paced(
    call: Callable[[bytes], grpc.aio.UnaryStreamCall], bodies: Sequence[bytes], rate: float, num_requests: int
) -> list[float]:
    begin_s = time.perf_counter()
    tasks = []
    for index in range(num_requests):
        await asyncio.sleep(max(0.0, begin_s + index / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(_one(call, bodies[index % len(bodies)])))
    return [first for first, _ in await asyncio.gather(*tasks)]


def _rows(load: Load, runs: Sequence[Measured]) -> list[Row]:
    counts = [len(run.times_s) for run in runs]
    if load.output_tokens > 1:
        counts = [count * load.output_tokens for count in counts]
    unit = "requests/s" if load.output_tokens == 1 else "tokens/s"
    by_cpu = f"{load.name}, for each second of a router's processor time"
    return [
        Row(load.name, unit, tuple(count / run.wall_s for count, run in zip(counts, runs, strict=True))),
        Row(by_cpu, unit, tuple(count / run.cpu_s for count, run in zip(counts, runs, strict=True))),
        Row(f"{load.name}: a request, p50", "ms", tuple(1e3 * percentile(run.times_s, 50) for run in runs)),
    ]
