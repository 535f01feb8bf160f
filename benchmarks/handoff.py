"""What handing a prompt over costs: prefill with publishing on and off, and the gap between first and second token.

Repeat it with `python -m benchmarks.handoff` from the repository's root (`--quick` for a look). A random-weights model
in SmolLM-135M's shape, bfloat16; two prefill nodes that take turns on one core, one that publishes and one without a
store; a decode node on another core; a store. All are processes of their own on this machine. The client makes the
calls that a router makes: Admit, Prefill, Start, tokens; one request in flight, each prompt new.

Rows, for each length of prompt: "prefill" is the prefill node's own time from the first chunk to the token, "publishing
costs" the difference of one repeat's two, in percent of the one without. "TTFT" goes from Admit to the first token.
"gap" is from the first token to the second, "step" the median gap between later tokens, "gap less step" what the
hand-over adds. "last chunk's copy" is what copying its blocks into the decode node's engine takes at the speed measured
for this very request; its copy into the store comes on top. "late" tokens had to be computed by the decode node though
they fill blocks.

The aims: publishing costs under 3 %, and a gap under one step plus the last chunk's copy.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from batonpb import common_pb2, node_pb2, node_pb2_grpc
from benchmarks.engine_shapes import SHAPES
from benchmarks.rows import Row, print_rows
from benchmarks.server_process import server_process
from deploy.redis import EmbeddedRedis
from engine.config import EngineConfig, ModelConfig, kv_layout
from loadtest.exchange import Clock

LENGTHS = (1024, 4096, 16384)  # tokens
OUTPUT_TOKENS = 24
DTYPE = "bfloat16"
CHUNK_TOKENS = EngineConfig().max_num_batched_tokens


@dataclass(frozen=True)
class HandOff:
    """One prompt on its way through both legs, and the same length through a node that publishes nothing. Seconds."""

    prefill_s: float
    prefill_alone_s: float
    ttft_s: float
    gap_s: float
    step_s: float
    copy_s: float  # of the last chunk, into the decode node's engine
    late_tokens: int


@dataclass(frozen=True)
class Legs:
    """What the calls of both legs gave. `times_s` has an entry for each token, since the first call."""

    compute_s: float  # of the first leg
    times_s: Sequence[float]
    store_hit_tokens: int  # that the decode node had from the store

    @property
    def step_s(self) -> float:
        """The median gap behind the second token."""
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(self.times_s[1:]))


async def both_legs(
    prefill: node_pb2_grpc.PrefillStub, decode: node_pb2_grpc.DecodeStub, request: node_pb2.NodeRequest
) -> Legs:
    """What a router does."""
    clock = Clock()
    call = decode.Decode()
    await call.write(node_pb2.DecodeRequest(admit=node_pb2.Admit(request=request)))
    await call.read()
    answer = await prefill.Prefill(node_pb2.PrefillRequest(request=request))
    times_s = [clock()]
    start = node_pb2.Start(tokens=[answer.token], coming_blocks=answer.coming_blocks)
    await call.write(node_pb2.DecodeRequest(start=start))
    await call.done_writing()
    store_hit_tokens = 0
    while (response := await call.read()) is not grpc.aio.EOF:
        times_s += [clock()] * len(response.tokens.tokens)
        store_hit_tokens = max(store_hit_tokens, response.tokens.store_hit_tokens)
    if len(times_s) != OUTPUT_TOKENS:
        raise RuntimeError(f"{len(times_s)} of {OUTPUT_TOKENS} tokens came")
    return Legs(answer.compute_s, times_s, store_hit_tokens)


class Cluster:
    """The nodes' stubs."""

    def __init__(self, publishing: grpc.aio.Channel, alone: grpc.aio.Channel, decode: grpc.aio.Channel) -> None:
        self._prefill = node_pb2_grpc.PrefillStub(publishing)  # type: ignore[no-untyped-call]
        self._alone = node_pb2_grpc.PrefillStub(alone)  # type: ignore[no-untyped-call]
        self._decode = node_pb2_grpc.DecodeStub(decode)  # type: ignore[no-untyped-call]
        self._control = node_pb2_grpc.NodeControlStub(decode)  # type: ignore[no-untyped-call]

    async def hand_off(self, prompts: Sequence[Sequence[int]], alone_first: bool) -> HandOff:
        """The first prompt goes through both legs, the second to the node that publishes nothing."""
        request, other = [node_request(prompt) for prompt in prompts]
        alone_s = await self._compute_s(other) if alone_first else 0.0
        before = (await self._load()).fetches.local
        legs = await both_legs(self._prefill, self._decode, request)
        after = (await self._load()).fetches.local
        num_blocks = after.num_blocks - before.num_blocks
        if not num_blocks:
            raise RuntimeError("the decode node fetched nothing from the store")
        block_tokens = legs.store_hit_tokens // num_blocks
        return HandOff(
            prefill_s=legs.compute_s,
            prefill_alone_s=alone_s or await self._compute_s(other),
            ttft_s=legs.times_s[0],
            gap_s=legs.times_s[1] - legs.times_s[0],
            step_s=legs.step_s,
            copy_s=(after.seconds - before.seconds) / num_blocks * (last_chunk(len(prompts[0])) // block_tokens),
            late_tokens=len(prompts[0]) // block_tokens * block_tokens - legs.store_hit_tokens,
        )

    async def _compute_s(self, request: node_pb2.NodeRequest) -> float:
        answer = await self._alone.Prefill(node_pb2.PrefillRequest(request=request))
        if answer.coming_blocks:
            raise RuntimeError("the node without a store publishes")
        return float(answer.compute_s)

    async def _load(self) -> node_pb2.Load:
        load: node_pb2.Load = await self._control.GetLoad(node_pb2.GetLoadRequest())
        return load


def last_chunk(num_tokens: int) -> int:
    """Tokens of a prompt's last chunk."""
    return (num_tokens - 1) % CHUNK_TOKENS + 1


def node_request(prompt: Sequence[int]) -> node_pb2.NodeRequest:
    """What a router asks of both nodes."""
    sampling = common_pb2.SamplingParams(temperature=0.0, seed=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    return node_pb2.NodeRequest(
        request_id="handoff", token_ids=prompt, num_prompt_tokens=len(prompt), sampling=sampling
    )


async def measure(folder: Path, model: Path, redis_url: str, lengths: Sequence[int], repeats: int) -> list[Row]:
    """The rows of all lengths. Repeats go round all of them, so that a slow moment of the machine hits one of each."""
    generator = random.Random(0)
    vocab_size = ModelConfig.from_pretrained(model).vocab_size

    def prompts(length: int) -> list[list[int]]:
        return [generator.choices(range(vocab_size), k=length) for _ in range(2)]

    runs: list[list[HandOff]] = [[] for _ in lengths]
    async with _cluster(folder, model, redis_url, max(lengths)) as cluster:
        await cluster.hand_off(prompts(min(lengths)), alone_first=True)  # warm-up
        for repeat in range(repeats):
            for length, run in zip(lengths, runs, strict=True):
                run.append(await cluster.hand_off(prompts(length), alone_first=repeat % 2 == 0))
                print(f"{length} tokens: {run[-1]}", file=sys.stderr)
    return [row for length, run in zip(lengths, runs, strict=True) for row in rows_of(length, run)]


def rows_of(length: int, run: Sequence[HandOff]) -> list[Row]:
    """The figures of one length, one value for each repeat."""

    def row(name: str, unit: str, values: Sequence[float]) -> Row:
        return Row(f"{length} tokens: {name}", unit, tuple(values))

    return [
        row("prefill, publishing", "s", [one.prefill_s for one in run]),
        row("prefill, not publishing", "s", [one.prefill_alone_s for one in run]),
        row("publishing costs", "%", [100 * (one.prefill_s / one.prefill_alone_s - 1) for one in run]),
        row("TTFT", "s", [one.ttft_s for one in run]),
        row("gap", "ms", [1e3 * one.gap_s for one in run]),
        row("step", "ms", [1e3 * one.step_s for one in run]),
        row("gap less step", "ms", [1e3 * (one.gap_s - one.step_s) for one in run]),
        row("last chunk's copy", "ms", [1e3 * one.copy_s for one in run]),
        row("late", "tok", [one.late_tokens for one in run]),
    ]


@asynccontextmanager
async def _cluster(folder: Path, model: Path, redis_url: str, max_tokens: int) -> AsyncIterator[Cluster]:
    layout = kv_layout(ModelConfig.from_pretrained(model), EngineConfig(dtype=DTYPE))
    num_blocks = (max_tokens + OUTPUT_TOKENS) // layout.block_size + 16
    common: dict[str, Any] = {"redis_url": redis_url, "host": "here"}
    node: dict[str, Any] = common | {
        "model_dir": str(model),
        "model": "handoff",
        "engine": {"dtype": DTYPE, "num_blocks": num_blocks, "num_threads": 1},
        "num_core_shares": 2,
    }
    store_dir = str(folder / "store")
    store = {"dir": store_dir, "slot_bytes": layout.block_bytes, "memory_bytes": 2 * num_blocks * layout.block_bytes}
    async with AsyncExitStack() as stack:

        async def start(kind: str, config: dict[str, Any]) -> grpc.aio.Channel:
            record = await stack.enter_async_context(server_process(kind, config))
            return await stack.enter_async_context(grpc.aio.insecure_channel(record["address"]))

        await start("store", common | store)
        nodes = [
            await start("node", node | {"node_id": "publishing", "role": "prefill", "store_dir": store_dir}),
            await start("node", node | {"node_id": "alone", "role": "prefill"}),
            await start(
                "node", node | {"node_id": "decode", "role": "decode", "core_share": 1, "store_dir": store_dir}
            ),
        ]
        yield Cluster(*nodes)


def write_model(folder: Path, max_tokens: int) -> Path:
    """A model in SmolLM-135M's shape that takes prompts of `max_tokens`."""
    SHAPES["135m"].write(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": max_tokens + OUTPUT_TOKENS + 1}))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two shorter prompts, once, instead of all 5 times")
    parser.add_argument("--peer", choices=["none"], default="none", help="what to measure beside Baton")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead of the random-weights model")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"of the prompts, in tokens; default {LENGTHS}")
    args = parser.parse_args()
    lengths = args.lengths or (LENGTHS[:2] if args.quick else LENGTHS)
    # Short, for a unix socket lives in it; in shared memory, for the arena does.
    with tempfile.TemporaryDirectory(prefix="baton-", dir="/dev/shm") as name, tempfile.TemporaryDirectory() as disk:
        model = args.model or write_model(Path(disk) / "model", max(lengths))
        server = EmbeddedRedis(Path(name))
        server.start()
        try:
            rows = asyncio.run(measure(Path(name), model, server.url, lengths, 1 if args.quick else 5))
        finally:
            server.stop()
    print_rows("handoff", rows)


if __name__ == "__main__":
    main()
