"""Handing a prompt over between two hosts, against the speed of the link between them.

Repeat it as root with `python -m benchmarks.hosts` from the repository's root (`--quick` for a look). The hosts are
network namespaces of this machine (`benchmarks/lan.py`), their links limited by `tc tbf`; random weights in
SmolLM-135M's shape, whose KV is 23 kB a token in bfloat16 and 46 in float32. Plain TCP, and CURVE with a wire key.

Rows "transfer": all blocks of a prompt lie in the other host's arena, and a client fetches them into memory of its own,
from its question to the directory on. The floor is their bytes over the link's rate, less the burst that tbf lets
through at once; headers are not taken off (they are 4.4 % of an Ethernet frame of 1,514 bytes).

Rows of a live hand-off, as in benchmarks/handoff.py: a prefill node on one host, a decode node on the other, each on a
core of its own; one request in flight, each prompt new. Blocks travel as they are published, so the link has most of
them by the first token. "gap" is from the first token to the second. Its floor is what the last chunk's bytes take,
published when the first token came, and one decode step; it holds where the link keeps up with prefill, so it is left
out where the decode node computed tokens again ("late"). "last" is from the last chunk's publication, which is the
first token, to the second one without its decode step: what the link is to blame for.

The aim: at most 1.25 times the floor at 1 Gbit/s.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from batonpb import node_pb2, node_pb2_grpc
from benchmarks.handoff import OUTPUT_TOKENS, both_legs, last_chunk, node_request, write_model
from benchmarks.lan import Lan, floor_s, reason_to_skip
from benchmarks.rows import Peer, Row, print_beside
from benchmarks.server_process import server_process
from benchmarks.worker_process import WorkerProcess
from deploy.process import SECRETS
from deploy.redis import EmbeddedRedis
from engine.config import EngineConfig, ModelConfig, kv_layout
from kvstore.curve import new_wire_key

LENGTHS = (1024, 4096)  # tokens
RATES = {"100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "unlimited": 0.0}
WIRES = ("tcp", "curve")
DTYPES = ("bfloat16", "float32")
REPEATS = 5
QUICK_RATES = ("1 Gbit/s",)
QUICK_REPEATS = 1


@dataclass(frozen=True)
class Setting:
    """One wire, one dtype."""

    wire: str
    dtype: str
    block_bytes: int
    block_tokens: int

    @property
    def environment(self) -> dict[str, str]:
        return {SECRETS["wire_key"]: self.wire_key}

    @property
    def wire_key(self) -> str:
        return _WIRE_KEY if self.wire == "curve" else ""

    def num_bytes(self, num_tokens: int) -> int:
        return num_tokens // self.block_tokens * self.block_bytes


_WIRE_KEY = new_wire_key()


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    lengths: Sequence[int]
    rates: Sequence[str]
    wires: Sequence[str]
    dtypes: Sequence[str]
    repeats: int
    is_live: bool


@dataclass(frozen=True)
class HandOff:
    """One prompt through both legs. Seconds."""

    ttft_s: float
    gap_s: float
    step_s: float
    late_tokens: int
    received_bytes: int  # of KV, over the wire


@dataclass(frozen=True)
class Figure:
    """A row and its floor, one value for each repeat; no floor where there is none."""

    row: Row
    floor: tuple[float, ...] = ()


class Bench:
    """Two hosts, a Redis for both, and a model."""

    def __init__(self, lan: Lan, redis_url: str, model: Path, folder: Path) -> None:
        self._lan = lan
        self._redis_url = redis_url
        self._model = model
        self._folder = folder
        self._clusters = itertools.count()
        self._generator = random.Random(0)

    def setting(self, wire: str, dtype: str) -> Setting:
        layout = kv_layout(ModelConfig.from_pretrained(self._model), EngineConfig(dtype=dtype))
        return Setting(wire, dtype, layout.block_bytes, layout.block_size)

    def limit(self, rate: str) -> None:
        for host in self._lan.hosts:
            host.limit(RATES[rate])

    async def transfers(self, setting: Setting, plan: Plan) -> list[Figure]:
        """The pure transfer at all rates."""
        figures = []
        num_blocks = max(plan.lengths) // setting.block_tokens
        writer_host, reader_host = self._lan.hosts
        async with AsyncExitStack() as stack:
            cluster, config = self._store(setting, 0, num_blocks)
            await stack.enter_async_context(server_process("store", config, writer_host.command(), setting.environment))
            worker = {"redis_url": self._redis_url, "slot_bytes": setting.block_bytes, "max_blocks": num_blocks}
            worker |= {"cluster": cluster}
            with _worker(writer_host.command(), worker | {"store_dir": config["dir"]}, setting) as writer:
                _ask(writer, "publish", num_blocks)
            for rate in plan.rates:
                self.limit(rate)
                with _worker(reader_host.command(), worker | {"store_dir": ""}, setting) as reader:
                    _ask(reader, "fetch", 1)  # the connection
                    for length in plan.lengths:
                        took_s = [_ask(reader, "fetch", length // setting.block_tokens) for _ in range(plan.repeats)]
                        floor = floor_s(setting.num_bytes(length), RATES[rate])
                        row = Row(_name(setting, length, rate, "transfer"), "s", tuple(took_s))
                        figures.append(Figure(row, (floor,) if floor else ()))
                        print(f"{row.name}: {took_s}, at least {floor:.4f}", file=sys.stderr)
        return figures

    async def hand_offs(self, setting: Setting, rate: str, plan: Plan) -> list[Figure]:
        """Live ones, on a cluster of their own: what its nodes know of the link, they know of this one."""
        self.limit(rate)
        runs: list[list[HandOff]] = [[] for _ in plan.lengths]
        async with self._nodes(setting, max(plan.lengths)) as nodes:
            await nodes.hand_off(self._prompt(min(plan.lengths)))  # warm-up
            for _ in range(plan.repeats):
                for length, run in zip(plan.lengths, runs, strict=True):
                    run.append(await nodes.hand_off(self._prompt(length)))
                    print(f"{_name(setting, length, rate, 'live')}: {run[-1]}", file=sys.stderr)
        return [
            figure
            for length, run in zip(plan.lengths, runs, strict=True)
            for figure in live_figures(setting, length, rate, run)
        ]

    def _prompt(self, length: int) -> list[int]:
        vocab_size = ModelConfig.from_pretrained(self._model).vocab_size
        return self._generator.choices(range(vocab_size), k=length)

    def _store(self, setting: Setting, host: int, num_blocks: int) -> tuple[str, dict[str, Any]]:
        """The name of a new cluster, and the config of a store of it."""
        cluster = f"hosts-{next(self._clusters)}"
        address = self._lan.hosts[host].address
        return cluster, {
            "dir": str(self._folder / f"{cluster}-{host}"),
            "redis_url": self._redis_url,
            "cluster": cluster,
            "slot_bytes": setting.block_bytes,
            "memory_bytes": (num_blocks + 8) * setting.block_bytes,
            "advertise_host": address,
            "host": f"host-{host}",
            "trusts_network": True,
        }

    @asynccontextmanager
    async def _nodes(self, setting: Setting, max_tokens: int) -> AsyncIterator[Nodes]:
        """A prefill node and a store on the one host; on the other a decode node alone, so that all is fetched."""
        num_blocks = (max_tokens + OUTPUT_TOKENS) // setting.block_tokens + 16
        first, second = self._lan.hosts
        cluster, store = self._store(setting, 0, 2 * num_blocks)
        common: dict[str, Any] = {
            "redis_url": self._redis_url,
            "cluster": cluster,
            "model_dir": str(self._model),
            "model": "hosts",
            "engine": {"dtype": setting.dtype, "num_blocks": num_blocks, "num_threads": 1},
            "num_core_shares": 2,
        }
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(server_process("store", store, first.command(), setting.environment))
            channels = []
            for index, host in enumerate((first, second)):
                config = common | {
                    "node_id": f"node-{index}",
                    "role": ("prefill", "decode")[index],
                    "core_share": index,
                    "store_dir": store["dir"] if index == 0 else "",
                    "bind_host": host.address,
                    "advertise_host": host.address,
                    "host": f"host-{index}",
                    "trusts_network": True,
                }
                record = await stack.enter_async_context(
                    server_process("node", config, host.command(), setting.environment)
                )
                channels.append(await stack.enter_async_context(grpc.aio.insecure_channel(record["address"])))
            yield Nodes(*channels)


class Nodes:
    """Their stubs."""

    def __init__(self, prefill: grpc.aio.Channel, decode: grpc.aio.Channel) -> None:
        self._prefill = node_pb2_grpc.PrefillStub(prefill)  # type: ignore[no-untyped-call]
        self._decode = node_pb2_grpc.DecodeStub(decode)  # type: ignore[no-untyped-call]
        self._control = node_pb2_grpc.NodeControlStub(decode)  # type: ignore[no-untyped-call]

    async def hand_off(self, prompt: Sequence[int]) -> HandOff:
        """What a router does."""
        request = node_request(prompt)
        before = (await self._load()).fetches.remote
        legs = await both_legs(self._prefill, self._decode, request)
        after = (await self._load()).fetches.remote
        return HandOff(
            ttft_s=legs.times_s[0],
            gap_s=legs.times_s[1] - legs.times_s[0],
            step_s=legs.step_s,
            late_tokens=len(prompt) // EngineConfig().block_size * EngineConfig().block_size - legs.store_hit_tokens,
            received_bytes=after.num_bytes - before.num_bytes,
        )

    async def _load(self) -> node_pb2.Load:
        load: node_pb2.Load = await self._control.GetLoad(node_pb2.GetLoadRequest())
        return load


def live_figures(setting: Setting, length: int, rate: str, run: Sequence[HandOff]) -> list[Figure]:
    """The figures of one length at one rate."""
    link_s = floor_s(setting.num_bytes(last_chunk(length)), RATES[rate])
    keeps_up = link_s > 0.0 and not any(one.late_tokens for one in run)

    def figure(name: str, unit: str, values: Sequence[float], floor: Sequence[float] = ()) -> Figure:
        row = Row(_name(setting, length, rate, name), unit, tuple(values))
        return Figure(row, tuple(floor) if keeps_up else ())

    return [
        figure("TTFT", "s", [one.ttft_s for one in run]),
        figure("gap", "ms", [1e3 * one.gap_s for one in run], [1e3 * (link_s + one.step_s) for one in run]),
        figure("step", "ms", [1e3 * one.step_s for one in run]),
        figure("last", "ms", [1e3 * (one.gap_s - one.step_s) for one in run], [1e3 * link_s]),
        figure("late", "tok", [one.late_tokens for one in run]),
        figure("received", "MB", [one.received_bytes / 1e6 for one in run]),
    ]


async def measure(bench: Bench, plan: Plan) -> list[Figure]:
    figures: list[Figure] = []
    settings = [bench.setting(wire, dtype) for dtype in plan.dtypes for wire in plan.wires]
    for setting in settings:
        figures += await bench.transfers(setting, plan)
    for setting in settings if plan.is_live else ():
        for rate in plan.rates:
            figures += await bench.hand_offs(setting, rate, plan)
    return figures


def _name(setting: Setting, length: int, rate: str, what: str) -> str:
    return f"{what}: {rate}, {setting.wire}, {setting.dtype}, {length} tokens"


@contextmanager
def _worker(prefix: Sequence[str], setting: dict[str, Any], wire: Setting) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(sys.executable, "benchmarks.hosts_worker", [json.dumps(setting)], wire.environment, prefix)
    try:
        yield worker
    finally:
        worker.stop()


def _ask(worker: WorkerProcess, operation: str, num_blocks: int) -> float:
    worker.send({"operation": operation, "num_blocks": num_blocks})
    return float(worker.receive())


def parse() -> tuple[Plan, bool]:
    """The plan, and whether the floor is shown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 Gbit/s and bfloat16 alone, once")
    parser.add_argument("--peer", choices=["floor", "none"], default="floor", help="what to show beside Baton")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"of the prompts, in tokens; default {LENGTHS}")
    parser.add_argument("--rates", nargs="+", choices=list(RATES), help="of the links")
    parser.add_argument("--wires", nargs="+", choices=WIRES, default=WIRES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="of weights and KV")
    parser.add_argument("--repeats", type=int, default=0, help=f"default {REPEATS}")
    parser.add_argument("--no-live", action="store_true", help="transfers alone")
    args = parser.parse_args()
    if args.repeats < 0:
        parser.error("--repeats: must be positive")
    if reason := reason_to_skip():
        parser.error(reason)
    return Plan(
        lengths=args.lengths or LENGTHS,
        rates=args.rates or (QUICK_RATES if args.quick else list(RATES)),
        wires=args.wires,
        dtypes=args.dtypes or (DTYPES[:1] if args.quick else DTYPES),
        repeats=args.repeats or (QUICK_REPEATS if args.quick else REPEATS),
        is_live=not args.no_live,
    ), args.peer == "floor"


def main() -> None:
    plan, shows_floor = parse()
    # Short, for unix sockets live in it; in shared memory, for arenas do.
    with (
        tempfile.TemporaryDirectory(prefix="baton-", dir="/dev/shm") as name,
        tempfile.TemporaryDirectory() as disk,
        Lan(2) as lan,
    ):
        folder = Path(name)
        model = write_model(Path(disk) / "model", max(plan.lengths))
        server = EmbeddedRedis(folder / "redis", lan.address)
        server.start()
        try:
            figures = asyncio.run(measure(Bench(lan, server.url, model, folder), plan))
        finally:
            server.stop()
    rows = [figure.row for figure in figures]
    floor = Peer("floor", [figure.floor for figure in figures], is_limit=True)
    print_beside("hosts", rows, [floor] if shows_floor else [])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts are taken away
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
