"""What benchmarks/serving.py makes of answers, how its clients route, and what its set-ups are told; no vLLM."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks.serving import arguments, results
from benchmarks.serving_aims import aims
from benchmarks.serving_clients import OneServer, PrefillThenDecode, RoundRobin, prefill_body
from benchmarks.serving_model import text_of, tokens_of
from benchmarks.serving_setups import Service, awake, vllm_variables
from benchmarks.serving_workloads import (
    INTERFERENCE,
    LONE,
    OPEN_LOADS,
    interference,
    interference_figures,
    lone,
    open_figures,
    run_open,
    warm_prefixes,
)
from loadtest.exchange import Ask, Clock, Message, Stream
from loadtest.record import RequestRecord
from loadtest.slo import Slo
from loadtest.workload import Dice


class FakeServer:
    """An OpenAI server whose tokens are 7, 8, 9 and so on; it keeps what it was sent."""

    def __init__(self, cached_tokens: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._cached_tokens = cached_tokens

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield "127.0.0.1:" + str(runner.addresses[0][1])
        finally:
            await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        count = body["max_tokens"]
        details = {"cached_tokens": self._cached_tokens}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count, "prompt_tokens_details": details}
        if not body["stream"]:
            return web.json_response({"usage": usage, "kv_transfer_params": {"remote_port": 5}})
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for i in range(count):
            choice = {"text": f" t{7 + i}", "finish_reason": "length" if i == count - 1 else None}
            await self._event(answer, {"choices": [choice]})
            await asyncio.sleep(0.001)
        await self._event(answer, {"choices": [], "usage": usage})
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def _event(self, answer: web.StreamResponse, event: dict[str, Any]) -> None:
        await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def ask(*tokens: int, count: int = 3) -> Ask:
    return Ask((Message("user", tokens),), count, 0)


def record(ttft_s: float) -> RequestRecord:
    return RequestRecord(0, 0.0, 0.0, ttft_s + 0.1, (ttft_s, ttft_s + 0.1), output_tokens=2, prompt_tokens=4)


def test_words_are_tokens_and_back() -> None:
    assert tokens_of(text_of((0, 49151, 12))) == (0, 49151, 12)
    assert tokens_of(" t5 t6t7") == (5, 6, 7)


async def test_an_answer_comes_back_as_tokens_and_text_goes_out_where_it_must() -> None:
    server = FakeServer(cached_tokens=2)
    async with server.serving() as address, OneServer(address, as_text=True) as client:
        await client.get_model()
        stream = Stream(Clock())
        await client.send(client.encode(ask(3, 4)), stream)
    assert server.bodies[0]["prompt"] == "t3 t4" and server.bodies[0]["model"] == "model"
    assert stream.answer(as_text=False) == (7, 8, 9) and stream.cached_tokens == 2


async def test_round_robin_takes_the_servers_in_turns() -> None:
    one, other = FakeServer(), FakeServer()
    async with one.serving() as first, other.serving() as second, RoundRobin([first, second]) as client:
        await client.get_model()
        for token in range(4):
            await client.send(client.encode(ask(token)), Stream(Clock()))
    assert [[body["prompt"] for body in server.bodies] for server in (one, other)] == [[[0], [2]], [[1], [3]]]


@pytest.mark.parametrize("asks", [True, False])
async def test_a_pair_prefills_one_token_first_and_its_hits_are_the_first_ones(asks: bool) -> None:
    prefill, decode = FakeServer(cached_tokens=5), FakeServer(cached_tokens=9)
    async with prefill.serving() as first, decode.serving() as second:
        async with PrefillThenDecode([first, second], asks) as client:
            await client.get_model()
            stream = Stream(Clock())
            await client.send(client.encode(ask(1, 2)), stream)
    [before], [after] = prefill.bodies, decode.bodies
    assert before["max_tokens"] == 1 and not before["stream"] and "stream_options" not in before
    assert before["prompt"] == after["prompt"] and after["max_tokens"] == 3
    assert ("kv_transfer_params" in before) == asks and after.get("kv_transfer_params") == (
        {"remote_port": 5} if asks else None
    )
    assert stream.cached_tokens == 5 and stream.num_tokens == 3


def test_a_prefills_body_leaves_the_request_as_it_was() -> None:
    body = {"prompt": [1], "max_tokens": 64, "stream": True, "stream_options": {}}
    assert prefill_body(body, asks=False) == {"prompt": [1], "max_tokens": 1, "stream": False}
    assert body["max_tokens"] == 64


@pytest.mark.parametrize("key", OPEN_LOADS)
def test_set_ups_get_the_same_arrivals_and_other_prompts(key: str) -> None:
    plans = [OPEN_LOADS[key].plan(2.0, 5.0, 1000, Dice(1, nonce)) for nonce in ("x", "y")]
    assert plans[0].times_s == plans[1].times_s and len(plans[0].times_s) == 10
    assert plans[0].sessions[0].turns[0].content != plans[1].sessions[0].turns[0].content


async def test_each_of_two_servers_has_seen_each_prefix() -> None:
    one, other = FakeServer(), FakeServer()
    load = OPEN_LOADS["b"]
    plan = load.plan(8.0, 5.0, 1000, Dice(0, ""))
    async with one.serving() as first, other.serving() as second, RoundRobin([first, second]) as client:
        await client.get_model()
        await warm_prefixes(client, load, plan)
    prefixes = {session.turns[0].content[:1024] for session in plan.sessions}
    assert len(prefixes) == 4
    assert all({tuple(body["prompt"]) for body in server.bodies} == prefixes for server in (one, other))


async def test_a_small_run_of_each_workload_has_its_figures() -> None:
    async with FakeServer(cached_tokens=64).serving() as address, OneServer(address) as client:
        await client.get_model()
        load, dice = OPEN_LOADS["a"], Dice(0, "")
        report = await run_open(client, load.plan(2.0, 0.5, 1000, dice), Slo(ttft_ms=1e5, tpot_ms=1e5))
        found = open_figures(load, report)
        alone = await lone(client, 1000, dice, lengths=(16,))
        gaps = await interference(client, 2.0, 1000, dice)
    assert found["goodput, req/s"] > 0 and found["failed, requests"] == 0 and 0 < found["hit rate, %"] < 100
    assert alone["TTFT of 16, ms"] > 0 and alone["failed of 16, requests"] == 0
    assert gaps["ITL p99 with prompts, ms"] > 0 and gaps["ITL p50 alone, ms"] > 0 and gaps["failed, requests"] == 0


def test_gaps_count_by_when_they_are() -> None:
    # Two streams: one token each 0.01 s until 2, each 0.03 s after that.
    times = [[i / 100 for i in range(200)] + [2 + i * 0.03 for i in range(34)]] * 2
    found = interference_figures(times, [record(0.5)], 1.0, 2.0, 3.0)
    assert found["ITL p99 alone, ms"] == pytest.approx(10)
    assert found["ITL p50 with prompts, ms"] == pytest.approx(30)
    assert found["ITL p99 with prompts / alone, x"] == pytest.approx(3)
    assert found["TTFT p50 of the prompts, ms"] == pytest.approx(500)


def test_streams_without_tokens_give_no_figures() -> None:
    assert interference_figures([[], [1.0]], [], 0.0, 1.0, 2.0) == {}


def test_rows_stand_beside_the_first_set_up() -> None:
    found = {
        ("(a)", "TTFT p50, ms"): {"baton-1p1d": [1.0, 2.0], "vllm-2cores": [4.0]},
        ("(a)", "only theirs, ms"): {"vllm-2cores": [4.0]},
        ("(b)", "goodput, req/s"): {"baton-1p1d": [1.0], "baton-2both": [3.0]},
    }
    rows, peers = results(found, ["baton-1p1d", "baton-2both", "vllm-2cores"])
    assert [(row.name, row.unit, row.values) for row in rows] == [
        ("(a): TTFT p50", "ms", (1.0, 2.0)),
        ("(b): goodput", "req/s", (1.0,)),
    ]
    assert [peer.values for peer in peers] == [[[], [3.0]], [[4.0], []]]


def test_aims_are_told_for_what_was_measured() -> None:
    found = {
        (INTERFERENCE, "ITL p99 with prompts / alone, x"): {"baton-1p1d": [1.2, 1.1, 9.0]},
        (OPEN_LOADS["a"].name, "goodput, req/s"): {"baton-1p1d": [2.0], "baton-2both": [3.0], "vllm-2cores": [1.6]},
        (LONE, "TTFT of 1024, ms"): {"baton-1p1d": [300.0], "vllm-2replicas": [290.0]},
    }
    said = list(aims(found))
    assert [line.split()[0] for line in said] == ["met", "MISSED", "met", "MISSED"]
    assert "767 ms before" in said[2] and "290 ms here" in said[3]
    assert list(aims({})) == []


def test_nobody_is_better_than_a_peer_that_only_failed_nor_than_one_at_zero_by_being_at_zero() -> None:
    goodput, ttft = (OPEN_LOADS["b"].name, "goodput, req/s"), (OPEN_LOADS["b"].name, "TTFT p50, ms")
    found = {goodput: {"baton-2both": [2.0], "vllm-2cores": [0.0]}, ttft: {"baton-2both": [9.0]}}
    assert list(aims(found)) == []
    at_zero = {"baton-2both": [0.0], "vllm-2cores": [0.0]}
    [line] = aims({goodput: at_zero, ttft: at_zero})
    assert line.startswith("MISSED")


def test_a_server_is_bound_to_its_cores_and_two_have_as_much_room_as_one(tmp_path: Path) -> None:
    one, both = vllm_variables(tmp_path, tmp_path, [0]), vllm_variables(tmp_path, tmp_path, [0, 0])
    assert 2 * int(one["VLLM_CPU_KVCACHE_SPACE"]) == int(both["VLLM_CPU_KVCACHE_SPACE"]) == 2
    assert both["VLLM_CPU_OMP_THREADS_BIND"] == ",".join([one["VLLM_CPU_OMP_THREADS_BIND"]] * 2)


@pytest.mark.parametrize(
    "argv",
    [
        ["--setups", "baton-1p1d,vllm-3cores", "--peer-folder", "/x"],
        ["--setups", "vllm-2cores", "--peer-folder", "/x"],
        ["--setups", "baton-1p1d,vllm-2cores"],
        ["--peer", "none", "--workloads", "a,f"],
        ["--peer", "none", "--rates", "d=3"],
        ["--peer", "none", "--rates", "a=none"],
    ],
)
def test_what_cannot_be_run_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(argv)
    assert "--" in capsys.readouterr().err


def test_a_quick_look_at_baton_alone() -> None:
    args = arguments(["--peer", "none", "--quick"])
    assert args.setups == ["baton-1p1d", "baton-2both"] and args.turns == 1 and args.workloads == list("abcde")
    assert arguments(["--peer", "none", "--rates", "c=9"]).rates == args.rates | {"c": 9.0}


def test_frozen_servers_run_in_their_turn_alone_and_end_all_the_same() -> None:
    sleeper = "print('READY now', flush=True); import time; time.sleep(600)"
    service = Service("sleeper", [sys.executable, "-c", sleeper], {})

    def state() -> str:
        return Path(f"/proc/{service.pid}/stat").read_text().rpartition(") ")[2][0]

    def becomes(wanted: str) -> bool:
        """Signals arrive when the system gets to it."""
        for _ in range(500):
            if (state() in "RS") == (wanted == "awake"):
                return True
            time.sleep(0.01)
        return False

    service.wait_for_line("READY ")
    service.freeze()
    assert becomes("frozen")
    with awake([service]):
        assert becomes("awake")
    assert becomes("frozen")
    service.stop()
    assert not Path(f"/proc/{service.pid}").exists()
