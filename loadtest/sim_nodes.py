"""The simulator's nodes: a prefill queue with its arena, a decode batch. Times are passed in; nothing is random."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.eviction import Eviction
from loadtest.machines import Machine
from loadtest.trace import TracedRequest
from router.plan import Plan


@dataclass(eq=False)
class Job:
    """One request on its way through the simulated cluster. Seconds are the virtual clock's; -1.0: not yet."""

    request: TracedRequest
    number: int
    plan: Plan | None = None
    sent_s: float = -1.0
    first_token_s: float = -1.0
    finished_s: float = -1.0
    hit_blocks: int = 0
    rejected: str = ""
    cost_s: float = 0.0  # of its prefill, as predicted

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        return (self.finished_s - self.first_token_s) / max(1, self.request.output_tokens - 1)


class Directory:
    """Which arena holds which block."""

    def __init__(self) -> None:
        self._holders: dict[int, set[int]] = {}

    def add(self, block: int, arena: int) -> None:
        self._holders.setdefault(block, set()).add(arena)

    def drop(self, block: int, arena: int) -> None:
        holders = self._holders.get(block)
        if holders is not None:
            holders.discard(arena)
            if not holders:
                del self._holders[block]

    def forget(self, arena: int, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.drop(block, arena)

    def runs(self, blocks: Sequence[int]) -> dict[int, int]:
        """Arena -> the leading run of `blocks` that it holds; arenas with none are left out."""
        runs: dict[int, int] = {}
        open_arenas: set[int] = set()
        for depth, block in enumerate(blocks):
            holders = self._holders.get(block)
            here = (holders if depth == 0 else open_arenas & holders) if holders else set()
            for arena in open_arenas - here:
                runs[arena] = depth
            open_arenas = here
            if not here:
                return runs
        runs.update(dict.fromkeys(open_arenas, len(blocks)))
        return runs


class Arena:
    """The shipped eviction policy over names."""

    def __init__(self, number: int, capacity: int, policy: Eviction[int], directory: Directory) -> None:
        self.number, self.capacity = number, capacity
        self._policy, self._directory = policy, directory

    def run(self, blocks: Sequence[int]) -> int:
        """The leading run that it holds; touches it."""
        count = 0
        for block in blocks:
            if block not in self._policy:
                break
            count += 1
        for block in reversed(blocks[:count]):
            self._policy.touch(block)
        return count

    def publish(self, blocks: Sequence[int]) -> None:
        """Takes in what it lacks, the tail first, so that of a chain the tail is evicted first."""
        policy, directory = self._policy, self._directory
        missing = [block for block in blocks if block not in policy]
        room = self.capacity - len(policy)
        if len(missing) > room:
            kept = set(blocks)
            for _ in range(len(missing) - room):
                victim = policy.victim(kept)
                if victim is None:
                    break
                directory.drop(victim, self.number)
        for block in reversed(missing[: self.capacity - len(policy)]):
            policy.insert(block)
            directory.add(block, self.number)

    def blocks(self) -> list[int]:
        return list(self._policy)


Rank = Callable[[Job, float], float]  # the least goes first; the moment is passed in


def first_come(job: Job, _now_s: float) -> float:
    return job.sent_s


def shortest_aged(ageing: float) -> Rank:
    """Shortest first, but each second of waiting counts as `ageing` seconds less of work: nobody starves."""

    def rank(job: Job, now_s: float) -> float:
        return job.cost_s - ageing * (now_s - job.sent_s)

    return rank


@dataclass(eq=False)
class PrefillNode:
    """One request at a time, to its end."""

    row: int
    node_id: str
    machine: Machine
    arena: Arena
    rank: Rank = first_come
    queue: list[Job] = field(default_factory=list)
    running: Job | None = None
    num_computed_tokens: int = 0
    slow: float = 1.0  # a fault: everything takes so many times as long

    def next_job(self, now_s: float) -> Job | None:
        if self.running is not None or not self.queue:
            return None
        if self.rank is first_come:
            return self.queue.pop(0)
        return self.queue.pop(min(range(len(self.queue)), key=lambda index: self.rank(self.queue[index], now_s)))


class DecodeNode:
    """A batch that makes a token for each of its requests a step. Between two changes of the batch, steps are alike."""

    def __init__(self, row: int, node_id: str, machine: Machine) -> None:
        self.row, self.node_id, self.machine = row, node_id, machine
        self.num_running = 0
        self._cached_tokens = 0.0
        self._steps = 0.0  # made since the beginning
        self._now_s = 0.0
        self._ends: list[tuple[float, int, Job]] = []  # by the number of the step after which a request is done
        self.version = 0  # events of an older one are void

    def join(self, job: Job, now_s: float) -> None:
        self.advance(now_s)
        self.num_running += 1
        self._cached_tokens += job.request.input_tokens
        heapq.heappush(self._ends, (self._steps + max(1, job.request.output_tokens - 1), job.number, job))

    def leave(self, now_s: float) -> Job:
        """The request that is done now."""
        self.advance(now_s)
        end, _, job = heapq.heappop(self._ends)
        self._steps = max(self._steps, end)
        self.num_running -= 1
        self._cached_tokens -= job.request.input_tokens + job.request.output_tokens - 1
        return job

    def next_end_s(self) -> float | None:
        """When the next request is done, if nobody joins."""
        if not self._ends:
            return None
        return self._now_s + max(0.0, self._ends[0][0] - self._steps) * self.step_s()

    def step_s(self) -> float:
        return self.machine.step_s(self.num_running, self._cached_tokens)

    def advance(self, now_s: float) -> None:
        """Makes the steps up to now."""
        if self.num_running:
            steps = (now_s - self._now_s) / self.step_s()
            self._steps += steps
            self._cached_tokens += steps * self.num_running
        self._now_s = now_s

    def jobs(self) -> list[Job]:
        return [job for _, _, job in self._ends]
