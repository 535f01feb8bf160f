"""A cluster under a virtual clock: the shipped policy and eviction code decide, formulas say what each leg takes.

Deterministic for a seed. A prefill node runs one prompt after the other; a decode node a batch; blocks that an arena
holds are hits, as in a live cluster, and a first leg fetches what its plan said, beside its queue.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.eviction import POLICIES as EVICTION
from loadtest.machines import Machine
from loadtest.sim_nodes import Arena, DecodeNode, Directory, Job, PrefillNode, Rank, first_come
from loadtest.trace import BLOCK_TOKENS, TracedRequest
from router.backlog import Backlog
from router.cluster import Cluster, NodeView
from router.hits import Hit
from router.plan import Plan, Policy, Rates, Reject, RequestView
from router.policy import POLICIES
from router.speeds import StepSpeed


@dataclass(frozen=True)
class SimConfig:
    """One simulated cluster."""

    machine: Machine
    prefill: int = 8
    decode: int = 8
    policy: str = "predict"
    arena_blocks: int = 5860
    eviction: str = "lru"
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None
    rank: Rank = first_come
    seed: int = 0


class Simulator:
    """Runs a trace through a cluster."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.now_s = 0.0
        self.jobs: list[Job] = []
        self.decisions = 0
        self._rng = random.Random(config.seed)
        self._policy: Policy = POLICIES[config.policy]()
        machine = config.machine
        self._rates = Rates(
            memory_bytes_per_s=1e12,
            wire_bytes_per_s=machine.wire_bytes_per_s,
            handoff_s=0.0,
            request_s=0.0,
            max_stall_s=0.0,
        )
        self._directory = Directory()
        self._cluster = Cluster(BLOCK_TOKENS, BLOCK_TOKENS * machine.token_bytes)
        self._backlogs: dict[int, Backlog] = {}
        self.prefillers: dict[str, PrefillNode] = {}
        self.decoders: dict[str, DecodeNode] = {}
        self._arena_names: list[str] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        for _ in range(config.prefill):
            self._add_prefill()
        for _ in range(config.decode):
            self._add_decode()

    def run(self, requests: Sequence[TracedRequest]) -> list[Job]:
        """All requests, each with what became of it."""
        self.jobs = [Job(request, number) for number, request in enumerate(requests)]
        for job in self.jobs:
            self._at(job.request.arrival_s, lambda job=job: self._arrive(job))  # type: ignore[misc]
        while self._events:
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        return self.jobs

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._ids), act))

    def _add_prefill(self) -> None:
        number = len(self._arena_names)
        node_id = f"prefill-{number}"
        self._arena_names.append(node_id)
        view = NodeView(node_id, "prefill", self.config.machine.prefill, StepSpeed(1.0), arena_id=node_id)
        self._cluster.put(view)
        row = self._cluster.row(node_id)
        assert row is not None
        arena = Arena(
            number, self.config.arena_blocks, EVICTION[self.config.eviction](self.config.arena_blocks), self._directory
        )
        self.prefillers[node_id] = PrefillNode(row, node_id, self.config.machine, arena, self.config.rank)
        self._backlogs[row] = Backlog()

    def _add_decode(self) -> None:
        node_id = f"decode-{len(self.decoders)}"
        machine = self.config.machine
        view = NodeView(node_id, "decode", machine.prefill, StepSpeed(machine.step_base_s, machine.step_request_s))
        self._cluster.put(view)
        row = self._cluster.row(node_id)
        assert row is not None
        self.decoders[node_id] = DecodeNode(row, node_id, machine)

    def _arrive(self, job: Job) -> None:
        request = job.request
        runs = self._directory.runs(request.blocks)
        view = RequestView(
            num_tokens=request.input_tokens,
            max_new_tokens=request.output_tokens,
            hits={self._arena_names[arena]: Hit(run) for arena, run in runs.items()},
            ttft_limit_s=self.config.ttft_limit_s,
            tpot_limit_s=self.config.tpot_limit_s,
        )
        self.decisions += 1
        plan = self._policy(view, self._cluster, self.now_s, self._rng, self._rates)
        if isinstance(plan, Reject):
            job.rejected = plan.reason.name
            return
        self._send(job, plan)

    def _send(self, job: Job, plan: Plan) -> None:
        assert plan.prefill_node is not None
        node = self.prefillers[plan.prefill_node]
        job.plan, job.sent_s, job.cost_s = plan, self.now_s, plan.prefill.compute_s
        backlog = self._backlogs[node.row]
        backlog.sent(job, self.now_s, plan.prefill.compute_s)
        self._cluster.free_at_s[node.row] = backlog.free_at_s()
        self._cluster.num_requests[node.row] += 1
        self._cluster.num_requests[self.decoders[plan.decode_node].row] += 1
        node.queue.append(job)
        self._begin(node)

    def _begin(self, node: PrefillNode) -> None:
        job = node.next_job(self.now_s)
        if job is None:
            return
        assert job.plan is not None
        node.running = job
        request = job.request
        own = node.arena.run(request.blocks)
        blocks, ready_s = own, self.now_s
        if job.plan.fetch_blocks > own:
            best = max(self._directory.runs(request.blocks).values(), default=0)
            blocks = max(own, min(job.plan.fetch_blocks, best))
            num_bytes = (blocks - own) * self._cluster.block_bytes
            ready_s = max(self.now_s, job.sent_s + num_bytes / self.config.machine.wire_bytes_per_s)
        cached = min(blocks * BLOCK_TOKENS, request.input_tokens - 1)
        job.hit_blocks = blocks
        node.num_computed_tokens += request.input_tokens - cached
        compute_s = node.machine.prefill.seconds(request.input_tokens - cached, cached) * node.slow
        self._at(ready_s + compute_s, lambda: self._prefilled(node, job))

    def _prefilled(self, node: PrefillNode, job: Job) -> None:
        assert job.plan is not None
        job.first_token_s = self.now_s
        node.running = None
        node.arena.publish(job.request.blocks)
        backlog = self._backlogs[node.row]
        backlog.computed(job, self.now_s)
        self._cluster.free_at_s[node.row] = backlog.free_at_s()
        self._cluster.num_requests[node.row] -= 1
        self._begin(node)
        decoder = self.decoders[job.plan.decode_node]
        if job.request.output_tokens <= 1:
            self._finish(decoder, job)
            return
        self._at(self.now_s + job.plan.handoff_s, lambda: self._join(decoder, job))

    def _join(self, node: DecodeNode, job: Job) -> None:
        node.join(job, self.now_s)
        self._expect(node)

    def _expect(self, node: DecodeNode) -> None:
        """Waits for the batch's next end; what was expected before is void."""
        node.version += 1
        version, end_s = node.version, node.next_end_s()
        if end_s is not None:
            self._at(end_s, lambda: self._leave(node, version))

    def _leave(self, node: DecodeNode, version: int) -> None:
        if version == node.version:
            self._finish(node, node.leave(self.now_s))
            self._expect(node)

    def _finish(self, node: DecodeNode, job: Job) -> None:
        job.finished_s = self.now_s
        self._cluster.num_requests[node.row] -= 1
