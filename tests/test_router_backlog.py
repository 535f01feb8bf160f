"""When a node is free, which blocks it is about to have, and the columns that policies look at."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from router.backlog import Backlog
from router.cluster import Cluster, NodeView
from router.speeds import PrefillSpeed, StepSpeed
from router.warming import MAX_BLOCKS, Warming

PROMPT = [BlockHash(bytes([n] * 16)) for n in range(10)]


def test_a_backlog_shrinks_by_itself_and_grows_by_what_is_sent() -> None:
    backlog = Backlog()
    assert backlog.free_at_s() <= 0.0
    backlog.reported(10.0, 2.0)
    assert backlog.free_at_s() == 12.0
    backlog.sent("a", 11.0, 3.0)
    assert backlog.free_at_s() == 15.0, "behind what is queued"
    backlog.sent("b", 20.0, 1.0)
    assert backlog.free_at_s() == 21.0, "it was idle in between"
    backlog.counted("a")
    backlog.reported(20.0, 0.5)
    assert backlog.free_at_s() == 21.5
    backlog.counted("b")
    backlog.counted("b")
    assert backlog.free_at_s() == 20.5


def test_a_leg_that_took_longer_pushes_the_others_back() -> None:
    backlog = Backlog()
    backlog.sent("a", 0.0, 1.0)
    backlog.sent("b", 0.0, 1.0)
    backlog.computed("a", 5.0)
    assert backlog.free_at_s() == 6.0
    backlog.computed("a", 9.0)
    assert backlog.free_at_s() == 6.0, "once"


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), max_size=20), st.floats(0, 10))
def test_a_backlog_is_monotone_in_what_is_sent(legs: list[tuple[float, float]], more_s: float) -> None:
    less, more = Backlog(), Backlog()
    for number, (when_s, seconds) in enumerate(sorted(legs)):
        less.sent(number, when_s, seconds)
        more.sent(number, when_s, seconds + more_s)
    assert more.free_at_s() >= less.free_at_s()


def test_blocks_that_a_node_was_sent_to_compute_are_warm_for_a_while() -> None:
    warming = Warming(ttl_s=5.0)
    warming.sent(PROMPT[:6], "n0", 0.0)
    warming.sent(PROMPT[:3], "n1", 3.0)
    assert warming.runs(PROMPT, 4.0) == {"n0": 6, "n1": 3}
    assert warming.runs(PROMPT[:1], 4.0) == {"n0": 1, "n1": 1}
    assert warming.runs(PROMPT, 5.0) == {"n1": 3}
    assert warming.runs([], 4.0) == warming.runs(PROMPT[7:], 4.0) == {}


def test_what_a_failed_leg_promised_is_forgotten() -> None:
    warming = Warming()
    for node_id in ("n0", "n1"):
        warming.sent(PROMPT, node_id, 0.0)
    warming.forget(PROMPT[4:], "n0")
    assert warming.runs(PROMPT, 1.0) == {"n0": 4, "n1": 10}
    warming.forget(PROMPT, "n0")
    warming.forget(PROMPT, "nobody")
    assert warming.runs(PROMPT, 1.0) == {"n1": 10}


def test_memory_of_warm_blocks_is_bounded() -> None:
    warming = Warming(max_blocks=8)
    warming.sent(PROMPT, "n0", 0.0)
    assert warming.runs(PROMPT, 1.0) == {"n0": 8}
    warming.sent(PROMPT[:3], "n1", 1.0)
    assert warming.runs(PROMPT, 1.0) == {"n1": 3}, "the oldest went"
    for at_s in range(100):
        warming.sent(PROMPT, "n0", float(at_s))
    assert warming.runs(PROMPT, 99.0) == {"n0": 8}


def test_memory_of_prompts_with_the_same_blocks_is_bounded_too() -> None:
    warming, prompt = Warming(), [BlockHash(b"%d" % n) for n in range(500)]
    for number in range(1000):
        warming.sent(list(prompt), "n0", 1e6 + number // 500)  # many of them at the same moment
        assert warming.runs(prompt, 1e6 + 2.0) == {"n0": 500}
    assert sum(len(hashes) for _, _, hashes in warming._sent) <= MAX_BLOCKS < 500 * 1000


# Prompts of a tree: each step from a block to the next is one of three, and a block's name is the way to it.
ways = st.lists(st.sampled_from("abc"), min_size=1, max_size=12).map("".join)
promises = st.lists(st.tuples(ways, st.sampled_from(["n0", "n1", "n2"]), st.booleans()), max_size=40)


def chain(way: str) -> list[BlockHash]:
    return [BlockHash(way[: depth + 1].encode()) for depth in range(len(way))]


@given(promises, ways)
def test_a_run_is_as_long_as_what_some_promise_shares_with_the_prompt(
    sent: list[tuple[str, str, bool]], way: str
) -> None:
    warming, expected = Warming(ttl_s=10.0), dict[str, dict[str, float]]()
    for number, (other, node_id, is_kept) in enumerate(sent):
        warming.sent(chain(other), node_id, float(number))
        expected.setdefault(node_id, {})[other] = number + 10.0
        if not is_kept:  # what others promised of the same blocks goes too, so these are not asked for here
            warming.forget(chain(other), node_id)
            expected[node_id] = {o: until_s for o, until_s in expected[node_id].items() if o[0] != other[0]}
            for one in [o for o in "abc" if o == other[0]]:
                warming.forget([h for o, n, _ in sent if n == node_id and o[0] == one for h in chain(o)], node_id)
    now_s = float(len(sent))
    runs = {
        node_id: max((common(way, other) for other, until_s in others.items() if until_s > now_s), default=0)
        for node_id, others in expected.items()
    }
    assert warming.runs(chain(way), now_s) == {node_id: run for node_id, run in runs.items() if run}


def common(one: str, other: str) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


names = st.sampled_from([f"n{n}" for n in range(30)])
steps = st.lists(st.tuples(names, st.sampled_from(["", "a0", "a1"]), st.booleans(), st.integers(0, 9)), max_size=80)


@given(steps)
def test_a_cluster_has_a_row_for_each_node_that_is_there(changes: list[tuple[str, str, bool, int]]) -> None:
    cluster, expected = Cluster(16, 64), dict[str, tuple[str, int]]()
    for name, arena_id, is_put, load in changes:
        if is_put:
            view = NodeView(name, "both", PrefillSpeed(0, 1), StepSpeed(1), arena_id=arena_id, num_requests=load)
            cluster.put(view)
            expected[name] = arena_id, load
        else:
            cluster.drop(name)
            expected.pop(name, None)
    assert len(cluster) == len(expected) == cluster.is_there.sum()
    for name, (arena_id, load) in expected.items():
        row = cluster.row(name)
        assert row is not None and cluster.node_ids[row] == name and cluster.num_requests[row] == load
        assert cluster.arena_ids[row] == arena_id
        assert [cluster.arena_number[row]] == cluster.arena_numbers([arena_id])
    used = {arena_id for arena_id, _ in expected.values() if arena_id}
    numbers = cluster.arena_numbers(["a0", "a1"])
    assert sum(number > 0 for number in numbers) == len(used) and (len(used) < 2 or numbers[0] != numbers[1])
    assert cluster.num_arena_numbers <= 3, "numbers that are free are used again"
