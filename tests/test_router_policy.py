"""The routing policy: seconds that grow with load, no herd, random ties, when the first leg is skipped, lost roles."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.cluster import Cluster, NodeView
from router.costs import decode_costs, prefill_costs, survey
from router.hits import NO_HIT, Hit
from router.plan import DecodeTerms, Plan, PrefillTerms, Rates, Reason, Reject, RequestView
from router.policy import POLICIES
from router.predict import predict
from router.speeds import PrefillSpeed, StepSpeed

BLOCK, BLOCK_BYTES = 16, 1 << 20
RATES = Rates()
NOW_S = 100.0


def node(name: str, role: str = "both", **fields: object) -> NodeView:
    """One that computes 2,000 tokens a second and has nothing to do."""
    rate = float(fields.pop("prefill_tokens_per_s", 2000.0))
    step_s = float(fields.pop("step_s", 0.03))
    defaults = {
        "prefill": PrefillSpeed.of_rate(rate),
        "step": StepSpeed.of_step(step_s, 1),
        "arena_id": "a0",
        "free_at_s": NOW_S + fields.pop("queued_prefill_tokens", 0) / rate,
        "free_blocks": 10_000,
        "total_blocks": 10_000,
        "max_model_len": 1 << 20,
    }
    return NodeView(node_id=name, role=role, **(defaults | fields))


def cluster_of(nodes: Sequence[NodeView], block_bytes: int = BLOCK_BYTES) -> Cluster:
    return Cluster(BLOCK, block_bytes, nodes)


def plan(view: RequestView, nodes: Sequence[NodeView], rng: random.Random, rates: Rates = RATES) -> Plan | Reject:
    return predict(view, cluster_of(nodes), NOW_S, rng, rates)


def prefill_terms(
    view: RequestView, one: NodeView, rates: Rates = RATES, block_bytes: int = BLOCK_BYTES
) -> PrefillTerms:
    return prefill_costs(view, cluster_of([one], block_bytes), NOW_S, rates).terms(0)


def decode_terms(view: RequestView, one: NodeView, rates: Rates = RATES) -> DecodeTerms:
    return decode_costs(view, cluster_of([one]), rates).terms(0)


def handoff_s(view: RequestView, source: NodeView, target: NodeView, rates: Rates = RATES) -> float:
    seen = survey(view, cluster_of([source, target]), NOW_S, rates)
    assert not isinstance(seen, Reject)
    return seen.handoff_s(0, 1)


def with_leg(one: NodeView, compute_s: float, blocks: int) -> NodeView:
    """This node after one more leg was sent to it."""
    return replace(
        one,
        num_requests=one.num_requests + 1,
        free_at_s=max(one.free_at_s, NOW_S) + compute_s,
        free_blocks=max(0, one.free_blocks - blocks),
    )


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
    prefill_tokens_per_s=st.sampled_from([500.0, 20_000.0]),
    step_s=st.sampled_from([0.005, 0.1]),
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
        free_at_s=one.free_at_s + tokens / 500.0,
        free_blocks=max(0, one.free_blocks - blocks),
    )
    assert prefill_terms(view, busier).cost_s >= prefill_terms(view, one).cost_s
    assert decode_terms(view, busier).cost_s >= decode_terms(view, one).cost_s


@given(requests, nodes_strategy, st.integers(1, 1000))
def test_seconds_shrink_with_hits(view: RequestView, one: NodeView, blocks: int) -> None:
    """What this machine's arena holds besides is never worth less than nothing, as memory outruns computing."""
    quick = replace(one, arena_id="a0")
    warmer = replace(view, hits={**view.hits, "a0": Hit(view.hits.get("a0", NO_HIT).num_blocks + blocks)})
    before, after = (prefill_terms(each, quick, block_bytes=1024) for each in (view, warmer))
    assert after.ttft_s <= before.ttft_s + 1e-9
    assert after.compute_s > 0, "one token is always computed"


@given(requests, clusters, st.integers())
def test_a_plan_keeps_its_promises(view: RequestView, cluster: list[NodeView], seed: int) -> None:
    chosen = plan(view, cluster, random.Random(seed), RATES)
    living = {one.node_id: one for one in cluster if one.node_id not in view.failed}
    if not isinstance(chosen, Plan):
        assert (chosen.reason is Reason.NO_NODE) == (not living)
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
        replace(one, node_id=one.node_id + "-busy", free_at_s=one.free_at_s + 10**5, num_requests=10**6)
        for one in cluster
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
        cluster[first] = with_leg(cluster[first], chosen.prefill.compute_s, chosen.blocks)
        if first != chosen.decode_node:
            cluster[chosen.decode_node] = with_leg(cluster[chosen.decode_node], 0.0, chosen.blocks)
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
        free_at_s = NOW_S + self.queued_tokens / 2000.0
        return replace(self.view, num_requests=len(self.ends_s), free_at_s=free_at_s)


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
    """Four nodes with caches and load; then a fifth joins that has neither."""
    cluster = {f"n{n}": Served(node(f"n{n}", arena_id=f"a{n}")) for n in range(4)}
    held = {chat: {f"a{chat % 4}": Hit(100)} for chat in range(NUM_CHATS)}
    serve(cluster, 100, held, seed)
    cluster["new"] = Served(node("new", arena_id="a-new"))
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


def test_the_store_decides_how_far_a_handoff_is() -> None:
    view = request(1600)
    near = handoff_s(view, node("p0"), node("d0"))
    slow_wire = Rates(wire_bytes_per_s=1e7)
    far = handoff_s(view, node("p0"), node("d0", arena_id="a1"), slow_wire)
    unpublished = handoff_s(view, node("p0", arena_id=""), node("d0"))
    assert near == pytest.approx(RATES.handoff_s), "hidden behind the prefill"
    assert far == pytest.approx(RATES.handoff_s + 100 * (1 << 20) / 1e7 - 0.8)
    assert unpublished == pytest.approx(RATES.handoff_s + 0.8), "computed once more"
    held = request(1600, hits={"a1": Hit(90), "a0": Hit(90)})
    far = handoff_s(held, node("p0"), node("d0", arena_id="a1"), slow_wire)
    new_s, near_s = 10 * (1 << 20) / 1e7, 90 * (1 << 20) / 4e9
    assert far == pytest.approx(RATES.handoff_s + near_s + new_s - (near_s + 0.08)), "it has ninety of them already"


DISK_S = (1 << 20) / RATES.disk_bytes_per_s  # of one block
NEAR_S, FAR_S = (1 << 20) / RATES.memory_bytes_per_s, (1 << 20) / RATES.wire_bytes_per_s


def test_what_lies_on_disk_takes_longer() -> None:
    def fetch_s(hits: dict[str, Hit]) -> float:
        slow = node("n0", prefill_tokens_per_s=100.0)  # so that it is worth while
        return prefill_terms(request(1610, hits=hits), slow).fetch_s

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
    unpublished = handoff_s(view, node("n0", arena_id=""), node("n1"), slow)
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
    terms, best = (prefill_terms(each, one, rates, block_bytes=1024) for each in (view, all_in_memory))
    assert terms.ttft_s >= best.ttft_s - 1e-9
    alone = replace(view, hits={name: hit for name, hit in view.hits.items() if name == "a1"})
    without = replace(alone, hits={name: hit.in_memory() for name, hit in alone.hits.items()})
    terms, worst = (prefill_terms(each, one, rates, block_bytes=1024) for each in (alone, without))
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
    assert plan(request(5000, no_decode=frozenset({"d0"})), nodes, rng) == Reject(Reason.BUSY)
    assert plan(request(5000, no_prefill=frozenset({"p0"})), nodes, rng) == Reject(Reason.BUSY)
    assert pair(choose(request(16, no_prefill=frozenset({"p0"})), nodes)) == (None, "d0")


def test_no_node() -> None:
    assert plan(request(), [], random.Random(0)) == Reject(Reason.NO_NODE)
    assert plan(request(failed=frozenset({"n0"})), [node("n0")], random.Random(0)) == Reject(Reason.NO_NODE)


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


def test_what_a_node_is_about_to_have_draws_its_siblings() -> None:
    """A prompt of one second was sent to p1 0.3 s ago; its sibling has a tail of its own of 0.1 s."""
    nodes = [node("p0", "prefill"), node("p1", "prefill", queued_prefill_tokens=1400), node("d0", "decode")]
    sibling = request(2200)
    assert choose(sibling, nodes).prefill_node == "p0"
    warm = choose(replace(sibling, warming={"p1": 125, "gone": 125}), nodes)
    assert warm.prefill_node == "p1" and warm.prefill_tokens == 200
    assert warm.predicted_ttft_s == pytest.approx(0.8)


def test_limits_are_kept_or_the_request_is_rejected() -> None:
    nodes = [node("p0", "prefill", queued_prefill_tokens=2000), node("d0", "decode"), node("d1", "decode", step_s=0.2)]
    assert pair(choose(request(2000, ttft_limit_s=2.1, tpot_limit_s=0.05), nodes)) == ("p0", "d0")
    late = plan(request(2000, ttft_limit_s=1.5), nodes, random.Random(0))
    assert isinstance(late, Reject) and late.reason is Reason.TTFT and late.best is not None
    assert late.best.predicted_ttft_s == pytest.approx(2.0) and late.retry_after_s >= 0.5
    assert "predicted TTFT 2.000 s" in str(late)
    slow = plan(request(2000, tpot_limit_s=0.01), nodes, random.Random(0))
    assert isinstance(slow, Reject) and slow.reason is Reason.TPOT and slow.best is not None
    assert slow.best.predicted_tpot_s == pytest.approx(0.03 + RATES.handoff_s / 31), "and its share of the hand-off"


def test_nobody_is_refused_by_a_guess() -> None:
    """Else a cluster whose requests all have limits would never be measured, nor one that was slow for a while."""
    guessed = [node("p0", "prefill", is_known=False), node("d0", "decode", is_known=False)]
    tight = request(2000, ttft_limit_s=0.1, tpot_limit_s=0.001)
    assert pair(choose(tight, guessed)) == ("p0", "d0")
    assert isinstance(plan(tight, [node("p0", "prefill"), node("d0", "decode")], random.Random(0)), Reject)
    newcomer = node("p1", "prefill", is_known=False, queued_prefill_tokens=200)
    assert choose(request(2000, ttft_limit_s=0.1), [node("p0", "prefill"), newcomer, guessed[1]]).prefill_node == "p1"


def test_legs_that_still_prefill_count_for_their_decode_node() -> None:
    """Their requests are there when this one's prefill ends."""
    crowd = node("d0", "decode", num_requests=30)
    assert isinstance(plan(request(2000, tpot_limit_s=0.05), [node("p0", "prefill"), crowd], random.Random(0)), Reject)
    assert choose(request(2000, tpot_limit_s=0.05), [node("p0", "prefill"), crowd, node("d1", "decode")])


def test_a_limit_that_only_a_dearer_node_keeps_is_kept() -> None:
    """Many fast nodes that are nearly full are the cheaper ones by their pressure; all of them break the limit."""
    many = [node(f"d{n}", "decode", step_s=0.03) for n in range(8)]
    quick = node("quick", "decode", step_s=0.02, free_blocks=200)
    nodes = [node("p0", "prefill"), *many, quick]
    assert choose(request(2000), nodes).decode_node != "quick"
    assert choose(request(2000, tpot_limit_s=0.025), nodes).decode_node == "quick"


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(view=requests, nodes=clusters, seed=st.integers())
def test_every_policy_keeps_to_the_living(name: str, view: RequestView, nodes: list[NodeView], seed: int) -> None:
    chosen = POLICIES[name]()(view, cluster_of(nodes), NOW_S, random.Random(seed), RATES)
    if isinstance(chosen, Plan):
        living = {one.node_id for one in nodes} - view.failed
        assert chosen.decode_node in living - view.no_decode
        assert chosen.prefill_node is None or chosen.prefill_node in living - view.no_prefill
        assert chosen.prefill_node is not None or name == "predict" or chosen.decode_node not in view.no_prefill


def test_two_routers_do_not_herd() -> None:
    """Each sees its own legs at once, and the other's with the next heartbeat only: a second later."""
    truth = {f"p{n}": node(f"p{n}", "prefill", arena_id=f"a{n}") for n in range(8)} | {"d0": node("d0", "decode")}
    views = [dict(truth), dict(truth)]
    rng, used = random.Random(3), Counter[str]()
    for number in range(400):
        if number % 20 == 0:
            views = [dict(truth), dict(truth)]
        mine = views[number % 2]
        chosen = choose(request(1000), list(mine.values()), rng.randrange(1 << 30))
        assert chosen.prefill_node is not None
        used[chosen.prefill_node] += 1
        for cluster in (truth, mine):
            cluster[chosen.prefill_node] = with_leg(cluster[chosen.prefill_node], chosen.prefill.compute_s, 0)
    assert len(used) == 8 and max(used.values()) < 1.3 * 50 and min(used.values()) > 0.7 * 50, used
