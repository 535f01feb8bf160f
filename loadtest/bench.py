"""`baton bench`: puts load on a server and prints what `vllm bench serve` would print.

The shell around the pure parts: the event loop, the progress bar, files. Knows no node and no store.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loadtest.arrival import open_times_s
from loadtest.behaviour import Kind, draw_kinds
from loadtest.config import BenchConfig, BenchError, SweepConfig
from loadtest.connect import client_maker
from loadtest.datasets import Material, material_for
from loadtest.exchange import Client, ModelInfo, SendError
from loadtest.record import RequestRecord
from loadtest.report import Report, lag_of, summarise
from loadtest.report_html import page
from loadtest.report_json import result_of, sweep_result_of, write_json
from loadtest.report_text import render, render_sweep
from loadtest.runner import Phase, Plan, Runner
from loadtest.sweep import Search, Step
from loadtest.workers import run_in_processes
from loadtest.workload import Dice

_ERRORS_SHOWN = 10
_OK, _SOME_FAILED, _NOT_RUN, _LATE, _INTERRUPTED = 0, 1, 2, 3, 130
_LATE_ADVICE = "use --client-processes, a machine with less to do, a lower load, or raise --max-client-lag-ms"


class ClientLate(Exception):
    """The client was too slow for its figures to be reliable; the message says how slow."""


@dataclass(frozen=True)
class Run:
    """One finished run."""

    records: list[RequestRecord]
    report: Report


def run(args: argparse.Namespace) -> int:
    """0: all requests succeeded; 1: some failed, or no rate met the objectives; 2: it could not be run; 3: the client
    itself was too slow, no figures; 130: interrupted."""
    try:
        config = BenchConfig.from_args(args)
        for file in (args.result_json, args.json, args.report):
            _check_writable(file)
        return asyncio.run(_sweep(config, args) if config.sweep else _measure(config, args))
    except BenchError as exc:
        return _fail(str(exc), _NOT_RUN)
    except ClientLate as exc:
        return _fail(f"no figures: {exc}; {_LATE_ADVICE}", _LATE)
    except KeyboardInterrupt:
        return _fail("interrupted, no figures", _INTERRUPTED)


def _fail(words: str, status: int) -> int:
    print(f"baton bench: {words}", file=sys.stderr)
    return status


def _check_writable(file: Path | None) -> None:
    """Checks that a file can be written, before the run and not after it. Leaves no new file."""
    if file is None:
        return
    is_new = not file.exists()
    try:
        file.open("a").close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise BenchError(f"cannot write {file}: {error.strerror}") from None


async def _measure(config: BenchConfig, args: argparse.Namespace) -> int:
    """One run."""
    async with _Session(config) as session:
        done = await session.run(config, session.dice)
    report, lid = done.report, config.load.max_in_flight
    rate = config.load.rate if isinstance(config.load.rate, float | int) else float("inf")
    print(render(report, rate, lid, config.percentiles))
    for error, count in list(report.errors.items())[:_ERRORS_SHOWN]:  # the most frequent first
        print(f"baton bench: {count} x {error}", file=sys.stderr)
    result = result_of(config, session.model.name, report, done.records)
    _write(result, args)
    return _SOME_FAILED if report.failed else _OK


async def _sweep(config: BenchConfig, args: argparse.Namespace) -> int:
    """Runs at one rate after another until the highest that meets the objectives is known."""
    assert config.sweep is not None
    wanted = config.sweep
    search = Search(wanted.start_per_s, wanted.max_per_s, wanted.precision)
    steps: list[Step] = []
    late = ""
    async with _Session(config) as session:
        while (rate_per_s := search.next_per_s()) is not None:
            step_config = _at_rate(config, wanted, rate_per_s)
            try:
                done = await session.run(step_config, session.dice.step(len(steps)), f"{rate_per_s:.2f}/s")
            except ClientLate as exc:  # what was measured before was measured in time
                late = f"no figures from {rate_per_s:.2f} req/s on: {exc}; {_LATE_ADVICE}"
                break
            steps.append(Step(rate_per_s, done.report))
            search.tell(rate_per_s, steps[-1].good_share >= wanted.share)
    print(render_sweep(steps, search.best_per_s, wanted.share))
    _write(sweep_result_of(config, session.model.name, steps, search.best_per_s), args)
    if late:
        return _fail(late, _LATE)
    return _OK if search.best_per_s else _SOME_FAILED


def _at_rate(config: BenchConfig, sweep: SweepConfig, rate_per_s: float) -> BenchConfig:
    """The config at this rate, with requests for `sweep.seconds`: a step must not end before the server is full."""
    count = max(config.data.num_prompts, round(rate_per_s * sweep.seconds))
    return replace(config, load=replace(config.load, rate=rate_per_s), data=replace(config.data, num_prompts=count))


def _write(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Writes the requested files."""
    if args.result_json:
        write_json(result, args.result_json, with_requests=args.save_detailed)
    if args.json:
        write_json(result, args.json, with_requests=True)
    if args.report:
        args.report.write_text(page([("this run", result)]), encoding="utf-8")


class _Session:
    """A connection to the server, with its model known, and a progress bar: `async with`."""

    def __init__(self, config: BenchConfig) -> None:
        self._config = config
        self.dice = Dice(config.seed, config.nonce)
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, console=self._console, refresh_per_second=4)

    async def __aenter__(self) -> _Session:
        config = self._config
        self._client = await _connected(config)
        try:
            self.model = await self._client.get_model()
            self._warmup = _warmup_plan(config, self.model, self.dice)
        except SendError as exc:
            await self._client.__aexit__()
            words = config.target.redact(str(exc))
            raise BenchError(f"{config.target.address} does not serve: {words}") from exc
        except BaseException:
            await self._client.__aexit__()
            raise
        words = f"{self.model.name} at {config.target.address}, seed {config.seed}"
        self._console.print(words, highlight=False, markup=False)
        self._progress.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._progress.stop()
        await self._client.__aexit__()

    async def run(self, config: BenchConfig, dice: Dice, name: str = "bench") -> Run:
        """One run, warmed up before the first. Raises `BenchError`, `ClientLate`."""
        material = material_for(config, self.model, dice)
        plan = _plan(config, material, dice)
        if material.left_out:
            words = f"{material.left_out} requests are longer than the model takes and are left out"
            self._console.print(words, highlight=False)
        if self._warmup is not None:
            await self._phase("warm-up", self._warmup)
            self._warmup = None
        phase = await self._phase(name, plan)
        report = summarise(phase.records, phase.duration_s, phase.loop_lags_s, config.slo, phase.num_unsent)
        if lag := lag_of(report, config.max_client_lag_ms):
            raise ClientLate(lag)
        return Run(phase.records, report)

    async def _phase(self, name: str, plan: Plan) -> Phase:
        task_id = self._progress.add_task(name, total=plan.num_requests, note="")
        num_failed = 0

        def tell(record: RequestRecord) -> None:
            nonlocal num_failed
            num_failed += not record.succeeded and not record.kind
            self._progress.update(task_id, advance=1, note=f"{num_failed} failed" if num_failed else "")

        if self._config.client_processes > 1:
            return await run_in_processes(self._config, plan, tell)
        return await Runner(self._client, client_maker(self._config)).run(plan, tell)


async def _connected(config: BenchConfig) -> Client:
    try:
        return await client_maker(config)().__aenter__()
    except (ValueError, OSError) as exc:
        raise BenchError(f"--address {config.target.address}: {exc}") from exc


def _plan(config: BenchConfig, material: Material, dice: Dice) -> Plan:
    count = len(material.sessions)
    load = config.load
    times_s = material.times_s
    if times_s is None:
        times_s = open_times_s(count, load.rate, dice.of("arrivals"), load.burstiness, load.constant)
    kinds = draw_kinds(count, config.cancel_rate, config.bad_clients, dice.of("kinds"))
    return Plan(material.sessions, times_s, kinds, _seeds(count, dice, "samples"), load.max_in_flight, config.traits)


def _seeds(count: int, dice: Dice, purpose: str) -> list[int]:
    """Seeds of samples: below 2^62, so that the further turns of a session can count up from there."""
    rng = dice.of(purpose)
    return [rng.getrandbits(62) for _ in range(count)]


def _warmup_plan(config: BenchConfig, model: ModelInfo, dice: Dice) -> Plan | None:
    """Random prompts of their own, so that the run finds nothing of them in a cache."""
    if not config.warmup:
        return None
    data = replace(config.data, kind="random", num_prompts=config.warmup)
    material = material_for(replace(config, data=data), model, dice.step(-1))
    lid = config.load.max_in_flight
    count = config.warmup
    return Plan(material.sessions, [0.0] * count, [Kind.GOOD] * count, _seeds(count, dice, "warm-up samples"), lid)
