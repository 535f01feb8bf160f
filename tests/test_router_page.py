"""The live page: what /state says, who may see it, and what a real browser makes of it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from browser import browsing, chromium
from conftest import eventually
from http_support import get, post, talking
from router_fakes import CLUSTER, FakeCluster, set_health

from kvstore.directory import ArenaRecord, Directory

LEGS = {"route", "admit", "queue", "fetch", "prefill", "transfer", "decode_wait", "decode"}
SECRET = "a word that nobody but the model is to read"
STORE = {"id": "55555555", "host": "host-0", "used_slots": 75, "num_slots": 100, "bytes": 102400, "draining": False}
TENANTS = f'[[tenant]]\nname = "search"\nkey_sha256 = "{"ab" * 32}"\n'


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    async with talking(redis_url, metrics=True) as cluster:
        for node in cluster.nodes.values():
            node.queue_s, node.fetch_s, node.step_s = 0.005, 0.003, 0.01
        cluster.nodes["prefill0"].hits = (16, 32)
        cluster.nodes["prefill0"].faults["prefill"] = lambda: asyncio.sleep(0.02)
        yield cluster


async def talk(cluster: FakeCluster, count: int) -> None:
    for number in range(count):
        body = {"prompt": f"{SECRET} {number} " + "x" * 100, "max_tokens": 5 + number}
        status, _, _ = await post(f"{cluster.http_url}/v1/completions", body, {"X-Request-Id": f"<b>r{number}</b>"})
        assert status == 200


async def test_state_has_nodes_stores_and_the_last_answers_and_no_text(cluster: FakeCluster, redis_url: str) -> None:
    directory = Directory(redis_url, CLUSTER)
    place = {"address": "tcp://127.0.0.1:1", "host": "host-0"}
    await directory.heartbeat_arena(
        ArenaRecord(arena_id="5" * 32, slot_bytes=1024, num_slots=100, free_slots=25, **place), 30.0
    )
    await talk(cluster, 3)
    _, headers, state = await get(f"{cluster.http_url}/state")
    assert headers["Cache-Control"] == "no-store"
    assert state["model"] == "pocket" and state["totals"]["finished"] == 3
    assert [(node["id"], node["role"], node["state"]) for node in state["nodes"]] == [
        ("decode0", "decode", "up"),
        ("prefill0", "prefill", "up"),
    ]
    assert state["stores"] == [STORE]
    newest = state["answers"][0]
    assert newest["id"] == "<b>r2</b>" and newest["output_tokens"] == 7 and newest["reason"] == "length"
    assert (newest["local_hit_tokens"], newest["store_hit_tokens"]) == (16, 32)
    assert (newest["prefill_node"], newest["decode_node"]) == ("prefill0", "decode0")
    legs = [leg for leg, _, _ in newest["legs"]]
    assert set(legs) <= LEGS and {"queue", "fetch", "prefill", "decode"} <= set(legs)
    ends = [0.0, *(end for _, _, end in newest["legs"])]
    assert [begin for _, begin, _ in newest["legs"]] == pytest.approx(ends[:-1], abs=1e-3), "no gap, no overlap"
    assert ends[-1] == pytest.approx(newest["total_s"], abs=1e-3)
    assert sum(point["count"] for point in state["series"]["points"]) == 3
    assert SECRET not in json.dumps(state)
    await directory.close()


async def test_a_node_that_drains_and_one_that_is_down(cluster: FakeCluster) -> None:
    await cluster.nodes["prefill0"].beat(draining=True)
    await set_health(cluster.nodes["decode0"], is_well=False)
    cluster.nodes["decode0"].faults["admit"] = lambda: asyncio.sleep(30)  # slow enough to be asked how it is
    asking = asyncio.create_task(cluster.ask("hello", max_tokens=2))

    async def states() -> bool:
        _, _, state = await get(f"{cluster.http_url}/state")
        return {node["id"]: node["state"] for node in state["nodes"]} == {"prefill0": "draining", "decode0": "down"}

    await eventually(states, what="both are shown")
    asking.cancel()


async def test_the_page_is_closed_where_there_are_tenants(redis_url: str, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(TENANTS)
    for status_page, expected in (("auto", 404), ("on", 200)):
        async with talking(redis_url, tenants_file=str(tenants), status_page=status_page) as cluster:
            for path in ("/", "/state", "/page.css", "/page.js"):
                assert (await get(f"{cluster.http_url}{path}"))[0] == expected


async def test_the_page_can_be_left_out(redis_url: str) -> None:
    async with talking(redis_url, status_page="off") as cluster:
        assert (await get(f"{cluster.http_url}/"))[0] == 404
        assert (await get(f"{cluster.http_url}/health"))[0] == 200


async def test_files_come_with_a_policy_that_lets_nothing_else_in(cluster: FakeCluster) -> None:
    async with aiohttp.ClientSession() as session:
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            async with session.get(f"{cluster.http_url}{path}") as answer:
                text = await answer.text()
                assert answer.status == 200 and answer.content_type == kind
                assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
                assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
        async with session.post(f"{cluster.http_url}/state") as answer:
            assert answer.status == 405


# --- in a browser ---

needs_browser = pytest.mark.skipif(
    chromium() is None, reason="no Chromium on the PATH nor in BATON_CHROMIUM (Debian: chromium-headless-shell)"
)
CONTRAST = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => rgb(text).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (rgb(c)[3] !== 0) return c; } return "rgb(255,255,255)"; };
  return Math.min(...[...document.querySelectorAll("h1,h2,h3,p,th,td,dt,dd,figcaption,li")]
    .filter((e) => e.textContent.trim()).map((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05); })); })()"""
UNLABELLED = """[...document.querySelectorAll("svg[role=img], meter, section, .wide")]
  .filter((e) => !e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby")).length"""


@needs_browser
async def test_a_browser_draws_it_in_light_and_dark_and_keeps_it_fresh(cluster: FakeCluster, tmp_path: Path) -> None:
    """Screenshots go to BATON_SCREENSHOTS where that is set."""
    await talk(cluster, 4)
    program = chromium()
    assert program is not None
    async with browsing(program, tmp_path / "profile") as page:
        await page.scheme("light")
        await page.open(f"{cluster.http_url}/")
        await page.until("document.querySelectorAll('#answers tbody tr .legs svg').length === 4")
        assert await page.value("document.title") == "Baton: pocket"
        assert "2 of 2 nodes up" in await page.value("document.getElementById('status').textContent")
        cells = await page.value("[...document.querySelectorAll('#nodes tbody tr')].map((row) => row.innerText)")
        assert [cell.split()[:3] for cell in cells] == [["decode0", "decode", "up"], ["prefill0", "prefill", "up"]]
        assert await page.value("document.querySelector('#answers td.id').textContent") == "<b>r3</b>", (
            "text, no markup"
        )
        assert await page.value("document.querySelectorAll('#answers td.id b').length") == 0
        label = await page.value("document.querySelector('#answers .legs svg').getAttribute('aria-label')")
        assert "prefill" in label and "decode" in label and "ms" in label
        assert await page.value(UNLABELLED) == 0
        backs = []
        for scheme in ("light", "dark"):
            await page.scheme(scheme)
            backs.append(await page.value("getComputedStyle(document.body).backgroundColor"))
            assert await page.value(CONTRAST) >= 4.5, scheme
            if folder := os.environ.get("BATON_SCREENSHOTS"):
                await page.screenshot(Path(folder) / f"page-{scheme}.png")
        assert backs[0] != backs[1]
        await talk(cluster, 2)
        await page.until("document.querySelectorAll('#answers tbody tr .legs svg').length === 6")
        assert not page.problems, page.problems
        assert all(url.startswith((cluster.http_url, "data:", "about:")) for url in page.urls)
        await cluster.router.stop()
        await page.until("document.getElementById('status').textContent.includes('does not answer')")


@needs_browser
async def test_a_narrow_screen_scrolls_tables_and_not_the_page(cluster: FakeCluster, tmp_path: Path) -> None:
    await talk(cluster, 1)
    program = chromium()
    assert program is not None
    async with browsing(program, tmp_path / "profile") as page:
        await page.open(f"{cluster.http_url}/", width=420)
        await page.until("document.querySelectorAll('#answers tbody tr .legs svg').length === 1")
        assert await page.value("document.documentElement.scrollWidth") <= 420
