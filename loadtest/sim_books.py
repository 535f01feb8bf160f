"""The simulated router's view of its nodes: the shipped cluster view, backlogs and meters, updated as in a live one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from kvstore.blocks import BlockHash
from loadtest.machines import Machine
from loadtest.sim_nodes import Job, Node
from loadtest.trace import BLOCK_TOKENS
from router.backlog import Backlog
from router.cluster import Cluster, NodeView
from router.line import Demand
from router.overtaking import OvertakingShare
from router.plan import Rates
from router.speeds import PrefillMeter, PrefillSpeed, StepSpeed
from router.warming import Warming


class Books:
    """The router's side of each leg. A node that left has no row: updates for it are ignored."""

    def __init__(self, machine: Machine, learns: bool, is_shortest: bool, ttft_limit_s: float | None = None) -> None:
        self.cluster = Cluster(BLOCK_TOKENS, BLOCK_TOKENS * machine.token_bytes)
        self._rates = Rates(
            memory_bytes_per_s=1e12,  # a node's own arena costs nothing, nor do calls: only what is modelled counts
            wire_bytes_per_s=machine.wire_bytes_per_s,
            calls_s=machine.first_s,
            handoff_s=machine.handoff_s,
            request_s=0.0,
            max_stall_s=machine.stall_s,
        )
        self._machine, self._learns, self._is_shortest = machine, learns, is_shortest
        self._ttft_limit_s = ttft_limit_s
        self._demand, self._overtaking = Demand(), OvertakingShare()
        self._warming = Warming()
        self._backlogs: dict[Node, Backlog] = {}
        self._meters: dict[Node, PrefillMeter] = {}

    def add(self, node: Node, speed: PrefillSpeed) -> None:
        kv_blocks = 0 if node.role == "prefill" else self._machine.kv_blocks  # it holds a prompt only while it runs
        view = NodeView(
            node.node_id,
            node.role,
            speed,
            StepSpeed(self._machine.step_s(0, 0)),
            arena_id=node.arena.arena_id if node.publishes else "",
            free_blocks=kv_blocks,
            total_blocks=kv_blocks,
        )
        self.cluster.put(view)
        self._backlogs[node], self._meters[node] = Backlog(), PrefillMeter(speed)

    def drop(self, node: Node) -> None:
        """The node gets no more work."""
        self.cluster.drop(node.node_id)

    def warming(self, job: Job, now_s: float) -> dict[str, int]:
        """Node id -> the leading run that it was just sent to compute."""
        return self._warming.runs(_names(job), now_s)

    def rates(self, now_s: float) -> Rates:
        """What predictions assume now."""
        if not self._is_shortest:
            return self._rates
        shares = self._demand.shares(self.cluster.num_prefill, now_s)
        return replace(self._rates, shares=shares, overtaking_share=self._overtaking.share)

    def sent(self, job: Job, source: Node, target: Node, now_s: float) -> None:
        self._backlogs[source].sent(job, now_s, job.cost_s)
        self._demand.sent(job.cost_s, now_s)
        self._see_backlog(source)
        self._warming.sent(_names(job), source.node_id, now_s)
        target.used_blocks += job.held_blocks
        for node in {source: None, target: None}:
            self._count(node, 1)
        self.report(target)

    def computed(self, job: Job, source: Node, target: Node, now_s: float) -> None:
        """The first leg has ended."""
        if job.plan is not None and not job.num_retries:
            self._overtaking.note(job.plan.prefill, self._ttft_limit_s, job.ttft_s)
        self._backlogs[source].computed(job, now_s)
        self._see_backlog(source)
        if source is not target:
            self._count(source, -1)
        if self._learns:
            self._learn(job, source, now_s)

    def broken_off(self, job: Job, source: Node, target: Node) -> None:
        """The first leg will not be completed."""
        self._warming.forget(_names(job), source.node_id)
        self._backlogs[source].over(job)
        self._see_backlog(source)
        if source is not target:
            self._count(source, -1)

    def released(self, job: Job, target: Node) -> None:
        """The second leg has ended, or will not be completed."""
        target.used_blocks -= job.held_blocks
        self._count(target, -1)
        self.report(target)

    def report(self, node: Node) -> None:
        """The node's report of its batch, as a live node would send it."""
        row = self._row(node)
        if row is None or node.role == "prefill":
            return
        cluster, machine = self.cluster, self._machine
        cluster.free_blocks[row] = node.free_blocks()
        cluster.step_base_s[row] = node.slow * machine.step_s(0, 0)
        if node.num_running:
            cluster.step_request_s[row] = node.slow * machine.kv_token_s * node.cached_tokens / node.num_running

    def _learn(self, job: Job, node: Node, now_s: float) -> None:
        row, meter = self._row(node), self._meters[node]
        meter.observe(job.num_tokens - job.cached_before, job.cached_before, now_s - job.computing_s)
        if row is not None:
            speed = meter.speed()
            self.cluster.prefill_base_s[row] = speed.base_s
            self.cluster.prefill_token_s[row] = speed.token_s
            self.cluster.prefill_pair_s[row] = speed.pair_s

    def _see_backlog(self, node: Node) -> None:
        row = self._row(node)
        if row is not None:
            backlog = self._backlogs[node]
            self.cluster.set_queue(row, backlog.free_at_s(), backlog.line() if self._is_shortest else None)

    def _count(self, node: Node, change: int) -> None:
        node.num_legs += change
        row = self._row(node)
        if row is not None:
            self.cluster.num_requests[row] += change

    def _row(self, node: Node) -> int | None:
        return self.cluster.row(node.node_id)


def _names(job: Job) -> Sequence[BlockHash]:
    """A trace's block names, in place of hashes."""
    return cast(Sequence[BlockHash], job.full_blocks)
