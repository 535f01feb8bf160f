"""One phase of a load test: sessions sent when they are due, turn by turn, until all have ended."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from loadtest.arrival import Arrivals
from loadtest.behaviour import BAD_KINDS, Kind
from loadtest.exchange import Ask, Client, Clock, Message, Shot, Stream, exchange, measure_loop_lag
from loadtest.record import RequestRecord
from loadtest.workload import Session

_SLOW_READ_PAUSE_S = 0.25


@dataclass(frozen=True)
class Traits:
    """How clients that leave or misbehave do so."""

    cancel_after: int = 4  # messages with tokens
    oversized_bytes: int = 16 << 20


@dataclass(frozen=True)
class Plan:
    """Who sends what when. `kinds` and `seeds` (of samples) have one entry per session, like `times_s`."""

    sessions: Sequence[Session]
    times_s: Sequence[float]
    kinds: Sequence[Kind]
    seeds: Sequence[int]
    max_in_flight: int | None = None
    traits: Traits = Traits()
    indices: Sequence[int] | None = None  # of each session's first request; None: it is the whole plan

    @property
    def num_requests(self) -> int:
        """The total number of turns."""
        return sum(self.turns_of(index) for index in range(len(self.sessions)))

    def turns_of(self, index: int) -> int:
        """The number of turns of a session; misbehaving clients have one."""
        return 1 if self.kinds[index] in BAD_KINDS else len(self.sessions[index].turns)


def first_indices(plan: Plan) -> Sequence[int]:
    """The number of each session's first request in the whole run."""
    if plan.indices is not None:
        return plan.indices
    counts = (plan.turns_of(number) for number in range(len(plan.sessions)))
    return list(itertools.accumulate(counts, initial=0))[:-1]


def shares(plan: Plan, count: int) -> list[Plan]:
    """The plan in at most `count` parts: each gets every n-th session, and its share of the concurrency cap."""
    lid = plan.max_in_flight
    count = max(1, min(count, len(plan.sessions), lid or count))
    indices = first_indices(plan)
    return [
        replace(
            plan,
            sessions=plan.sessions[i::count],
            times_s=plan.times_s[i::count],
            kinds=plan.kinds[i::count],
            seeds=plan.seeds[i::count],
            indices=indices[i::count],
            max_in_flight=None if lid is None else lid // count + (i < lid % count),
        )
        for i in range(count)
    ]


@dataclass
class Phase:
    """The results of a plan."""

    records: list[RequestRecord] = field(default_factory=list)
    duration_s: float = 0.0
    loop_lags_s: list[float] = field(default_factory=list)
    num_unsent: int = 0  # turns behind one that failed


@dataclass(frozen=True)
class _UnderWay:
    """A plan in progress."""

    plan: Plan
    clock: Clock
    phase: Phase
    tell: Callable[[RequestRecord], None]


class Runner:
    """Runs plans with one client. `connect` makes further ones, for clients that close their connection."""

    def __init__(self, client: Client, connect: Callable[[], Client]) -> None:
        self._client = client
        self._connect = connect

    async def run(
        self, plan: Plan, tell: Callable[[RequestRecord], None] = lambda record: None, clock: Clock | None = None
    ) -> Phase:
        """Sends all and waits for all answers; returns records in request order. `tell` is called with each."""
        requests = [self._first_request(plan, number) for number in range(len(plan.sessions))]
        indices = first_indices(plan)
        under_way = _UnderWay(plan, clock or Clock(), Phase(), tell)
        phase = under_way.phase

        async def play(number: int, ready_s: float) -> None:
            request, requests[number] = requests[number], None  # it may be large
            shot = Shot(indices[number], plan.times_s[number], request, plan.kinds[number], ready_s=ready_s)
            await self._play(under_way, number, _with_traits(plan, shot))

        meter = asyncio.create_task(measure_loop_lag(phase.loop_lags_s))
        try:
            await drive(Arrivals(plan.times_s, plan.max_in_flight), play, under_way.clock, plan.times_s)
        finally:
            meter.cancel()
        phase.duration_s = under_way.clock()
        phase.records.sort(key=lambda record: record.index)
        return phase

    def _first_request(self, plan: Plan, index: int) -> object:
        kind = plan.kinds[index]
        if kind is Kind.MALFORMED:
            return self._client.encode_malformed()
        if kind is Kind.OVERSIZED:
            return self._client.encode_oversized(plan.traits.oversized_bytes)
        turn = plan.sessions[index].turns[0]
        return self._client.encode(Ask((Message("user", turn.content),), turn.output_tokens, plan.seeds[index]))

    async def _play(self, run: _UnderWay, number: int, shot: Shot) -> None:
        """Runs one session: each turn sends the conversation so far, with the answers received."""
        turns = run.plan.sessions[number].turns[: run.plan.turns_of(number)]
        said: tuple[Message, ...] = ()
        for position, turn in enumerate(turns):
            said += (Message("user", turn.content),)
            if position:
                due_s = run.clock() + turn.think_s
                request = self._client.encode(Ask(said, turn.output_tokens, run.plan.seeds[number] + position))
                shot = replace(
                    shot, index=shot.index + 1, turn=position, request=request, scheduled_s=due_s, ready_s=due_s
                )
                await asyncio.sleep(due_s - run.clock())
            record, stream = await self._send(shot, run.clock)
            run.phase.records.append(record)
            run.tell(record)
            if record.error:
                run.phase.num_unsent += len(turns) - position - 1
                return
            said += (Message("assistant", stream.answer(isinstance(turn.content, str))),)

    async def _send(self, shot: Shot, clock: Clock) -> tuple[RequestRecord, Stream]:
        if shot.kind != Kind.DISCONNECT:
            return await exchange(self._client, shot, clock)
        async with self._connect() as client:  # leaving takes the connection with it
            return await exchange(client, shot, clock)


def _with_traits(plan: Plan, shot: Shot) -> Shot:
    if shot.kind == Kind.CANCEL:
        return replace(shot, leave_after=plan.traits.cancel_after)
    if shot.kind == Kind.DISCONNECT:
        return replace(shot, leave_after=1)
    return replace(shot, read_pause_s=_SLOW_READ_PAUSE_S) if shot.kind == Kind.SLOW_READER else shot


async def drive(
    arrivals: Arrivals,
    start: Callable[[int, float], Awaitable[None]],
    clock: Callable[[], float],
    times_s: Sequence[float],
) -> None:
    """Starts `start(index, ready_s)` for each arrival when it is due, and returns when all have ended.

    `ready_s` is when it was due and had a place: any further delay is the client's own.
    """
    freed = asyncio.Event()
    freed_s = 0.0  # when the last one ended

    async def one(index: int, ready_s: float) -> None:
        nonlocal freed_s
        await start(index, ready_s)
        freed_s = clock()
        arrivals.finished()
        freed.set()

    had_no_place = False
    async with asyncio.TaskGroup() as group:
        while True:
            freed.clear()
            for index in arrivals.due(clock()):
                group.create_task(one(index, max(times_s[index], freed_s if had_no_place else 0.0)))
            if arrivals.all_sent:
                break
            next_s = arrivals.next_s()
            had_no_place = next_s is None
            if next_s is None:
                await freed.wait()
            else:
                await asyncio.sleep(next_s - clock())
