"""The routing policy: seconds that grow with load, no herd, random ties, when the first leg is skipped, lost roles."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.hits import NO_HIT, Hit
from router.policy import NodeView, Plan, Rates, Reject, RequestView, decode_terms, handoff_s, plan, prefill_terms

BLOCK = 16
RATES = Rates()


def node(name: str, role: str = "both", **fields: object) -> NodeView:
    defaults = {
        "block_size": BLOCK,
        "block_bytes": 1 << 20,
        "max_model_len": 1 << 20,
        "arena_id": "a0",
        "free_blocks": 10_000,
        "total_blocks": 10_000,
        "prefill_tokens_per_s": 2000.0,
        "step_s": 0.03,
    }
    return NodeView(node_id=name, role=role, **(defaults | fields))


def request(num_tokens: int = 1000, max_new_tokens: int = 100, **fields: object) -> RequestView:
    return RequestView(num_tokens=num_tokens, max_new_tokens=max_new_tokens, **fields)


def choose(view: RequestView, nodes: list[NodeView], seed: int = 0, rates: Rates = RATES) -> Plan:
    chosen = plan(view, nodes, random.Random(seed), rates)
    assert isinstance(chosen, Plan), chosen
    return chosen


def pair(chosen: Plan) -> tuple[str | None, str]:
    return chosen.prefill_node, chosen.decode_node


nodes_strategy = st.builds(
    node,
    st.sampled_from(["n0", "n1", "n2", "n3", "n4", "n5"]),
    role=st.sampled_from(["prefill", "decode", "both"]),
    arena_id=st.sampled_from(["", "a0", "a1"]),
    num_requests=st.integers(0, 64),
    queued_prefill_tokens=st.integers(0, 100_000),
    free_blocks=st.integers(0, 1000),
    total_blocks=st.sampled_from([0, 1000]),
    prefill_tokens_per_s=st.sampled_from([0.0, 500.0, 20_000.0]),
    step_s=st.sampled_from([0.0, 0.005, 0.1]),
)
clusters = st.lists(nodes_strategy, max_size=6, unique_by=lambda view: view.node_id)
hits_strategy = st.integers(0, 2000).flatmap(lambda n: st.builds(Hit, st.just(n), st.integers(0, n)))
requests = st.builds(
    request,
    num_tokens=st.integers(1, 20_000),
    max_new_tokens=st.integers(1, 1000),
    hits=st.dictionaries(st.sampled_from(["a0", "a1", "gone"]), hits_strategy),
    failed=st.frozensets(st.sampled_from(["n0", "n1"])),
    no_prefill=st.frozensets(st.sampled_from(["n2", "n3"])),
    no_decode=st.frozensets(st.sampled_from(["n3", "n4"])),
)


@given(requests, nodes_strategy, st.integers(0, 50), st.integers(0, 50_000), st.integers(0, 1000))
def test_seconds_grow_with_load(view: RequestView, one: NodeView, more: int, tokens: int, blocks: int) -> None:
    busier = replace(
        one,
        num_requests=one.num_requests + more,
        queued_prefill_tokens=one.queued_prefill_tokens + tokens,
        free_blocks=max(0, one.free_blocks - blocks),
    )
    assert prefill_terms(view, busier, RATES).cost_s >= prefill_terms(view, one, RATES).cost_s
    assert decode_terms(view, busier, RATES).cost_s >= decode_terms(view, one, RATES).cost_s


@given(requests, nodes_strategy, st.integers(1, 1000))
def test_seconds_shrink_with_hits(view: RequestView, one: NodeView, blocks: int) -> None:
    """What this machine's arena holds besides is never worth less than nothing, as memory outruns computing."""
    quick = replace(one, arena_id="a0", block_bytes=1024)
    warmer = replace(view, hits={**view.hits, "a0": Hit(view.hits.get("a0", NO_HIT).num_blocks + blocks)})
    before, after = prefill_terms(view, quick, RATES), prefill_terms(warmer, quick, RATES)
    assert after.compute_s <= before.compute_s
    assert after.compute_s > 0, "one token is always computed"


@given(requests, clusters, st.integers())
def test_a_plan_keeps_its_promises(view: RequestView, cluster: list[NodeView], seed: int) -> None:
    chosen = plan(view, cluster, random.Random(seed), RATES)
    living = {one.node_id: one for one in cluster if one.node_id not in view.failed}
    if not isinstance(chosen, Plan):
        assert (chosen is Reject.NO_NODE) == (not living)
        return
    assert chosen.decode_node in living and chosen.decode_node not in view.no_decode
    assert chosen.prefill_node is None or chosen.prefill_node in living
    assert chosen.prefill_node not in view.no_prefill and chosen.prefill_node != chosen.decode_node
    assert 1 <= chosen.prefill_tokens <= view.num_tokens
    assert chosen.cost_s >= chosen.predicted_ttft_s > 0
    if any(one.role != "prefill" for one in living.values()):
        assert living[chosen.decode_node].role != "prefill" or view.num_tokens // BLOCK + 1 > 1000
    assert plan(view, cluster, random.Random(seed), RATES) == chosen, "same snapshot, same randomness, same choice"


@given(requests, clusters, st.integers())
def test_a_much_busier_node_is_left_alone(view: RequestView, cluster: list[NodeView], seed: int) -> None:
    """A copy of a node that is minutes behind is never chosen beside the node itself."""
    twins = [
        replace(one, node_id=one.node_id + "-busy", queued_prefill_tokens=10**8, num_requests=10**6) for one in cluster
    ]
    free = replace(view, no_prefill=frozenset(), no_decode=frozenset(), failed=frozenset())
    chosen = plan(free, cluster + twins, random.Random(seed), RATES)
    if isinstance(chosen, Plan):
        assert not chosen.decode_node.endswith("-busy")
        assert chosen.prefill_node is None or not chosen.prefill_node.endswith("-busy")


def test_ties_are_broken_at_random() -> None:
    nodes = [node(f"p{n}", "prefill") for n in range(8)] + [node(f"d{n}", "decode") for n in range(8)]
    rng = random.Random(0)
    chosen = [plan(request(), nodes, rng, RATES) for _ in range(400)]
    for counts in (Counter(c.prefill_node for c in chosen), Counter(c.decode_node for c in chosen)):
        assert len(counts) == 8 and max(counts.values()) < 100, counts


@pytest.mark.parametrize("uncached_tail", [8, 200])
@pytest.mark.parametrize("roles", [("both",) * 4, ("prefill",) * 4 + ("decode",) * 4])
def test_a_shared_system_prompt_does_not_herd(roles: tuple[str, ...], uncached_tail: int) -> None:
    """100 requests at once share a long prefix that one machine's arena holds. Loads change by dispatching alone."""
    cluster = {f"{role}{n}": node(f"{role}{n}", role, arena_id=f"a{n % 4}") for n, role in enumerate(roles)}
    prefix_blocks = 2048 // BLOCK
    view = request(2048 + uncached_tail, 200, hits={"a0": Hit(prefix_blocks)})
    rng = random.Random(1)
    used: dict[str, Counter[str]] = {"prefill": Counter(), "decode": Counter()}
    for _ in range(100):
        chosen = plan(view, list(cluster.values()), rng, RATES)
        assert isinstance(chosen, Plan)
        first = chosen.prefill_node or chosen.decode_node
        used["prefill"][first] += 1
        used["decode"][chosen.decode_node] += 1
        cluster[first] = cluster[first].with_leg(chosen.prefill_tokens, chosen.blocks)
        if first != chosen.decode_node:
            cluster[chosen.decode_node] = cluster[chosen.decode_node].with_leg(0, chosen.blocks)
    for leg, counts in used.items():
        assert len(counts) >= 4, f"{leg}: {counts}"
        assert max(counts.values()) <= 50, f"{leg}: {counts}"


NUM_CHATS = 40  # whose first 100 blocks somebody holds


@dataclass
class Served:
    """A node in a simulation: what it still has to compute, and when its requests end."""

    view: NodeView
    queued_tokens: int = 0
    ends_s: list[float] = field(default_factory=list)

    def at(self, now_s: float) -> NodeView:
        """As a router sees it, a tenth of a second after the last request."""
        self.queued_tokens = max(0, self.queued_tokens - 200)
        self.ends_s = [end_s for end_s in self.ends_s if end_s > now_s]
        return replace(self.view, num_requests=len(self.ends_s), queued_prefill_tokens=self.queued_tokens)


def serve(cluster: dict[str, Served], num_requests: int, held: dict[int, dict[str, Hit]], seed: int) -> list[str]:
    """Who runs each request. One in three is cold; the others go on with a chat, then also held by who fetched it."""
    rng, chosen = random.Random(seed), list[str]()
    for number in range(num_requests):
        now_s, chat = number * 0.1, rng.randrange(NUM_CHATS * 3 // 2)
        nodes = [one.at(now_s) for one in cluster.values()]
        made = choose(request(1700, hits=held.get(chat, {})), nodes, rng.randrange(1 << 30))
        winner = cluster[made.decode_node]
        winner.queued_tokens += made.prefill_tokens
        winner.ends_s.append(now_s + 3.0)
        if chat < NUM_CHATS:
            held[chat][winner.view.arena_id] = Hit(100)
        chosen.append(made.decode_node)
    return chosen


@pytest.mark.parametrize("seed", range(3))
def test_an_empty_newcomer_gets_its_share_and_not_all(seed: int) -> None:
    """Four nodes with caches and load; then a fifth joins that has neither and was never measured."""
    cluster = {f"n{n}": Served(node(f"n{n}", arena_id=f"a{n}")) for n in range(4)}
    held = {chat: {f"a{chat % 4}": Hit(100)} for chat in range(NUM_CHATS)}
    serve(cluster, 100, held, seed)
    cluster["new"] = Served(node("new", arena_id="a-new", prefill_tokens_per_s=0.0, step_s=0.0))
    chosen = serve(cluster, 500, held, seed + 100)
    first, later = Counter(chosen[:50]), Counter(chosen[50:])
    assert 10 <= first["new"] <= 30, f"more than a fifth while it catches up, and never all: {first}"
    assert min(later.values()) > 0.7 * 90 and max(later.values()) < 1.3 * 90, later


def test_a_cold_prompt_goes_to_the_shortest_queue() -> None:
    nodes = [node("p0", "prefill", queued_prefill_tokens=4000), node("p1", "prefill"), node("d0", "decode")]
    assert pair(choose(request(4000), nodes)) == ("p1", "d0")


def test_a_warm_prompt_goes_where_its_blocks_are_until_that_queue_is_longer() -> None:
    """2,048 tokens in 128 blocks of 1 MiB: 134 ms by wire and 34 ms from memory, so the cache is worth 100 ms."""
    view = request(2100, hits={"a1": Hit(128)})

    def nodes(queued: int) -> list[NodeView]:
        warm = node("p1", "prefill", arena_id="a1", queued_prefill_tokens=queued)
        return [node("p0", "prefill", arena_id="a0"), warm, node("d0", "decode", arena_id="a2")]

    assert choose(view, nodes(0)).prefill_node == "p1"
    assert choose(view, nodes(100)).prefill_node == "p1"
    assert choose(view, nodes(400)).prefill_node == "p0"


def test_a_short_uncached_prompt_skips_the_first_leg() -> None:
    nodes = [node("p0", "prefill"), node("d0", "decode")]
    assert pair(choose(request(16), nodes)) == (None, "d0")
    assert pair(choose(request(1000), nodes)) == ("p0", "d0")
    # A long one that is cached but for its tail is short in this sense.
    assert pair(choose(request(1000, hits={"a0": Hit(62)}), nodes)) == (None, "d0")


def test_a_short_prompt_keeps_off_a_decode_node_with_a_queue() -> None:
    nodes = [node("p0", "prefill"), node("d0", "decode", num_requests=4, queued_prefill_tokens=500)]
    assert pair(choose(request(16), nodes)) == ("p0", "d0")


def test_a_node_of_both_roles_runs_both_legs_alone() -> None:
    assert pair(choose(request(5000), [node("n0"), node("n1", num_requests=8)])) == (None, "n0")


def test_a_newcomer_is_taken_to_be_as_fast_as_its_peers() -> None:
    """Else nobody would ever measure it: 5 ms a step is far from any guess."""
    old = [node("p0", "prefill", prefill_tokens_per_s=50_000.0), node("d0", "decode", step_s=0.005)]
    new = [node("p1", "prefill", prefill_tokens_per_s=0.0), node("d1", "decode", step_s=0.0)]
    chosen = [choose(request(5000), old + new, seed) for seed in range(40)]
    assert {c.prefill_node for c in chosen} == {"p0", "p1"}
    assert {c.decode_node for c in chosen} == {"d0", "d1"}


def test_a_node_that_was_slow_is_tried_again_after_a_rest() -> None:
    def used(is_rested: bool) -> set[str]:
        nodes = [node("n0", step_s=0.005), node("n1", step_s=0.05, is_rested=is_rested)]
        return {choose(request(), nodes, seed).decode_node for seed in range(40)}

    assert used(is_rested=False) == {"n0"}
    assert used(is_rested=True) == {"n0", "n1"}


def test_speeds_of_nodes_that_all_rest_are_better_than_a_guess() -> None:
    nodes = [node(f"n{n}", prefill_tokens_per_s=50_000.0, is_rested=True) for n in range(3)]
    assert choose(request(5000), nodes).predicted_ttft_s == pytest.approx(0.1)


def test_the_store_decides_how_far_a_handoff_is() -> None:
    view, prefill = request(1600), prefill_terms(request(1600), node("p0"), RATES)
    near = handoff_s(view, node("p0"), node("d0"), prefill, RATES)
    slow_wire = Rates(wire_bytes_per_s=1e7)
    far = handoff_s(view, node("p0"), node("d0", arena_id="a1"), prefill, slow_wire)
    unpublished = handoff_s(view, node("p0", arena_id=""), node("d0"), prefill, RATES)
    assert near == pytest.approx(RATES.handoff_s), "hidden behind the prefill"
    assert far == pytest.approx(RATES.handoff_s + 100 * (1 << 20) / 1e7 - 0.8)
    assert unpublished == pytest.approx(RATES.handoff_s + 0.8), "computed once more"


DISK_S = (1 << 20) / RATES.disk_bytes_per_s  # of one block
NEAR_S, FAR_S = (1 << 20) / RATES.memory_bytes_per_s, (1 << 20) / RATES.wire_bytes_per_s


def test_what_lies_on_disk_takes_longer() -> None:
    def fetch_s(hits: dict[str, Hit]) -> float:
        return prefill_terms(request(1610, hits=hits), node("n0"), RATES).fetch_s

    assert fetch_s({"a0": Hit(100)}) == pytest.approx(100 * NEAR_S)
    assert fetch_s({"a0": Hit(100, 30)}) == pytest.approx(100 * NEAR_S + 30 * DISK_S)
    assert fetch_s({"a1": Hit(100, 30)}) == pytest.approx(100 * FAR_S + 30 * DISK_S)
    assert fetch_s({"a0": Hit(60, 10), "a1": Hit(100, 30)}) == pytest.approx(60 * NEAR_S + 40 * FAR_S + 40 * DISK_S)
    assert fetch_s({"a1": Hit(100, 30), "a2": Hit(100)}) == pytest.approx(100 * FAR_S), "from whoever has it at hand"


def test_a_disk_that_is_slower_than_computing_holds_nothing() -> None:
    view, slow = request(1610, hits={"a0": Hit(100, 30)}), Rates(disk_bytes_per_s=1e6)
    terms = prefill_terms(view, node("n0"), slow)
    assert terms.fetch_s == pytest.approx(70 * NEAR_S)
    assert terms.compute_s == pytest.approx((1610 - 70 * BLOCK) / 2000.0)
    assert prefill_terms(view, node("n0", prefill_tokens_per_s=10.0), slow).compute_s == pytest.approx(10 / 10.0)
    assert choose(view, [node("n0")], rates=slow).prefill_tokens == 1610 - 70 * BLOCK
    prefill = prefill_terms(view, node("n0", arena_id=""), slow)
    unpublished = handoff_s(view, node("n0", arena_id=""), node("n1"), prefill, slow)
    assert unpublished == pytest.approx(slow.handoff_s + (1610 - 70 * BLOCK) / 2000.0)


def test_a_cache_in_memory_draws_more_than_one_on_disk() -> None:
    """Of two machines with one prefix, that with it in memory may have a queue as long as the other's disk takes."""

    def chosen(queued: int) -> str:
        at_hand = node("n1", arena_id="a1", queued_prefill_tokens=queued)
        view = request(2100, hits={"a0": Hit(128, 128), "a1": Hit(128)})
        return choose(view, [node("n0", arena_id="a0"), at_hand]).decode_node

    assert chosen(0) == "n1" and chosen(100) == "n1"  # 134 ms from disk, 50 ms in the queue
    assert chosen(400) == "n0"


@given(requests, nodes_strategy, st.sampled_from([1e6, 1e8, 1e10]))
def test_a_disk_is_never_better_than_memory_nor_worse_than_nothing(
    view: RequestView, one: NodeView, disk_bytes_per_s: float
) -> None:
    rates = Rates(disk_bytes_per_s=disk_bytes_per_s)
    all_in_memory = replace(view, hits={name: Hit(hit.num_blocks) for name, hit in view.hits.items()})
    terms, best = prefill_terms(view, one, rates), prefill_terms(all_in_memory, one, rates)
    assert terms.compute_s >= best.compute_s
    alone = replace(view, hits={name: hit for name, hit in view.hits.items() if name == "a1"})
    without = replace(alone, hits={name: hit.in_memory() for name, hit in alone.hits.items()})
    terms, worst = prefill_terms(alone, one, rates), prefill_terms(without, one, rates)
    num_tokens = alone.hits.get("a1", NO_HIT).num_blocks * one.block_size
    if num_tokens < alone.num_tokens:  # else the last token is computed all the same
        assert terms.ttft_s <= worst.ttft_s + 1e-9


def test_lost_roles_are_played_by_whoever_lives() -> None:
    long = request(5000)
    assert choose(long, [node("p0", "prefill"), node("p1", "prefill")]).decode_node in ("p0", "p1")
    assert choose(long, [node("d0", "decode"), node("d1", "decode")]).decode_node in ("d0", "d1")
    assert pair(choose(long, [node("d0", "decode")])) == (None, "d0")
    assert pair(choose(long, [node("p0", "prefill")])) == (None, "p0")
    both_fail = [node("p0", "prefill"), node("d0", "decode"), node("d1", "decode")]
    assert pair(choose(replace(long, failed=frozenset({"d0", "d1"})), both_fail)) == (None, "p0")


def test_a_role_that_is_busy_is_not_lost() -> None:
    """Overflow of decode nodes must not land on prefill nodes: the client is told to come again."""
    nodes = [node("p0", "prefill"), node("d0", "decode")]
    rng = random.Random(0)
    assert plan(request(5000, no_decode=frozenset({"d0"})), nodes, rng) is Reject.BUSY
    assert plan(request(5000, no_prefill=frozenset({"p0"})), nodes, rng) is Reject.BUSY
    assert pair(choose(request(16, no_prefill=frozenset({"p0"})), nodes)) == (None, "d0")


def test_no_node() -> None:
    assert plan(request(), [], random.Random(0)) is Reject.NO_NODE
    assert plan(request(failed=frozenset({"n0"})), [node("n0")], random.Random(0)) is Reject.NO_NODE


def test_room_comes_before_speed() -> None:
    half_full = node("d0", "decode", free_blocks=5000, step_s=0.02)
    assert choose(request(16), [half_full, node("d1", "decode")]).decode_node == "d0"
    full = replace(half_full, free_blocks=3)
    assert choose(request(16), [full, node("d1", "decode")]).decode_node == "d1"
    assert choose(request(5000), [full, node("d1", "decode"), node("p0", "prefill")]).decode_node == "d1"
    too_small = node("d2", "decode", total_blocks=10, free_blocks=10)
    assert choose(request(5000), [too_small, full, node("p0", "prefill")]).decode_node == "d0"


def test_the_explanation_is_one_line_of_seconds() -> None:
    text = choose(request(), [node("p0", "prefill"), node("d0", "decode")]).explanation
    assert "\n" not in text
    assert {"prefill=p0", "decode=d0"} <= set(text.split())
    assert all(part.count("=") == 1 for part in text.split())


def test_a_newcomer_is_taken_to_be_as_fast_as_the_others() -> None:
    measured = node("old", prefill_tokens_per_s=20_000.0, step_s=0.003)
    newcomer = node("new", prefill_tokens_per_s=0.0, step_s=0.0)
    chosen = Counter(choose(request(), [measured, newcomer], seed).decode_node for seed in range(100))
    assert min(chosen["old"], chosen["new"]) > 25
    slow = node("slow", prefill_tokens_per_s=200.0, step_s=0.3)
    assert choose(request(), [slow, newcomer, measured]).decode_node != "slow"
