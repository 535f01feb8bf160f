"""A cluster on a virtual clock: the shipped policy and eviction code decide, formulas say how long each leg takes.

Deterministic for a seed. A prefill node runs one prompt after the other, a decode node a batch; blocks that an arena
holds are hits, as in a live cluster, and a first leg fetches what its plan said, parallel to its queue.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence

from kvstore.eviction import POLICIES as EVICTION
from loadtest.sim_books import Books
from loadtest.sim_cache import Arena, Directory
from loadtest.sim_config import SimConfig
from loadtest.sim_faults import BadFault, Fault
from loadtest.sim_nodes import QUEUES, Job, Node
from loadtest.trace import BLOCK_TOKENS, MAX_TOKENS, TracedRequest
from router.hits import Hit
from router.plan import Plan, Policy, Reason, Reject, RequestView
from router.policy import POLICIES

_HITS = [Hit(run) for run in range(MAX_TOKENS // BLOCK_TOKENS + 1)]  # a thousand nodes hold the same root


class Simulator:
    """Runs a trace through a cluster. `clock` only measures how long decisions take; it has no effect on the result."""

    def __init__(self, config: SimConfig, clock: Callable[[], float] | None = None) -> None:
        self.config = config
        self.now_s = 0.0
        self.jobs: list[Job] = []
        self.decision_times_s: list[float] = []
        self.nodes: dict[str, Node] = {}  # that are there
        self.directory = Directory()
        self._clock = clock
        self._rng = random.Random(config.seed)
        self._policy: Policy = POLICIES[config.policy]()
        learns = any(fault.kind == "slow" for fault in config.faults)  # else speeds are what nodes say at once
        self._books = Books(config.machine, learns, config.queue == "shortest", config.ttft_limit_s)
        self._owners: dict[str, Node] = {}  # of arenas; also those that have left
        self._counts = {"prefill": 0, "decode": 0, "both": 0}
        self._draining: set[Node] = set()
        self._open: dict[Job, None] = {}  # sent to nodes and not done
        self._waiting: deque[Job] = deque()  # until a node has room
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        for role, count in (("prefill", config.prefill), ("decode", config.decode), ("both", config.both)):
            for _ in range(count):
                self._add(role)

    def run(self, requests: Sequence[TracedRequest]) -> list[Job]:
        """Runs all requests and returns them with their outcomes. Raises `BadFault`."""
        self.jobs = [Job(request, number) for number, request in enumerate(requests)]
        for job in self.jobs:
            self._at(job.request.arrival_s, lambda job=job: self._route(job))  # type: ignore[misc]
        for fault in self.config.faults:
            self._at(fault.at_s, lambda fault=fault: self._strike(fault))  # type: ignore[misc]
        while self._events:
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        for job in self._waiting:  # nobody is left who could ever take them
            self._reject(job, Reason.NO_NODE.name)
        self._waiting.clear()
        return self.jobs

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._ids), act))

    # The router.

    def _route(self, job: Job) -> None:
        if self._waiting or not self._try(job):
            self._waiting.append(job)

    def _try_waiting(self) -> None:
        while self._waiting:
            job = self._waiting.popleft()  # first: what is sent may end another one, whose end comes here again
            if not self._try(job):
                self._waiting.appendleft(job)
                return

    def _try(self, job: Job) -> bool:
        """Sends the request to nodes, or rejects it; False if no node has room for it now."""
        config, refused = self.config, set[str]()
        blocks = (job.num_tokens + job.num_left) // BLOCK_TOKENS + 1
        if 0 < config.machine.kv_blocks < blocks:
            self._reject(job, "TOO_LONG")
            return True
        while True:
            plan = self._decide(job, frozenset(refused))
            if isinstance(plan, Reject):
                if plan.reason in (Reason.BUSY, Reason.NO_NODE):
                    return False
                self._reject(job, plan.reason.name)
                return True
            target = self.nodes[plan.decode_node]
            if not config.machine.kv_blocks or target.free_blocks() >= blocks:
                job.held_blocks = blocks
                self._send(job, plan, target)
                return True
            refused.add(target.node_id)

    def _decide(self, job: Job, refused: frozenset[str]) -> Plan | Reject:
        limit_s = self.config.ttft_limit_s
        if limit_s is not None:
            limit_s = None if job.first_token_s >= 0.0 else limit_s - (self.now_s - job.request.arrival_s)
        hits = {arena: _HITS[run] for arena, run in self.directory.runs(job.full_blocks).items()}
        start_s = self._clock() if self._clock else 0.0
        view = RequestView(
            num_tokens=job.num_tokens,
            max_new_tokens=job.num_left,
            hits=hits,
            warming=self._books.warming(job, self.now_s),
            failed=frozenset(job.failed),
            no_decode=refused,
            ttft_limit_s=limit_s,
            tpot_limit_s=self.config.tpot_limit_s,
        )
        plan = self._policy(view, self._books.cluster, self.now_s, self._rng, self._books.rates(self.now_s))
        if self._clock:
            self.decision_times_s.append(self._clock() - start_s)
        return plan

    def _reject(self, job: Job, reason: str) -> None:
        job.rejected = reason
        job.num_ends += 1

    # A request's journey.

    def _send(self, job: Job, plan: Plan, target: Node) -> None:
        source = self.nodes[plan.prefill_node or plan.decode_node]
        job.plan, job.source, job.target = plan.bare(), source, target
        job.sent_s, job.computing_s, job.cost_s = self.now_s, -1.0, plan.prefill.compute_s
        job.is_first, job.uncached = True, 0
        self._open[job] = None
        self._books.sent(job, source, target, self.now_s)
        source.queue.append(job)
        self._go_on(source)

    def _start(self, node: Node, job: Job) -> None:
        """The first leg looks up its blocks. Those it fetches have been in flight since it was sent."""
        assert job.plan is not None
        blocks = job.full_blocks
        own = found = node.arena.run(blocks)
        job.ready_s = self.now_s
        if job.plan.fetch_blocks > own:
            runs = self.directory.runs(blocks)
            arena_id = max(runs, key=runs.__getitem__, default=node.node_id)
            found = max(own, min(job.plan.fetch_blocks, runs.get(arena_id, 0)))
            if found > own:
                owner = self._owners[arena_id]
                owner.arena.lend(blocks[own:found])
                job.ready_s = max(self.now_s, job.sent_s + self._wire_s(found - own, owner, node))
        job.cached_tokens = job.cached_before = min(found * BLOCK_TOKENS, job.num_tokens - 1)
        job.to_compute = job.uncached = job.num_tokens - job.cached_tokens
        job.computed_tokens += job.to_compute
        if not job.num_retries:
            job.hit_blocks, job.prefilled_by = found, node.node_id

    def _prefilled(self, node: Node, job: Job) -> None:
        assert job.plan is not None and job.target is not None
        target = job.target
        if job.first_token_s < 0.0:
            job.first_token_s = self.now_s + self.config.machine.first_s
        job.num_done += 1
        if node.publishes:
            node.arena.publish(job.full_blocks)
        job.is_first = False
        self._books.computed(job, node, target, self.now_s)
        self._leave_if_drained(node)
        if not job.num_left:
            self._end(job, target)
        elif target is node:
            self._join(job, job.attempt)
        else:  # blocks travel while the prompt is computed: only what takes longer counts
            late_s = self._wire_s(len(job.full_blocks), node, target) - (self.now_s - job.computing_s)
            late_s = max(0.0, late_s) + self.config.machine.handoff_s
            self._at(self.now_s + late_s, lambda attempt=job.attempt: self._join(job, attempt))  # type: ignore[misc]

    def _join(self, job: Job, attempt: int) -> None:
        if job.attempt == attempt and job.target is not None:
            job.target.join(job, self.now_s)
            self._books.report(job.target)
            self._go_on(job.target)

    def _end(self, job: Job, node: Node) -> None:
        job.finished_s = self.now_s + self.config.machine.first_s  # as the client sees it
        job.num_done = job.request.output_tokens
        job.num_ends += 1
        del self._open[job]
        self._books.released(job, node)
        self._leave_if_drained(node)
        self._try_waiting()

    def _wire_s(self, num_blocks: int, source: Node, target: Node) -> float:
        bytes_s = num_blocks * self._books.cluster.block_bytes / self.config.machine.wire_bytes_per_s
        return bytes_s * max(source.link_slow, target.link_slow)

    # A node's steps.

    def _go_on(self, node: Node) -> None:
        """Begins what the node can do now; nothing while a step with chunks runs."""
        if node.chunks or self.nodes.get(node.node_id) is not node:
            return
        node.advance(self.now_s)
        for job in node.leave():
            self._end(job, node)
        if node.chunks:  # room for somebody who waited
            return
        end_s = node.begin(self.now_s, lambda job: self._start(node, job))
        node.version += 1
        version = node.version
        if end_s is not None:
            self._at(end_s, lambda: self._step_ends(node, version))
            return
        wakes_s = node.wakes_s()
        if wakes_s is not None:
            self._at(max(self.now_s, wakes_s), lambda: self._wake(node, version))

    def _step_ends(self, node: Node, version: int) -> None:
        if version == node.version:
            for job in node.end_step(self.now_s):
                self._prefilled(node, job)
            self._go_on(node)

    def _wake(self, node: Node, version: int) -> None:
        if version == node.version:
            self._go_on(node)

    # Nodes come and go.

    def _add(self, role: str) -> None:
        config = self.config
        node_id = f"{role}-{self._counts[role]}"
        self._counts[role] += 1
        chunk_tokens = config.machine.chunk_tokens if role == "prefill" else config.chunk_tokens
        node = Node(node_id, config.machine, self._arena(node_id), chunk_tokens, QUEUES[config.queue])
        node.publishes |= config.is_one_host
        self.nodes[node_id] = node
        self._owners[node_id] = node
        is_alone = role == "prefill"  # its prompts share their steps with nothing that decodes
        self._books.add(node, config.machine.prefill if is_alone else config.machine.chunked(chunk_tokens))

    def _arena(self, node_id: str) -> Arena:
        """The node's own arena, or its host's."""
        config = self.config
        if config.is_one_host and self._owners:
            return next(iter(self._owners.values())).arena
        return Arena(node_id, config.arena_blocks, EVICTION[config.eviction](config.arena_blocks), self.directory)

    def _forget(self, node: Node) -> None:
        """A node left, with its arena; a host's arena stays."""
        if not self.config.is_one_host:
            node.arena.forget()

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "join":
            self._add(fault.subject)
            self._try_waiting()
            return
        node = self.nodes.get(fault.subject)
        if node is None:
            raise BadFault(f"{fault.kind} at {fault.at_s:g} s: there is no node {fault.subject!r} then")
        if fault.kind == "kill":
            self._kill(node)
        elif fault.kind == "drain":
            self._draining.add(node)
            self._books.drop(node)
            self._leave_if_drained(node)
        else:
            self._slow_down(node, fault.kind, fault.factor)
            if fault.until_s is not None:
                self._at(fault.until_s, lambda: self._slow_down(node, fault.kind, 1.0))

    def _slow_down(self, node: Node, kind: str, factor: float) -> None:
        if kind == "link":
            node.link_slow = factor
            return
        node.advance(self.now_s)
        node.slow = factor
        self._books.report(node)
        self._go_on(node)  # a step that runs ends when it was to

    def _kill(self, node: Node) -> None:
        """The node dies with its arena; its requests go back to the router, with the tokens made so far."""
        lost = [job for job in self._open if job.target is node or (job.is_first and job.source is node)]
        touched = {other: None for job in lost for other in (job.source, job.target) if other is not None}
        for job in lost:
            self._take_back(job)
        del self.nodes[node.node_id]
        self._draining.discard(node)
        self._books.drop(node)
        self._forget(node)
        for job in lost:
            job.failed.add(node.node_id)
            job.num_retries += 1
            self._route(job)
        for other in touched:
            self._go_on(other)
        self._try_waiting()

    def _take_back(self, job: Job) -> None:
        source, target = job.source, job.target
        assert source is not None and target is not None
        if job.is_first:
            source.abort(job)
            self._books.broken_off(job, source, target)
        else:
            target.advance(self.now_s)
            job.num_done += target.abort(job)
        self._books.released(job, target)
        del self._open[job]
        job.attempt += 1
        job.source = job.target = None

    def _leave_if_drained(self, node: Node) -> None:
        if node in self._draining and not node.num_legs:
            self._draining.discard(node)
            del self.nodes[node.node_id]
            self._forget(node)
