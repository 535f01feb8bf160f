"""Simulated clusters: everything ends once and the books balance, whatever fails; and equal seeds give equal bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from loadtest.machines import MACHINES
from loadtest.sim_config import SimConfig
from loadtest.sim_faults import BadFault, Fault
from loadtest.sim_nodes import Job
from loadtest.sim_report import figures
from loadtest.simulator import Simulator
from loadtest.trace import TracedRequest, TraceShape, make_trace

MACHINE = MACHINES["8xA100"]
SMALL = SimConfig(MACHINE, prefill=3, decode=2, arena_blocks=600)
REQUESTS = make_trace(250, random.Random(0), TraceShape(requests_per_s=1.6))


def run(config: SimConfig, requests: Sequence[TracedRequest] = REQUESTS) -> tuple[Simulator, list[Job]]:
    """Runs it and checks what always holds."""
    simulator = Simulator(config)
    jobs = simulator.run(requests)
    assert [job.num_ends for job in jobs] == [1] * len(requests)
    for job in jobs:
        if not job.rejected:
            assert job.request.arrival_s < job.first_token_s <= job.finished_s
            assert job.num_done == job.request.output_tokens
            assert 0 <= job.hit_blocks <= len(job.full_blocks) and job.computed_tokens > 0
    for node in simulator.nodes.values():
        assert node.num_legs == node.used_blocks == node.num_running == 0, node.node_id
        assert not node.queue and not node.begun and not node.chunks
        assert len(node.arena) <= config.arena_blocks
    arenas = {node.arena for node in simulator.nodes.values()}
    assert simulator.directory.num_entries() == sum(len(arena) for arena in arenas)
    return simulator, jobs


@pytest.mark.parametrize(
    "policy", ["random", "round_robin", "least_loaded", "cache_aware", "kv_cost", "local", "predict"]
)
def test_every_policy_ends_every_request(policy: str) -> None:
    _, jobs = run(replace(SMALL, policy=policy))
    assert not any(job.rejected or job.num_retries for job in jobs)


def test_a_request_alone_takes_what_the_formulas_say() -> None:
    _, (job,) = run(SMALL, [TracedRequest(1.0, 2000, 11, (1, 2, 3, 4))])
    assert job.ttft_s == pytest.approx(MACHINE.prefill.seconds(2000, 0))
    steps_s = sum(MACHINE.step_s(1, 2001 + step) for step in range(10))
    assert job.finished_s - job.first_token_s == pytest.approx(steps_s, rel=1e-6)


def test_nodes_of_one_host_share_an_arena_that_outlives_them() -> None:
    config = replace(SMALL, prefill=0, decode=2, is_one_host=True, faults=(Fault("kill", "decode-0", 50.0),))
    turns = [TracedRequest(at_s, 1100, 2, (1, 2, 3)) for at_s in (0.0, 30.0, 60.0)]
    simulator, jobs = run(config, turns)
    assert [job.hit_blocks for job in jobs] == [0, 2, 2]
    assert list(simulator.nodes) == ["decode-1"] and len(simulator.nodes["decode-1"].arena) == 2


@pytest.mark.parametrize("seed", [7, 13, 21, 58])
def test_a_request_that_waited_is_sent_once_where_others_end_with_it(seed: int) -> None:
    """To send it makes a node go on whose own request ends then, too, which calls those who wait once more."""
    rng, machine = random.Random(seed), replace(MACHINE, kv_blocks=12)
    times_s = sorted(rng.choice((0.0, 0.0, 5.0)) for _ in range(24))
    turns = [TracedRequest(at_s, 2000, 10, tuple(range(4 * n, 4 * n + 4))) for n, at_s in enumerate(times_s)]
    config = SimConfig(machine, 0, 0, 4, "least_loaded", 600, queue="shortest", seed=seed)
    run(config, turns)


def test_a_second_turn_hits_full_blocks_alone() -> None:
    first, second = TracedRequest(0.0, 1200, 2, (1, 2, 3)), TracedRequest(60.0, 2000, 2, (1, 2, 4, 5))
    _, jobs = run(SMALL, [first, second])
    assert [job.hit_blocks for job in jobs] == [0, 2]
    assert jobs[1].ttft_s == pytest.approx(MACHINE.prefill.seconds(2000 - 1024, 1024))


def test_the_same_prompt_again_computes_at_least_a_token() -> None:
    request = TracedRequest(0.0, 1024, 2, (1, 2))
    _, jobs = run(SMALL, [request, replace(request, arrival_s=60.0)])
    assert (jobs[1].hit_blocks, jobs[1].computed_tokens - jobs[0].computed_tokens) == (2, 1 - 1024)


@pytest.mark.parametrize(
    "faults",
    [
        "kill:prefill-0@40",
        "kill:decode-1@40",
        "kill:prefill-0@40 kill:prefill-1@41 join:prefill@70",
        "drain:prefill-2@30 drain:decode-0@60",
        "slow:prefill-1*5@20-100 link:prefill-0*50@10-120",
        "slow:decode-0*4@20-100 kill:decode-1@60 join:decode@90",
        "join:prefill@30 kill:prefill-3@90 drain:prefill-0@95",
        "kill:prefill-0@50 kill:prefill-1@50 kill:prefill-2@50",  # decode nodes play both roles
        "kill:decode-0@50 kill:decode-1@50",  # and prefill nodes
    ],
)
def test_no_fault_loses_a_request(faults: str) -> None:
    config = replace(SMALL, faults=tuple(map(Fault.parse, faults.split())))
    simulator, jobs = run(config)
    assert not any(job.rejected for job in jobs)
    gone = {fault.subject for fault in config.faults if fault.kind in ("kill", "drain")}
    assert not gone & set(simulator.nodes)
    if "kill" not in faults:
        assert not any(job.num_retries for job in jobs)


@pytest.mark.parametrize("seed", range(4))
def test_no_storm_of_faults_loses_a_request(seed: int) -> None:
    rng, faults = random.Random(seed), [Fault("join", "prefill", 1.0), Fault("join", "decode", 1.0)]
    for kind, node_id in (("kill", "prefill-0"), ("kill", "decode-1"), ("drain", "prefill-1"), ("drain", "decode-0")):
        faults.append(Fault(kind, node_id, rng.uniform(2.0, 120.0)))
    faults += [Fault("slow", "prefill-3", rng.uniform(2, 50), 3.0, 80.0), Fault("link", "prefill-2", 5.0, 9.0)]
    run(replace(SMALL, faults=tuple(faults), seed=seed, queue="shortest", chunk_tokens=256))


def test_a_dead_node_takes_nothing_along() -> None:
    faults = (Fault("kill", "decode-0", 5.0), Fault("join", "decode", 8.0))
    _, (job,) = run(replace(SMALL, prefill=1, decode=1, faults=faults), [TracedRequest(0.0, 1000, 400, (1, 2))])
    assert job.num_retries == 1
    assert job.first_token_s < 5.0 < job.finished_s  # its first token was out, and stays so
    num_made = job.computed_tokens - 1000 - (1000 - 512)  # the prompt's full block was still in the arena
    assert num_made == pytest.approx(5.0 / MACHINE.step_s(1, 1000), abs=5)


def test_with_nobody_left_requests_are_rejected_and_not_forgotten() -> None:
    faults = tuple(Fault("kill", node_id, 60.0) for node_id in ("prefill-0", "decode-0"))
    _, jobs = run(replace(SMALL, prefill=1, decode=1, faults=faults))
    assert {job.rejected for job in jobs if job.request.arrival_s > 60.0} == {"NO_NODE"}
    assert any(not job.rejected for job in jobs)


def test_a_slow_node_is_learned_and_shunned() -> None:
    slow = replace(SMALL, faults=(Fault("slow", "prefill-0", 0.0, 6.0),))
    shares = []
    for policy in ("predict", "random"):
        _, jobs = run(replace(slow, policy=policy))
        shares.append(sum(job.prefilled_by == "prefill-0" for job in jobs) / len(jobs))
    assert shares[0] < 0.75 * shares[1]


def test_a_fault_at_nobody_is_an_error() -> None:
    with pytest.raises(BadFault, match="no node 'prefill-9'"):
        run(replace(SMALL, faults=(Fault.parse("kill:prefill-9@1"),)))


@pytest.mark.parametrize(
    "text",
    ["", "kill", "kill:a", "kill:a@", "burn:a@1", "kill:a*2@1", "slow:a@1", "slow:a*0@1", "slow:a*2@9-3", "drain:a@1-2",
     "join:prefill-1@3", "kill:a@1e9", "slow:a*nan@1"],
)  # fmt: skip
def test_a_fault_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadFault, match="fault"):
        Fault.parse(text)


def test_a_fault_is_read() -> None:
    assert Fault.parse("slow:decode-0*2.5@300-900") == Fault("slow", "decode-0", 300.0, 2.5, 900.0)
    assert Fault.parse("kill:prefill-3@600") == Fault("kill", "prefill-3", 600.0)


def test_decode_nodes_hold_no_more_than_they_can() -> None:
    """Requests wait for room, or go to another node, and each waits in its turn."""
    machine = replace(MACHINE, kv_blocks=60)
    requests = [replace(request, arrival_s=request.arrival_s / 3) for request in REQUESTS if len(request.blocks) < 50]
    config = replace(SMALL, machine=machine)
    simulator = Simulator(config)
    most = 0

    def watch() -> None:
        nonlocal most
        most = max([most, *(node.used_blocks for node in simulator.nodes.values() if node.role == "decode")])
        if simulator.now_s < 200:
            simulator._at(simulator.now_s + 0.5, watch)

    simulator._at(0.0, watch)
    jobs = simulator.run(requests)
    assert 40 < most <= 60 and all(job.num_ends == 1 and not job.rejected for job in jobs)
    free = figures(Simulator(replace(config, machine=MACHINE)).run(requests))
    assert figures(jobs)["ttft_s"]["mean"] > free["ttft_s"]["mean"]


def test_what_no_node_can_hold_is_rejected() -> None:
    config = replace(SMALL, machine=replace(MACHINE, kv_blocks=3))
    _, jobs = run(config, [TracedRequest(0.0, 2000, 2, (1, 2, 3, 4)), TracedRequest(0.0, 500, 2, (1,))])
    assert [job.rejected for job in jobs] == ["TOO_LONG", ""]


def test_what_would_come_too_late_is_rejected_and_counted() -> None:
    fast = [replace(request, arrival_s=request.arrival_s / 4) for request in REQUESTS]
    for policy in ("predict", "conductor"):
        _, jobs = run(replace(SMALL, policy=policy, ttft_limit_s=5.0), fast)
        found = figures(jobs, ttft_slo_s=5.0)
        assert 0 < found["rejected"]["TTFT"] == len(fast) - found["completed"]
        assert found["ttft_s"]["p99"] < 5.5  # what was admitted came about when it was said to: small arenas forget
        assert found["attained"] > 0.5


def test_tokens_that_would_come_too_slowly_are_rejected() -> None:
    _, jobs = run(replace(SMALL, tpot_limit_s=0.030))
    assert {job.rejected for job in jobs} == {"TPOT"}  # a step takes 35 ms


def test_colocated_nodes_do_both_legs() -> None:
    config = replace(SMALL, prefill=0, decode=0, both=5, chunk_tokens=512)
    _, jobs = run(config)
    apart = figures(run(SMALL)[1])
    together = figures(jobs)
    assert together["tpot_s"]["p90"] > 1.2 * apart["tpot_s"]["p90"]  # prompts ride in the steps
    run(replace(config, faults=(Fault("kill", "both-1", 50.0), Fault("drain", "both-2", 60.0))))


def test_equal_seeds_give_equal_runs() -> None:
    config = replace(SMALL, faults=(Fault("kill", "prefill-0", 40.0), Fault("slow", "decode-0", 10.0, 2.0)))
    runs = [figures(run(replace(config, seed=seed))[1]) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
