"""Simulated nodes: a batch's formula against steps made one by one, chunks, queues, arenas, the directory, machines."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.eviction import LRU
from loadtest.machines import MACHINES, BadMachine, Machine, find_machine, fitted
from loadtest.sim_cache import Arena, Directory
from loadtest.sim_nodes import Job, Node, first_come, shortest_first
from loadtest.trace import TracedRequest
from router.speeds import PrefillSpeed

MACHINE = Machine(PrefillSpeed(0.5, 0.01, 0.0), weights_s=0.5, kv_token_s=0.001, token_bytes=1, wire_bytes_per_s=1.0)


def job(number: int, input_tokens: int = 10, output_tokens: int = 5) -> Job:
    found = Job(TracedRequest(0.0, input_tokens, output_tokens, ()), number)
    found.num_done = 1  # the first leg made it
    return found


def node(chunk_tokens: int = 0, rank: object = first_come) -> Node:
    arena = Arena("a", 10, LRU(), Directory())
    return Node("decode-0", MACHINE, arena, chunk_tokens, rank)  # type: ignore[arg-type]


def begins(found: Job) -> None:
    """Nothing is cached, nothing is fetched."""
    found.to_compute, found.cached_tokens, found.ready_s = found.request.input_tokens, 0, 0.0


def by_steps(joins: list[tuple[int, Job]]) -> dict[int, float]:
    """When each request ends, step by step: `joins` are numbers of steps before which a request comes."""
    now_s, step, running, ends = 0.0, 0, dict[int, list[int]](), dict[int, float]()
    while joins or running:
        for _, new in [join for join in joins if join[0] == step]:
            running[new.number] = [new.num_tokens, new.num_left]
        joins = [join for join in joins if join[0] > step]
        now_s += MACHINE.step_s(len(running), sum(tokens for tokens, _ in running.values()))
        step += 1
        for number, state in list(running.items()):
            state[0] += 1
            state[1] -= 1
            if not state[1]:
                ends[number] = now_s
                del running[number]
    return ends


def starts(joins: list[tuple[int, Job]]) -> dict[int, float]:
    """When each of these steps begins."""
    now_s, found, tokens = 0.0, {}, dict[int, list[int]]()
    for step in range(max(at for at, _ in joins) + 1):
        found[step] = now_s
        for _, new in [join for join in joins if join[0] == step]:
            tokens[new.number] = [new.num_tokens, new.num_left]
        now_s += MACHINE.step_s(len(tokens), sum(state[0] for state in tokens.values()))
        for number, state in list(tokens.items()):
            state[0] += 1
            state[1] -= 1
            if not state[1]:
                del tokens[number]
    return found


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_goes_as_if_step_by_step(seed: int) -> None:
    rng = random.Random(seed)
    joins = [(0, job(0, 10, 30))]
    joins += [(rng.randrange(25), job(n, rng.randrange(1, 400), rng.randrange(2, 40))) for n in range(1, 9)]
    begin_s, simulated, ends = starts(joins), node(), dict[int, float]()
    coming = sorted(((begin_s[at], new) for at, new in joins), key=lambda pair: (pair[0], pair[1].number))
    while coming or simulated.num_running:
        end_s = simulated.next_end_s()
        if coming and (end_s is None or coming[0][0] < end_s - 1e-9):
            now_s, new = coming.pop(0)
            simulated.join(new, now_s)
            continue
        assert end_s is not None
        simulated.advance(end_s)
        ends.update((left.number, end_s) for left in simulated.leave())
    assert ends == pytest.approx(by_steps(joins), rel=1e-9)
    assert simulated.cached_tokens == 0.0


def test_a_request_of_two_tokens_takes_one_step() -> None:
    simulated = node()
    simulated.join(job(0, 100, 2), 3.0)
    assert simulated.next_end_s() == pytest.approx(3.0 + 0.5 + 0.5 + 0.101)


def test_aborted_requests_keep_what_they_made() -> None:
    simulated, first, second = node(), job(0, 10, 50), job(1, 10, 50)
    simulated.join(first, 0.0)
    simulated.join(second, 0.0)
    simulated.advance(10.0)
    assert simulated.abort(first) == 9  # steps of 1.022 s and a little more each
    assert simulated.abort(second) == 9 and simulated.num_running == 0 and simulated.next_end_s() is None
    assert simulated.abort(first) == 0  # idempotent


def test_a_whole_prompt_is_one_step() -> None:
    simulated, prompt = node(), job(0, 100, 5)
    simulated.queue.append(prompt)
    assert simulated.begin(2.0, begins) == pytest.approx(2.0 + 0.5 + 1.0)
    assert simulated.end_step(3.5) == [prompt] and not simulated.begun


def test_chunks_ride_in_the_steps_of_the_batch() -> None:
    simulated, prompt, running = node(chunk_tokens=64), job(0, 100, 5), job(1, 1000, 3)
    simulated.join(running, 0.0)
    simulated.queue.append(prompt)
    first_s = simulated.begin(0.0, begins)
    assert first_s == pytest.approx(0.5 + 0.64 + 1.001)  # 63 tokens and the batch's one, and its cache
    assert simulated.end_step(first_s) == []
    second_s = simulated.begin(first_s, begins)
    assert second_s == pytest.approx(first_s + 0.5 + 0.5 + 1.002)  # 37 + 1: reading the weights takes longer
    assert simulated.end_step(second_s) == [prompt]
    assert simulated.leave() == [running]  # two steps, two tokens


def test_a_chunk_is_shared_by_short_prompts() -> None:
    simulated = node(chunk_tokens=64)
    simulated.queue += [job(0, 30), job(1, 30), job(2, 30)]
    end_s = simulated.begin(0.0, begins)
    assert end_s is not None and [count for _, count in simulated.chunks] == [30, 30, 4]
    assert [done.number for done in simulated.end_step(end_s)] == [0, 1]


def test_who_joins_during_a_step_with_chunks_is_in_the_next_one() -> None:
    simulated, late = node(chunk_tokens=64), job(1, 10, 2)
    simulated.queue.append(job(0, 30))
    end_s = simulated.begin(0.0, begins)
    assert end_s is not None
    simulated.join(late, end_s / 2)
    simulated.end_step(end_s)
    assert simulated.leave() == []
    next_s = simulated.next_end_s()
    assert next_s == pytest.approx(end_s + 1.0 + 0.011)


def test_shortest_first_starves_nobody() -> None:
    long, short = job(0), job(1)
    long.cost_s, short.cost_s, long.sent_s, short.sent_s = 10.0, 1.0, 0.0, 100.0
    assert shortest_first(short, 100.0) < shortest_first(long, 100.0)
    short.sent_s = 200.0  # more than 9 s / 0.05 later
    assert shortest_first(long, 200.0) < shortest_first(short, 200.0)


def test_an_arena_evicts_tails_first_and_tells_the_directory() -> None:
    directory = Directory()
    arena, other = Arena("a", 4, LRU(), directory), Arena("b", 4, LRU(), directory)
    arena.publish([1, 2, 3])
    other.publish([1, 2])
    assert directory.runs([1, 2, 3, 4]) == {"a": 3, "b": 2}
    assert arena.run([1, 2, 9]) == 2
    arena.publish([1, 2, 4, 5])
    assert directory.runs([1, 2, 3]) == {"a": 2, "b": 2} and directory.runs([1, 2, 4, 5]) == {"a": 4, "b": 2}
    arena.publish(list(range(10, 20)))  # more than it can hold: the beginning stays
    assert directory.runs(list(range(10, 20))) == {"a": 4} and len(arena) == 4
    arena.forget()
    assert len(arena) == 0 and directory.runs([1, 2]) == {"b": 2} and directory.num_entries() == 2
    other.forget()
    assert directory.num_entries() == 0


def test_what_others_copied_goes_first() -> None:
    arena = Arena("a", 3, LRU(), Directory())
    arena.publish([1])
    arena.publish([2])
    arena.publish([3])
    arena.lend([3, 99])
    arena.publish([4])
    assert arena.run([1]) == 1 and arena.run([2]) == 1 and arena.run([3]) == 0


def test_a_prompt_alone_is_as_fast_as_its_speed_says() -> None:
    machine = MACHINES["8xA100"]
    for tokens in (1000, 8192, 100_000):
        assert machine.step_s(tokens, 0, tokens * tokens / 2) == pytest.approx(machine.prefill.seconds(tokens, 0))
    assert machine.prefill.seconds(8192, 0) == pytest.approx(0.936, rel=0.01)  # 1.14e15 FLOPs at 1.25e15 a second
    assert 2000 < machine.kv_blocks < 3000
    slow = machine.chunked(256)
    assert slow.seconds(10_000, 0) > machine.chunked(2048).seconds(10_000, 0) > machine.prefill.seconds(10_000, 0)


def test_a_machine_is_fitted_to_what_was_measured() -> None:
    truth = replace(MACHINES["8xA100"], weights_s=0.01)
    data = {
        "prefill": [[u, c, truth.prefill.seconds(u, c)] for u in (100, 2000, 30_000) for c in (0, 5000)],
        "step": [
            [n, c, truth.prefill.base_s + truth.weights_s + c * truth.kv_token_s] for n, c in ((1, 10), (9, 90_000))
        ],
        "token_bytes": truth.token_bytes,
        "wire_bytes_per_s": truth.wire_bytes_per_s,
        "kv_blocks": truth.kv_blocks,
    }
    found = fitted(data)
    assert found.prefill.seconds(5000, 700) == pytest.approx(truth.prefill.seconds(5000, 700), rel=1e-3)
    assert found.weights_s == pytest.approx(0.01, rel=1e-2)
    assert found.kv_token_s == pytest.approx(truth.kv_token_s, rel=1e-3)
    quick = fitted(data | {"step": [[1, 10, 0.008], [9, 5000, 0.008]]})  # a step that only decodes launches less
    assert quick.step_s(1, 0) == pytest.approx(0.008, rel=2e-2)
    assert quick.step_s(5000, 0, 5000 * 2500) == pytest.approx(truth.prefill.seconds(5000, 0), rel=1e-2)
    for field in data:
        with pytest.raises(BadMachine, match=field):
            fitted({name: value for name, value in data.items() if name != field})
    with pytest.raises(BadMachine, match="prefill"):
        fitted(data | {"prefill": [[1, 2]]})
    assert (found.first_s, found.handoff_s, found.chunk_tokens, found.stall_s) == (0.0, 0.0, 0, 0.0)
    for field in ("first_s", "handoff_s", "chunk_tokens", "stall_s"):
        assert getattr(fitted(data | {field: 3}), field) == 3
        for value in (-1, "1", float("nan")):
            with pytest.raises(BadMachine, match=field):
                fitted(data | {field: value})


def test_an_unknown_machine_is_refused(tmp_path: Path) -> None:
    for name in ("9xA100", str(tmp_path / "none.json")):
        with pytest.raises(BadMachine, match="machine"):
            find_machine(name)


def test_a_shorter_prompt_goes_before_one_that_was_begun_between_two_of_its_chunks() -> None:
    prefill, done = node(chunk_tokens=10, rank=shortest_first), list[int]()
    for number, tokens in enumerate((40, 5)):
        one = job(number, tokens)
        one.cost_s, one.sent_s = tokens / 100, 0.0
        prefill.queue.append(one)
        end_s = prefill.begin(0.1 * number, begins_all)
        assert end_s is not None
        done += [each.number for each in prefill.end_step(end_s)]
    assert done == [1]
    while (end_s := prefill.begin(1.0, begins_all)) is not None:
        done += [each.number for each in prefill.end_step(end_s)]
    assert done == [1, 0]


def begins_all(found: Job) -> None:
    begins(found)
    found.uncached = found.to_compute
