"""`baton bench`: sends a stream of prompts to a router and prints what `vllm bench serve` would print.

The shell around the pure parts: arguments, the event loop, the progress bar, files. Knows no node and no store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import secrets
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from batonpb import common_pb2, inference_pb2
from loadtest.arrival import Arrivals, poisson_times_s
from loadtest.client import Client, Clock, Shot, measure_loop_lag
from loadtest.prompts import PrefixShape, Prompt, random_prompts, shared_prefix_prompts
from loadtest.record import RequestRecord
from loadtest.report import Report, as_json, render, summarise

_CLOSED_LOOP_DEFAULT = 8
_ERRORS_SHOWN = 10
_OK, _SOME_FAILED, _NOT_RUN, _INTERRUPTED = 0, 1, 2, 130


class BenchError(Exception):
    """The run cannot be made; the message says why."""


@dataclass(frozen=True)
class BenchConfig:
    """What to send. Lengths in tokens; `max_concurrency` None is no lid; `request_rate` per second, may be infinite."""

    address: str
    num_prompts: int
    request_rate: float
    max_concurrency: int | None
    dataset: str
    input_len: int
    output_len: int
    prefix_len: int
    num_prefixes: int
    seed: int
    warmup: int
    temperature: float
    ignore_eos: bool
    timeout_s: float
    ttft_slo_ms: int | None = None  # the router refuses what it predicts to be later
    tpot_slo_ms: int | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> BenchConfig:
        """Draws a seed where none is given: then a second run finds none of the first run's prompts in a cache."""
        if not args.address:
            raise BenchError("--address HOST:PORT of the router is needed")
        lid: int | None = args.max_concurrency
        if lid is None and math.isinf(args.request_rate):
            lid = _CLOSED_LOOP_DEFAULT
        return cls(
            address=args.address,
            num_prompts=args.num_prompts,
            request_rate=args.request_rate,
            max_concurrency=lid or None,
            dataset=args.dataset,
            input_len=args.input_len,
            output_len=args.output_len,
            prefix_len=args.input_len // 2 if args.prefix_len is None else args.prefix_len,
            num_prefixes=args.num_prefixes,
            seed=secrets.randbits(32) if args.seed is None else args.seed,
            warmup=args.warmup,
            temperature=args.temperature,
            ignore_eos=args.ignore_eos,
            timeout_s=args.timeout,
            ttft_slo_ms=args.ttft_slo_ms,
            tpot_slo_ms=args.tpot_slo_ms,
        )


def _number(kind: type[int] | type[float], low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive or inf, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `baton bench`."""
    count, natural, seconds = _number(int, 1), _number(int, 0), _number(float, 0)
    add = parser.add_argument
    add("--address", metavar="HOST:PORT", help="of the router")
    add("--api-key", default="", metavar="KEY", help="of a tenant; default: the variable BATON_API_KEY")
    add("--num-prompts", type=count, default=100, metavar="N", help="requests to send (default 100)")
    add("--request-rate", type=_rate, default=math.inf, metavar="R", help="Poisson arrivals per second (default inf)")
    lid = f"most requests in flight; 0 = no limit (default {_CLOSED_LOOP_DEFAULT} with an infinite rate, else no limit)"
    add("--max-concurrency", type=natural, metavar="N", help=lid)
    add("--dataset", choices=("random", "shared-prefix"), default="random", help="kind of prompts (default random)")
    add("--input-len", type=count, default=256, metavar="TOKENS", help="of each prompt, in all (default 256)")
    add("--output-len", type=count, default=64, metavar="TOKENS", help="of each answer (default 64)")
    add("--prefix-len", type=count, metavar="TOKENS", help="shared-prefix: of the input (default: half of it)")
    add("--num-prefixes", type=count, default=4, metavar="N", help="shared-prefix: different prefixes (default 4)")
    add("--seed", type=natural, metavar="S", help="repeat a run's prompts, arrivals and samples (default: fresh ones)")
    add("--warmup", type=natural, default=0, metavar="N", help="requests before the run, not counted (default 0)")
    add("--temperature", type=seconds, default=0.0, metavar="T", help="of sampling (default 0 = greedy)")
    end = "go on behind an end token, so that each answer has --output-len tokens (default on)"
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help=end)
    add("--timeout", type=seconds, default=600.0, metavar="S", help="deadline of each request (default 600)")
    add(
        "--ttft-slo-ms", type=count, metavar="MS", help="the router refuses what it predicts to be later (default none)"
    )
    add("--tpot-slo-ms", type=count, metavar="MS", help="likewise, of each token behind the first")
    add("--json", metavar="FILE", help="also write figures and requests there")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark. 0: all requests succeeded; 1: some failed; 2: it could not be run; 130: interrupted."""
    try:
        config = BenchConfig.from_args(args)
        records, report = asyncio.run(_measure(config, args.api_key))
    except BenchError as exc:
        print(f"baton bench: {exc}", file=sys.stderr)
        return _NOT_RUN
    except KeyboardInterrupt:
        print("baton bench: interrupted, no figures", file=sys.stderr)
        return _INTERRUPTED
    print(render(report, config.request_rate, config.max_concurrency))
    for error, count in list(report.errors.items())[:_ERRORS_SHOWN]:  # the most frequent first
        print(f"baton bench: {count} x {error}", file=sys.stderr)
    if args.json:
        content = {"config": asdict(config) | {"request_rate": str(config.request_rate)}} | as_json(report, records)
        Path(args.json).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    return _SOME_FAILED if report.failed else _OK


async def _measure(config: BenchConfig, api_key: str) -> tuple[list[RequestRecord], Report]:
    """The key is no part of the config, which is written to files."""
    console = Console(stderr=True)
    async with Client(config.address, config.timeout_s, api_key) as client:
        model = await _get_model(client, config)
        console.print(f"{model.model} at {config.address}, seed {config.seed}", highlight=False)
        warmup, shots = _warmup_shots(config, model.vocab_size), _shots(config, model.vocab_size)
        with _progress(console) as progress:
            if warmup:
                await _run_phase("warm-up", client, warmup, config.max_concurrency, progress)
            lags_s: list[float] = []
            meter = asyncio.create_task(measure_loop_lag(lags_s))
            records, duration_s = await _run_phase("bench", client, shots, config.max_concurrency, progress)
            meter.cancel()
    return records, summarise(records, duration_s, lags_s)


async def _get_model(client: Client, config: BenchConfig) -> inference_pb2.GetModelResponse:
    try:
        model = await client.get_model()
    except grpc.aio.AioRpcError as exc:
        raise BenchError(f"{config.address} does not serve: {exc.code().name}: {exc.details()}") from exc
    if config.input_len + config.output_len > model.max_model_len:
        wanted = f"--input-len {config.input_len} + --output-len {config.output_len}"
        raise BenchError(f"{wanted} is more than the {model.max_model_len} tokens of {model.model}")
    return model


def _generator(config: BenchConfig, purpose: str) -> random.Random:
    """One generator for each purpose, so that, say, another rate leaves the prompts as they are."""
    return random.Random(f"baton-bench/{config.seed}/{purpose}")


def _shots(config: BenchConfig, vocab_size: int) -> list[Shot]:
    times_s = poisson_times_s(config.num_prompts, config.request_rate, _generator(config, "arrivals"))
    prompts = _prompts(config, vocab_size, _generator(config, "prompts"))
    seeds = _generator(config, "samples")
    return [Shot(i, times_s[i], _request(config, prompt, seeds.getrandbits(63))) for i, prompt in enumerate(prompts)]


def _warmup_shots(config: BenchConfig, vocab_size: int) -> list[Shot]:
    """Random prompts of their own, so that the run finds nothing of them in a cache."""
    generator = _generator(config, "warmup")
    prompts = random_prompts(config.warmup, config.input_len, vocab_size, generator)
    return [Shot(i, 0.0, _request(config, prompt, generator.getrandbits(63))) for i, prompt in enumerate(prompts)]


def _prompts(config: BenchConfig, vocab_size: int, generator: random.Random) -> list[Prompt]:
    if config.dataset == "random":
        return random_prompts(config.num_prompts, config.input_len, vocab_size, generator)
    shape = PrefixShape(config.prefix_len, config.num_prefixes)
    try:
        return shared_prefix_prompts(config.num_prompts, config.input_len, shape, vocab_size, generator)
    except ValueError as exc:
        raise BenchError(str(exc)) from exc


def _request(config: BenchConfig, prompt: Prompt, seed: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenPrompt(token_ids=prompt),
        sampling=common_pb2.SamplingParams(
            temperature=config.temperature, seed=seed, max_tokens=config.output_len, ignore_eos=config.ignore_eos
        ),
        ttft_slo_ms=config.ttft_slo_ms,
        tpot_slo_ms=config.tpot_slo_ms,
    )


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, refresh_per_second=4)


async def _run_phase(
    name: str, client: Client, shots: list[Shot], max_in_flight: int | None, progress: Progress
) -> tuple[list[RequestRecord], float]:
    """Sends all shots and waits for all answers; the records in the order of the shots, and the seconds it took."""
    task_id = progress.add_task(name, total=len(shots), note="")
    records: list[RequestRecord] = []
    num_failed = 0
    clock = Clock()

    async def shoot(index: int) -> None:
        nonlocal num_failed
        records.append(await client.generate(shots[index], clock))
        num_failed += not records[-1].succeeded
        progress.update(task_id, advance=1, note=f"{num_failed} failed" if num_failed else "")

    await drive(Arrivals([shot.scheduled_s for shot in shots], max_in_flight), shoot, clock)
    return sorted(records, key=lambda record: record.index), clock()


async def drive(arrivals: Arrivals, shoot: Callable[[int], Awaitable[None]], clock: Callable[[], float]) -> None:
    """Starts `shoot(index)` for each arrival when it is due, and returns when all have ended."""
    freed = asyncio.Event()

    async def one(index: int) -> None:
        await shoot(index)
        arrivals.finished()
        freed.set()

    async with asyncio.TaskGroup() as group:
        while True:
            freed.clear()
            for index in arrivals.due(clock()):
                group.create_task(one(index))
            if arrivals.all_sent:
                break
            next_s = arrivals.next_s()
            if next_s is None:  # every place is taken
                await freed.wait()
            else:
                await asyncio.sleep(next_s - clock())
