"""What benchmarks/serving.py sends, and which figures it takes from the answers. Knows no server.

An open load's requests come by a Poisson process, the same for all set-ups; what prompts say is new in each turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from loadtest.arrival import open_times_s
from loadtest.behaviour import Kind
from loadtest.exchange import Ask, Client, Clock, Message, Shot, Stream, exchange
from loadtest.prompts import PrefixShape, random_prompts
from loadtest.record import RequestRecord
from loadtest.report import Report, percentile, summarise
from loadtest.runner import Plan, Runner
from loadtest.slo import Slo
from loadtest.workload import Dice, Session, Shape, conversations, random_sessions

Figures = dict[str, float]  # by "name, unit"

# (d): streams decode alone for a while, then prompts arrive.
STREAMS, STREAM_PROMPT, LONG_PROMPT, LONG_OUTPUT = 4, 256, 1024, 16
SETTLE_S = 2.0  # until all streams decode; gaps count from here on
LONG_PER_S = 1.0
LONE_LENGTHS, LONE_REPEATS = (1024, 4096), 3


@dataclass(frozen=True)
class OpenLoad:
    """Requests, or conversations, at `rate_per_s`."""

    name: str
    shape: Shape
    rate_per_s: float
    has_hits: bool = True  # whether its prompts share anything

    def plan(self, rate_per_s: float, seconds: float, vocab_size: int, dice: Dice) -> Plan:
        count = max(2, round(rate_per_s * seconds))
        make = conversations if self.shape.turns > 1 else random_sessions
        sessions: list[Session] = make(count, self.shape, vocab_size, dice)
        times_s = open_times_s(count, rate_per_s, dice.of("arrivals"))
        return Plan(sessions, times_s, [Kind.GOOD] * count, list(range(count)))


OPEN_LOADS = {
    "a": OpenLoad("(a) conversations of 4 turns, 256 in, 64 out each", Shape(256, 64, turns=4, think_s=1.0), 1.5),
    "b": OpenLoad("(b) 1024 shared of 1152 in, 32 out", Shape(1152, 32, PrefixShape(1024, 4)), 8.0),
    "c": OpenLoad("(c) unique, 1024 in, 64 out", Shape(1024, 64), 1.0, has_hits=False),
}
INTERFERENCE = "(d) 4 streams, 1024-token prompts at 1/s"
LONE = "(e) lone prompts"


async def warm_prefixes(client: Client, load: OpenLoad, plan: Plan) -> None:
    """Prefixes that many share have long been seen: each goes out twice before the clock runs, so to both of two."""
    if load.shape.prefix is None:
        return
    length, clock = load.shape.prefix.length, Clock()
    prefixes = dict.fromkeys(session.turns[0].content[:length] for session in plan.sessions)
    for prefix in prefixes:
        for _ in range(2):
            request = client.encode(Ask((Message("user", prefix),), 1, 0))
            await exchange(client, Shot(0, clock(), request), clock)


async def run_open(client: Client, plan: Plan, slo: Slo) -> Report:
    """Sends an open load and waits for all answers."""
    phase = await Runner(client, lambda: client).run(plan)
    return summarise(phase.records, phase.duration_s, phase.loop_lags_s, slo, phase.num_unsent)


def open_figures(load: OpenLoad, report: Report) -> Figures:
    """Of one turn. What nobody answered has no figure."""
    found: Figures = {
        "goodput, req/s": report.request_goodput or 0.0,
        "failed, requests": report.failed + report.unsent,
    }
    if report.completed:
        for name, times in (("TTFT", report.ttft), ("TPOT", report.tpot), ("ITL", report.itl)):
            found |= {f"{name} p50, ms": times.median_ms, f"{name} p99, ms": times.p99_ms}
        if load.has_hits:
            found["hit rate, %"] = 100 * report.prefix_hit_rate
    return found


async def interference(client: Client, seconds: float, vocab_size: int, dice: Dice) -> Figures:
    """(d): `seconds` in all, of which the first half without prompts that arrive."""
    rng = dice.of_content("prompts")
    clock = Clock()
    streams = [Stream(clock) for _ in range(STREAMS)]

    async def decode(stream: Stream, prompt: tuple[int, ...]) -> None:
        ask = Ask((Message("user", prompt),), 8192 - STREAM_PROMPT - 1, 0)
        await client.send(client.encode(ask), stream)

    prompts = random_prompts(STREAMS, STREAM_PROMPT, vocab_size, rng)
    tasks = [asyncio.create_task(decode(*both)) for both in zip(streams, prompts, strict=True)]
    try:
        await asyncio.sleep(SETTLE_S + seconds / 2)
        half_s = clock()
        records = await _long_prompts(client, clock, round(seconds / 2 * LONG_PER_S), vocab_size, dice)
        end_s = clock()
    finally:
        for task in tasks:
            task.cancel()
        with suppress(Exception):
            await asyncio.gather(*tasks, return_exceptions=True)
    failed = [task for task in tasks if not task.cancelled()]
    times = [stream.token_times_s for stream in streams]
    return interference_figures(times, records, SETTLE_S, half_s, end_s) | {
        "failed, requests": len(failed) + sum(not record.succeeded for record in records)
    }


async def _long_prompts(client: Client, clock: Clock, count: int, vocab_size: int, dice: Dice) -> list[RequestRecord]:
    prompts = random_prompts(count, LONG_PROMPT, vocab_size, dice.of_content("long"))
    shots = [
        Shot(i, clock() + i / LONG_PER_S, client.encode(Ask((Message("user", prompt),), LONG_OUTPUT, 0)))
        for i, prompt in enumerate(prompts)
    ]

    async def send(shot: Shot) -> RequestRecord:
        await asyncio.sleep(shot.scheduled_s - clock())
        return (await exchange(client, shot, clock))[0]

    return list(await asyncio.gather(*map(send, shots)))


def interference_figures(
    streams: Sequence[Sequence[float]], records: Sequence[RequestRecord], begin_s: float, half_s: float, end_s: float
) -> Figures:
    """Gaps between tokens that lie within [begin_s, half_s], and those that end in (half_s, end_s]."""
    alone = [b - a for times in streams for a, b in pairwise(times) if begin_s <= a and b <= half_s]
    beside = [b - a for times in streams for a, b in pairwise(times) if half_s < b <= end_s]
    found: Figures = {}
    for name, gaps in (("alone", alone), ("with prompts", beside)):
        if gaps:
            found |= {f"ITL p{p} {name}, ms": 1e3 * percentile(gaps, p) for p in (50, 99)}
    if alone and beside:
        found["ITL p99 with prompts / alone, x"] = percentile(beside, 99) / percentile(alone, 99)
    if ttfts := [1e3 * record.ttft_s for record in records if record.succeeded]:
        found |= {
            "TTFT p50 of the prompts, ms": percentile(ttfts, 50),
            "TTFT p99 of the prompts, ms": percentile(ttfts, 99),
        }
    return found


async def lone(client: Client, vocab_size: int, dice: Dice, lengths: Sequence[int] = LONE_LENGTHS) -> Figures:
    """(e): one request at a time. The median of `LONE_REPEATS`."""
    found: Figures = {}
    clock = Clock()
    for length in lengths:
        times = []
        for i, prompt in enumerate(random_prompts(LONE_REPEATS, length, vocab_size, dice.of_content(f"lone {length}"))):
            request = client.encode(Ask((Message("user", prompt),), 2, 0))
            record, _ = await exchange(client, Shot(i, clock(), request), clock)
            times += [1e3 * record.ttft_s] if record.succeeded else []
        found[f"failed of {length}, requests"] = LONE_REPEATS - len(times)
        if times:
            found[f"TTFT of {length}, ms"] = percentile(times, 50)
    return found
