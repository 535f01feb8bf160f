"""A simulated node: a queue of first legs and a batch that decodes, in steps. Times are passed in; nothing is random.

One class for all roles, as there is one engine. A prefill node computes a whole prompt per step; a node that decodes
computes chunks within the steps of its batch. Between two changes of a decode-only batch, steps follow a formula.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.order import rank
from loadtest.machines import Machine
from loadtest.sim_cache import Arena
from loadtest.trace import BLOCK_TOKENS, TracedRequest
from router.plan import Plan

_ALMOST = 1e-6  # of a step: the clock's rounding


@dataclass(eq=False)
class Job:
    """One request on its way through the simulated cluster. Seconds are the virtual clock's; -1.0: not yet."""

    request: TracedRequest
    number: int
    plan: Plan | None = None
    source: Node | None = None
    target: Node | None = None
    sent_s: float = -1.0  # to the nodes that have it now
    ready_s: float = -1.0  # when its first leg has fetched its blocks
    first_token_s: float = -1.0
    finished_s: float = -1.0
    hit_blocks: int = 0  # of its first attempt's first leg
    computed_tokens: int = 0
    prefilled_by: str = ""
    rejected: str = ""
    cost_s: float = 0.0  # of its prefill, as predicted
    num_retries: int = 0
    num_done: int = 0  # output tokens
    attempt: int = 0  # events of an older one are void
    is_first: bool = False  # its first leg is not over
    held_blocks: int = 0  # on the node that decodes
    cached_before: int = 0  # tokens that its first leg found
    computing_s: float = -1.0  # when its first leg began to compute
    to_compute: int = 0  # tokens of the prompt
    uncached: int = 0  # of them when its first leg began
    cached_tokens: int = 0  # in front of the next token to compute
    failed: set[str] = field(default_factory=set)  # nodes that broke it off
    num_ends: int = 0  # 1 in the end

    @property
    def full_blocks(self) -> tuple[int, ...]:
        """Only full blocks are shared; the last, partly filled one is computed where it is needed."""
        return self.request.blocks[: self.request.input_tokens // BLOCK_TOKENS]

    @property
    def num_tokens(self) -> int:
        """The prompt, and the output before a failover."""
        return self.request.input_tokens + self.num_done

    @property
    def num_left(self) -> int:
        return self.request.output_tokens - self.num_done

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        return (self.finished_s - self.first_token_s) / max(1, self.request.output_tokens - 1)


Rank = Callable[[Job, float], float]  # the least goes first; the moment is passed in


def first_come(job: Job, _now_s: float) -> float:
    return job.sent_s


def shortest_first(job: Job, now_s: float) -> float:
    """The engine's order, by predicted seconds and with ageing."""
    left_s = job.cost_s * (job.to_compute / job.uncached if job.uncached else 1.0)
    return rank(left_s, now_s - job.sent_s)


QUEUES: dict[str, Rank] = {"shortest": shortest_first, "fcfs": first_come}


class Node:
    """`chunk_tokens`: per step, including decoded ones; 0: a whole prompt at a time. Its name begins with its role."""

    def __init__(self, node_id: str, machine: Machine, arena: Arena, chunk_tokens: int, order: Rank) -> None:
        self.node_id, self.machine, self.arena = node_id, machine, arena
        self.role = node_id.split("-")[0]
        self.publishes = self.role != "decode"  # what it computed of prompts
        self.slow = self.link_slow = 1.0  # faults: it, or its link, takes so many times as long
        self.version = 0  # events of an older one are void
        self.num_legs = 0  # that it has, or will have: second legs count from the beginning
        self.used_blocks = 0
        self.num_running = 0
        self.chunks: list[tuple[Job, int]] = []  # of the step that runs, where it has any
        self.queue: list[Job] = []
        self.begun: list[Job] = []  # their blocks are here or on their way
        self._chunk_tokens, self._order = chunk_tokens, order
        self._batched = 0  # of the running, those that the step that runs has in it
        self._cached_tokens = 0.0  # of the running
        self._steps = 0.0  # made since the beginning
        self._now_s = 0.0
        self._ends: list[tuple[float, int, Job]] = []  # by the number of the step after which a request is done

    @property
    def cached_tokens(self) -> float:
        return self._cached_tokens

    def free_blocks(self) -> int:
        return self.machine.kv_blocks - self.used_blocks

    # The batch.

    def join(self, job: Job, now_s: float) -> None:
        """Adds a request that has its first token; the next step makes its second."""
        self.advance(now_s)
        self.num_running += 1
        self._cached_tokens += job.num_tokens
        steps = self._steps + max(1, job.num_left) + (1.0 if self.chunks else 0.0)  # not in the step that runs
        heapq.heappush(self._ends, (steps, job.number, job))

    def leave(self) -> list[Job]:
        """Removes and returns the requests that are done by now."""
        left = []
        while self._ends and self._ends[0][0] <= self._steps + _ALMOST:
            _, _, job = heapq.heappop(self._ends)
            self._drop(job, job.num_left)
            left.append(job)
        return left

    def abort(self, job: Job) -> int:
        """Removes a request, wherever it is; returns how many tokens it has decoded here."""
        for jobs in (self.queue, self.begun):
            if job in jobs:
                jobs.remove(job)
                self.chunks = [(other, count) for other, count in self.chunks if other is not job]
                return 0
        for index, (end, _, other) in enumerate(self._ends):
            if other is job:
                num_made = min(job.num_left, max(0, math.floor(job.num_left - (end - self._steps) + _ALMOST)))
                self._ends.pop(index)
                heapq.heapify(self._ends)
                self._drop(job, num_made)
                return num_made
        return 0

    def _drop(self, job: Job, num_made: int) -> None:
        self.num_running -= 1
        self._cached_tokens -= job.num_tokens + num_made
        if not self.num_running:
            self._cached_tokens = 0.0

    def step_s(self) -> float:
        """Seconds of a step that only decodes."""
        return self.slow * self.machine.step_s(self.num_running, self._cached_tokens)

    def next_end_s(self) -> float | None:
        """When the next request is done, if nothing changes."""
        if not self._ends:
            return None
        steps = max(0.0, self._ends[0][0] - self._steps)
        growth_s = self.slow * self.machine.kv_token_s * self.num_running  # each step is longer by it
        return self._now_s + steps * self.step_s() + growth_s * steps * (steps - 1) / 2

    def advance(self, now_s: float) -> None:
        """Makes the steps up to now, while they have no chunks."""
        if self.num_running and not self.chunks and now_s > self._now_s:
            growth_s = self.slow * self.machine.kv_token_s * self.num_running
            base_s, time_s = self.step_s() - growth_s / 2, now_s - self._now_s
            steps = 2 * time_s / (base_s + math.sqrt(base_s * base_s + 2 * growth_s * time_s))
            self._steps += steps
            self._cached_tokens += steps * self.num_running
        self._now_s = now_s

    # First legs.

    def begin(self, now_s: float, start: Callable[[Job], None]) -> float | None:
        """Fills a step with chunks, and returns when it will end; None if no first leg can continue now.

        `start` looks for a request's blocks and says when they are here.
        """
        room = max(1, self._chunk_tokens - self.num_running)
        self.chunks = []
        while room > 0:
            job = self._next(len(self.chunks), now_s, start)
            if job is None or job.ready_s > now_s:
                break
            if job.computing_s < 0.0:
                job.computing_s = now_s
            count = min(room, job.to_compute) if self._chunk_tokens else job.to_compute
            self.chunks.append((job, count))
            room -= count
            if count < job.to_compute:
                break
        if not self.chunks:
            return None
        self._batched = self.num_running
        pairs = sum(count * (job.cached_tokens + count / 2) for job, count in self.chunks)
        num_tokens = self.num_running + sum(count for _, count in self.chunks)
        return now_s + self.slow * self.machine.step_s(num_tokens, self._cached_tokens, pairs)

    def wakes_s(self) -> float | None:
        """When the next request is done, or the next first leg's blocks are here."""
        times = [end_s for end_s in (self.next_end_s(),) if end_s is not None]
        return min([*times, *(job.ready_s for job in self.begun)], default=None)

    def end_step(self, now_s: float) -> list[Job]:
        """Ends the step with chunks; returns the requests whose prompts are now computed."""
        self._now_s = now_s
        self._steps += 1.0
        self._cached_tokens += self._batched
        done = []
        for job, count in self.chunks:
            job.to_compute -= count
            job.cached_tokens += count
            if not job.to_compute:
                self.begun.remove(job)
                done.append(job)
        self.chunks = []
        return done

    def _next(self, index: int, now_s: float, start: Callable[[Job], None]) -> Job | None:
        """The first leg at `index`, in the order in which legs began; begins another one if there are fewer."""
        best = 0
        if self.queue and self._order is not first_come:
            best = min(range(len(self.queue)), key=lambda at: self._order(self.queue[at], now_s))
        if index < len(self.begun):
            job = self.begun[index]
            # As in the engine, a shorter prompt goes before one that was begun, between two chunks of it.
            if not (self._chunk_tokens and self.queue) or self._order is first_come:
                return job
            if self._order(job, now_s) <= self._order(self.queue[best], now_s):
                return job
        elif not self.queue:
            return None
        job = self.queue.pop(best)
        start(job)
        self.begun.insert(index, job)
        return job
