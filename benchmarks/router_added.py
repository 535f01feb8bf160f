"""What the router itself adds to a request: the time through a real router less the time of the same calls without it.

A part of `benchmarks.router`. One request in
flight, text prompts of 2000 characters, each new; behind the router a node without an engine that answers at once
(`benchmarks/fake_node.py`). Without the router, the client makes the node calls itself: Admit, Prefill, Start, tokens.
So the difference is tokenising, hashing, the look-up in Redis, the plan, one more hop, and text out of tokens.

Rows: "two legs" has a prefill and a decode node, "one leg" a node that does both; "routed" is the time through the
router, "direct" without it, "added" the difference of one repeat's two medians or 99th percentiles. In each repeat both
ways take turns, block by block, so that a slow moment of the machine hits both.
"""

from __future__ import annotations

import random
import string
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc

from batonpb import common_pb2, inference_pb2, node_pb2, node_pb2_grpc
from benchmarks.fake_node import fake_node
from benchmarks.router_process import router, wait_for_nodes
from benchmarks.rows import Row
from loadtest.exchange import Clock, Shot, Target, exchange
from loadtest.grpc_client import GrpcClient
from loadtest.report import percentile

PROMPT_CHARACTERS = 2000
OUTPUT_TOKENS = 16
BLOCK = 25  # requests of one way before it is the other's turn
LAYOUTS = {"two legs": ("prefill", "decode"), "one leg": ("both",)}


@dataclass(frozen=True)
class Times:
    """Of one request, seconds."""

    ttft_s: float
    e2e_s: float


Way = Callable[[], Awaitable[Times]]


def _sampling() -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(temperature=0.0, seed=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


def through_router(client: GrpcClient, generator: random.Random, legs: int) -> Way:
    """One request as a user makes it; checks that it came back whole and took the `legs` that the direct way takes."""
    alphabet = string.ascii_letters + string.digits + " .,\n"

    async def way() -> Times:
        text = "".join(generator.choices(alphabet, k=PROMPT_CHARACTERS))
        shot = Shot(0, 0.0, inference_pb2.GenerateRequest(text=text, sampling=_sampling()))
        record, _ = await exchange(client, shot, Clock())
        if record.error or record.output_tokens != OUTPUT_TOKENS:
            raise RuntimeError(f"the router's answer is not whole: {record}")
        if 1 + bool(record.prefill_node) != legs:
            raise RuntimeError(f"the router took another way than the one it is compared with: {record}")
        return Times(record.ttft_s, record.e2e_s)

    return way


def direct(channel: grpc.aio.Channel, generator: random.Random, legs: int) -> Way:
    """The calls that a router makes for one request, made by the client itself, in the same order."""
    prefill = node_pb2_grpc.PrefillStub(channel)  # type: ignore[no-untyped-call]
    decode = node_pb2_grpc.DecodeStub(channel)  # type: ignore[no-untyped-call]

    async def way() -> Times:
        tokens = generator.choices(range(256), k=PROMPT_CHARACTERS)
        request = node_pb2.NodeRequest(
            request_id="direct", token_ids=tokens, num_prompt_tokens=len(tokens), sampling=_sampling()
        )
        times_s: list[float] = []
        clock = Clock()
        call = decode.Decode()
        await call.write(node_pb2.DecodeRequest(admit=node_pb2.Admit(request=request)))
        await call.read()
        start = node_pb2.Start()
        if legs == 2:
            answer = await prefill.Prefill(node_pb2.PrefillRequest(request=request))
            start.tokens.append(answer.token)
            times_s.append(clock())
        await call.write(node_pb2.DecodeRequest(start=start))
        await call.done_writing()
        while (response := await call.read()) is not grpc.aio.EOF:
            if response.WhichOneof("message") == "tokens":
                times_s.append(clock())
        e2e_s = clock()
        if len(times_s) != OUTPUT_TOKENS:
            raise RuntimeError(f"{len(times_s)} of {OUTPUT_TOKENS} tokens came")
        return Times(times_s[0], e2e_s)

    return way


async def _repeat(ways: Sequence[Way], num_requests: int) -> list[list[Times]]:
    """The times of each way, `num_requests` of each, in turns of `BLOCK`."""
    times: list[list[Times]] = [[] for _ in ways]
    while len(times[-1]) < num_requests:
        for way, way_times in zip(ways, times, strict=True):
            way_times += [await way() for _ in range(BLOCK)]
    return times


async def added(layout: str, redis_url: str, num_requests: int, repeats: int) -> list[Row]:
    """The rows of one of `LAYOUTS`."""
    roles = LAYOUTS[layout]
    cluster = f"bench-{len(roles)}"
    async with AsyncExitStack() as stack:
        node_address = await stack.enter_async_context(fake_node(redis_url, cluster, roles))
        process = await stack.enter_async_context(router(redis_url, cluster))
        client = await stack.enter_async_context(GrpcClient(Target(process.address, timeout_s=30.0)))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(node_address))
        await wait_for_nodes(client, redis_url, cluster, len(roles))
        generator = random.Random(0)
        ways = [direct(channel, generator, len(roles)), through_router(client, generator, len(roles))]
        await _repeat(ways, 2 * BLOCK)  # warm-up
        runs = [await _repeat(ways, num_requests) for _ in range(repeats)]
    return _rows(layout, runs)


def _rows(layout: str, runs: Sequence[list[list[Times]]]) -> list[Row]:
    """`runs[repeat][way]` has the times of one way, the direct one first."""
    picks: dict[str, Callable[[Times], float]] = {"TTFT": lambda times: times.ttft_s, "E2E": lambda times: times.e2e_s}
    rows = []
    for name, pick in picks.items():
        for percent in (50, 99):
            pairs = [[1e3 * percentile([pick(t) for t in times], percent) for times in run] for run in runs]
            what = f"{layout}: {name} p{percent}"
            rows += [
                Row(f"{what}, added", "ms", tuple(routed - alone for alone, routed in pairs)),
                Row(f"{what}, routed", "ms", tuple(routed for _, routed in pairs)),
                Row(f"{what}, direct", "ms", tuple(alone for alone, _ in pairs)),
            ]
    return rows
