"""What a router shows Prometheus: vLLM's names, values that add up, and no series that clients can make."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import eventually
from http_support import post, talking
from router_fakes import BLOCK, FakeCluster, FakeNode
from scraping import scrape

from batonpb import common_pb2, inference_pb2
from router.histogram import Histogram
from router.recent import MAX_SAMPLES, NUM_BINS, Ended, Recent, quantile
from router.spans import spans

# Those that vLLM's Grafana dashboards ask for and that a router can know, its prefix replaced by ours.
OF_VLLM = """
e2e_request_latency_seconds prompt_tokens_total generation_tokens_total inter_token_latency_seconds
time_to_first_token_seconds request_prompt_tokens request_generation_tokens request_success_total
request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds request_inference_time_seconds
request_time_per_output_token_seconds request_params_max_tokens prefix_cache_queries_total prefix_cache_hits_total
""".split()


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    async with talking(redis_url, metrics=True) as cluster:
        for node in cluster.nodes.values():
            node.queue_s, node.fetch_s = 0.003, 0.003  # all of the wait; a leg here may take less than a millisecond
        cluster.nodes["prefill0"].hits = (BLOCK, 2 * BLOCK)
        yield cluster


async def complete(cluster: FakeCluster, **body: object) -> int:
    status, _, _ = await post(f"{cluster.http_url}/v1/completions", {"prompt": "x" * 200, "max_tokens": 8} | body)
    return status


async def test_what_vllms_panels_ask_for_is_there_and_adds_up(cluster: FakeCluster) -> None:
    for _ in range(3):
        assert await complete(cluster) == 200
    assert await complete(cluster, temperature=99) == 400
    page = await scrape(cluster.metrics_address)
    names = {key[0] for key in page}
    assert all(f"baton_{name}" in names or f"baton_{name}_bucket" in names for name in OF_VLLM)
    assert page["baton_request_success_total", "length", "pocket"] == 3
    assert page["baton_request_failures_total", "invalid", "pocket"] == 1
    assert page["baton_prompt_tokens_total", "pocket"] == page["baton_prefix_cache_queries_total", "pocket"] == 603
    assert page["baton_generation_tokens_total", "pocket"] == 24
    assert page["baton_prefix_cache_hits_total", "pocket", "local"] == 3 * BLOCK
    assert page["baton_prefix_cache_hits_total", "pocket", "store"] == 6 * BLOCK
    assert page["baton_inter_token_latency_seconds_count", "pocket"] == 3 * 7
    for name in ("time_to_first_token", "e2e_request_latency", "request_fetch_time", "request_handoff_time"):
        assert page[f"baton_{name}_seconds_count", "pocket"] == 3
    assert 0.0 < page["baton_request_fetch_time_seconds_sum", "pocket"] <= 3 * 0.003 + 1e-9
    total, decode = (
        page[f"baton_{name}_seconds_sum", "pocket"] for name in ("e2e_request_latency", "request_decode_time")
    )
    assert total == pytest.approx(decode + page["baton_time_to_first_token_seconds_sum", "pocket"])
    assert page["baton_router_nodes", "decode", "up"] == page["baton_router_nodes", "prefill", "up"] == 1
    assert page["baton_router_nodes", "both", "up"] == page["baton_router_nodes", "decode", "down"] == 0
    assert page["baton_router_actual_seconds_total", "ttft"] > 0.0
    assert page["baton_router_requests_in_flight", "pocket"] == 0


async def test_who_asks_more_than_is_allowed_is_no_failure_of_the_router(redis_url: str, tmp_path: Path) -> None:
    tenants, digest = tmp_path / "tenants.toml", hashlib.sha256(b"a key").hexdigest()
    tenants.write_text(f'[[tenant]]\nname = "search"\nkey_sha256 = "{digest}"\nrequests_per_minute = 1\n')
    async with talking(redis_url, metrics=True, tenants_file=str(tenants)) as cluster:
        body, headers = {"prompt": "x", "max_tokens": 1}, {"Authorization": "Bearer a key"}
        asked = [(await post(f"{cluster.http_url}/v1/completions", body, headers))[0] for _ in range(3)]
        page = await scrape(cluster.metrics_address)
    assert asked == [200, 429, 429]
    assert page["baton_request_failures_total", "limited", "pocket"] == 2
    assert page["baton_request_failures_total", "internal", "pocket"] == 0


async def test_who_leaves_is_an_abort_and_nothing_stays_in_flight(cluster: FakeCluster) -> None:
    cluster.nodes["decode0"].step_s = 0.05
    call = cluster.stub.Generate(
        inference_pb2.GenerateRequest(
            text="x" * 200, sampling=common_pb2.SamplingParams(max_tokens=500, ignore_eos=True)
        )
    )
    await call.read()
    assert (await scrape(cluster.metrics_address))["baton_router_requests_in_flight", "pocket"] == 1
    call.cancel()

    async def gone() -> bool:
        page = await scrape(cluster.metrics_address)
        return (
            page["baton_request_success_total", "abort", "pocket"] == 1
            and page["baton_router_requests_in_flight", "pocket"] == 0
        )

    await eventually(gone, what="the abort is counted")


async def test_a_leg_that_fails_is_a_migration(cluster: FakeCluster) -> None:
    await cluster.add("decode1")
    broken: list[str] = []

    def break_once(node: FakeNode) -> None:
        if not broken:
            broken.append(node.node_id)
            node.wire.cut()

    for name in ("decode0", "decode1"):
        cluster.nodes[name].faults["token 2"] = lambda node=cluster.nodes[name]: break_once(node)
    await eventually(lambda: len(cluster.router.frontend._registry.nodes) == 3, what="the router knows all")
    assert await complete(cluster) == 200 and broken
    page = await scrape(cluster.metrics_address)
    assert page["baton_request_migrations_total", "pocket"] == 1
    assert page["baton_request_success_total", "length", "pocket"] == 1


async def test_no_series_is_made_by_what_clients_send(redis_url: str, tmp_path: Path) -> None:
    """Odd ids, models, tenants, priorities, options, statuses: as many series after 150 calls as before."""
    async with talking(redis_url, metrics=True) as cluster:
        await complete(cluster)
        before = set(await scrape(cluster.metrics_address))
        rng = random.Random(7)

        async def odd(number: int) -> None:
            noise = "".join(rng.choice('abc{}"\\\n=,é') for _ in range(12))
            body = {
                "prompt": noise or "x",
                "max_tokens": rng.choice((1, 2, 5, -1, 10**9)),
                "model": rng.choice(("pocket", f"model-{number}")),
                "user": f"user-{number}-{noise}",
                "n": rng.choice((1, 2)),
                "temperature": rng.choice((0.0, 1.0, 99.0)),
            }
            headers = {"X-Request-Id": f"id-{number}", "Authorization": f"Bearer key-{number}"}
            await post(f"{cluster.http_url}/v1/completions?tag={number}", body, headers)

        for start in range(0, 150, 25):
            await asyncio.gather(*(odd(start + number) for number in range(25)))
        after = set(await scrape(cluster.metrics_address))
        assert after == before
        assert len(after) < 600, "all of a router's series"


# --- the books, by themselves ---


def test_a_histogram_counts_at_or_below_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    histogram.observe(2.0, 3)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 6), ("+Inf", 7)] and histogram.total == 18.0


def timeline(**fields: float | str | int) -> inference_pb2.Timeline:
    stamps = {"planned_s": 1, "admitted_s": 2, "prefill_start_s": 2, "first_token_s": 6, "finished_s": 10}
    nodes = {"prefill_node": "p", "decode_node": "d"}
    return inference_pb2.Timeline(**(stamps | nodes | {"second_token_s": 8} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            timeline(queue_s=1, fetch_s=2, transfer_s=1),
            "route 0-1 admit 1-2 queue 2-3 fetch 3-5 prefill 5-6 transfer 6-7 decode_wait 7-8 decode 8-10",
        ),
        (timeline(prefill_node="", queue_s=1), "route 0-1 admit 1-2 queue 2-3 prefill 3-6 decode 6-10"),
        (timeline(queue_s=99, fetch_s=99, transfer_s=99), "route 0-1 admit 1-2 queue 2-6 transfer 6-8 decode 8-10"),
        (timeline(second_token_s=-1), "route 0-1 admit 1-2 prefill 2-6 decode 6-10"),
        (timeline(planned_s=-1), "route 0-10"),
        (timeline(admitted_s=-1, prefill_start_s=-1, first_token_s=-1, second_token_s=-1), "route 0-1"),
    ],
)
def test_a_timeline_in_legs(given: inference_pb2.Timeline, expected: str) -> None:
    """What nodes tell is cut to what was seen: no leg is longer than the whole."""
    found = " ".join(f"{span.name} {span.start_s:g}-{span.end_s:g}" for span in spans(given))
    assert found == expected


def test_what_is_kept_of_the_last_minutes_is_bounded() -> None:
    recent = Recent()
    usage = inference_pb2.Usage(prompt_tokens=4, cached_tokens=1, output_tokens=3)
    for number in range(2000):
        recent.note(Ended(f"r{number}", number / 2, "stop", usage, timeline(tpot_s=0.5)))
    assert len(recent.bins) == NUM_BINS and recent.bins[-1].count == 4
    assert [one.index for one in recent.since(recent.bins[-1].index * 2.0 + 100)][-1] == recent.bins[-1].index
    assert not recent.since(1e6)
    for _ in range(500):
        recent.note(Ended("r", 0.0, "stop", usage, timeline(first_token_s=7)))
    newest = recent.bins[-1]
    assert newest.count == 504 and len(newest.ttft_s) == MAX_SAMPLES, "a clock that was set back adds to the newest"
    assert quantile(newest.ttft_s, 0.5) == 7 and quantile([], 0.5) is None
