"""Divides one plan among several client processes, if one cannot keep up. They share a clock and nothing else."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from loadtest.config import BenchConfig, BenchError
from loadtest.connect import client_maker
from loadtest.exchange import Clock, SendError
from loadtest.record import RequestRecord
from loadtest.runner import Phase, Plan, Runner, shares

_HEAD_START_S = 0.2  # from the word to go until the first request


async def run_in_processes(config: BenchConfig, plan: Plan, tell: Callable[[RequestRecord], None]) -> Phase:
    """Like `Runner.run`, but `tell` is called for all requests at the end. Raises `BenchError` when a process fails."""
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[SpawnProcess, Connection]] = []
    try:
        for part in shares(plan, config.client_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, config, part), daemon=True)
            process.start()
            theirs.close()
            workers.append((process, ours))
        await asyncio.gather(*(_hear(pipe) for _, pipe in workers))  # all are connected
        start_s = time.perf_counter() + _HEAD_START_S  # one clock for all processes of a machine
        for _, pipe in workers:
            pipe.send(start_s)
        phases: list[Phase] = await asyncio.gather(*(_hear(pipe) for _, pipe in workers))
    finally:
        for process, pipe in workers:
            process.terminate()
            process.join()
            pipe.close()
    whole = Phase(
        records=sorted((record for phase in phases for record in phase.records), key=lambda record: record.index),
        duration_s=max(phase.duration_s for phase in phases),
        loop_lags_s=[lag_s for phase in phases for lag_s in phase.loop_lags_s],
        num_unsent=sum(phase.num_unsent for phase in phases),
    )
    for record in whole.records:
        tell(record)
    return whole


async def _hear(pipe: Connection) -> Any:
    """The next message of a process; an exception in it is raised here."""
    try:
        said = await asyncio.to_thread(pipe.recv)
    except (EOFError, OSError):
        raise BenchError("a client process died") from None
    if isinstance(said, Exception):
        raise BenchError(f"a client process failed: {said}")
    return said


def _work(pipe: Connection, config: BenchConfig, plan: Plan) -> None:
    """A client process: connects, reports that, waits for the start, runs its share, and reports the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    try:
        pipe.send(asyncio.run(_play(pipe, config, plan)))
    except (SendError, OSError, ValueError) as error:
        pipe.send(RuntimeError(config.target.redact(str(error))))


async def _play(pipe: Connection, config: BenchConfig, plan: Plan) -> Phase:
    make = client_maker(config)
    async with make() as client:
        await client.get_model()
        pipe.send(None)
        start_s = await asyncio.to_thread(pipe.recv)
        return await Runner(client, make).run(plan, clock=Clock(start_s))
