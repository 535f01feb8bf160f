"""The HTTP door without a client's kindness: statuses, error shapes, ids, sizes, broken JSON, hang-ups, slowness."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from conftest import POCKET, eventually, free_port
from http_support import TALK, get, open_raw, post, talking
from router_fakes import CLUSTER, FakeCluster, letters, running
from scraping import scrape

from batonpb import inference_pb2
from router.config import RouterConfig
from router.errors import InvalidRequest, said
from router.frontend import Frontend
from router.http_body import MAX_LISTS, MAX_NAMES, MAX_OBJECTS, parse_object
from router.http_door import HttpDoor
from router.server import RouterServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
ONCE: dict[str, Any] = {"prompt": "Once", "max_tokens": 4}
MAX_BYTES = 1 << 16


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    async with talking(redis_url, max_message_bytes=MAX_BYTES, max_prompt_bytes=1 << 14, metrics=True) as cluster:
        yield cluster


def check_error(answer: Any, headers: Mapping[str, str]) -> dict[str, Any]:
    """Each error has OpenAI's four fields, and its call's id."""
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"] and headers["Content-Type"].startswith("application/json")
    assert headers["X-Request-Id"]
    error: dict[str, Any] = answer["error"]
    return error


# --- what is wrong with a request ---


WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    (CHAT, {"temperature": 2.5}, "temperature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": 1e300}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens"),
    (CHAT, {"min_tokens": 9, "max_tokens": 4}, "min_tokens"),
    (CHAT, {"max_tokens": 2**40}, "max_tokens"),
    (CHAT, {"max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"best_of": 2}, "best_of"),
    (CHAT, {"stop": ["x"] * 17}, "stop"),
    (CHAT, {"stop": ""}, "stop"),
    (CHAT, {"stop": 7}, "stop"),
    (CHAT, {"seed": 2**64}, "seed"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"7": "a lot"}}, "logit_bias"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"surprise": 1}}, "stream_options"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 20_000}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 5_000}]}, "messages"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tools": [{"type": "browser"}]}, "tools[0].type"),
    (CHAT, {"audio": {"voice": "x"}}, "audio"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (CHAT, {"functions": []}, "functions"),
    (CHAT, {"reasoning_effort": "huge"}, "reasoning_effort"),
    (CHAT, {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "reasoning_effort"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"x": "y" * (1 << 14)}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"x": "\ud800"}}, "chat_template_kwargs"),
    (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    (CHAT, {"request_id": "x" * 129}, "request_id"),
    (CHAT, {"rid": "é"}, "rid"),
    (CHAT, {"rid": ["x"]}, "rid"),
    (COMPLETIONS, {"request_id": ""}, "request_id"),
    (COMPLETIONS, {"reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"temprature": 1}, "temprature"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    (CHAT, {"ttft_slo_ms": 0}, "ttft_slo_ms"),
    (CHAT, {"priority": 101}, "priority"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, "x"]}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"prompt": [300]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 129}, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 100, "n": 2}, "prompt"),
    (COMPLETIONS, {"prompt": "\ud800"}, "prompt"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"stop_token_ids": [258]}, "stop_token_ids"),
]


async def test_a_wrong_field_is_named(cluster: FakeCluster) -> None:
    for path, change, param in WRONG:
        status, headers, answer = await post(cluster.http_url + path, (HELLO if path == CHAT else ONCE) | change)
        error = check_error(answer, headers)
        assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), (change, answer)
        assert error["message"].startswith(f"{param}: "), change
    for path, change, param in (("/detokenize", {"tokens": 7}, "tokens"), ("/tokenize", {"prompt": 7}, "prompt")):
        status, headers, answer = await post(cluster.http_url + path, change)
        assert (status, check_error(answer, headers)["param"]) == (400, param)
    assert not cluster.nodes["decode0"].seen.admits


BROKEN: list[tuple[bytes, str]] = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"[]", "object"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    (b'{"prompt": "x", "temperature": NaN}', "NaN"),
    (b'{"prompt": "x", "prompt": "y"}', "twice"),
    (b'{"prompt": "x", "stream_options": {"a": 1, "a": 2}}', "twice"),
    (b'{"prompt": ' + b"[" * 20_000, "deep"),
    (b'{"prompt": "x", "guided_json": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", ""),
    (b'{"prompt": "x", "seed": ' + b"9" * 6_000 + b"}", "digits"),
    (b'{"prompt": "x", "guided_json": {"a": 1e999}}', "guided_json"),
    (b'{"prompt": "x"} {"prompt": "y"}', "JSON"),
]


def test_what_a_small_body_may_become() -> None:
    for body, words in (
        (b"[" + b"{}," * MAX_OBJECTS + b"{}]", "objects"),
        (b"[" + b"[]," * MAX_LISTS + b"{}]", "lists"),
        (b"{" + b",".join(b'"%d": 1' % n for n in range(MAX_NAMES + 1)) + b"}", "names"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            parse_object(body)


async def test_json_that_means_nothing_or_two_things(cluster: FakeCluster) -> None:
    for body, words in BROKEN:
        status, headers, answer = await post(cluster.http_url + COMPLETIONS, body)
        if words:
            assert status == 400 and words in check_error(answer, headers)["message"], body[:80]
        else:  # deep, and within what Python reads: nothing breaks
            assert status in (200, 400), body[:80]


async def test_statuses_of_routes_and_bodies(cluster: FakeCluster) -> None:
    url = cluster.http_url
    status, headers, answer = await get(f"{url}/v1/nothing")
    assert status == 404 and check_error(answer, headers)["code"] == "unknown_url"
    status, headers, answer = await get(url + CHAT)
    assert status == 405 and headers["Allow"] == "POST" and check_error(answer, headers)
    status, headers, answer = await get(f"{url}/health", method="DELETE")
    assert status == 405 and headers["Allow"] == "GET" and check_error(answer, headers)
    assert (await get(f"{url}/v1/models/pocke%2574"))[0] == 404, "a name is decoded once"
    status, headers, answer = await post(url + CHAT, b"x" * (MAX_BYTES + 1))
    assert status == 413 and str(MAX_BYTES) in check_error(answer, headers)["message"]
    status, headers, answer = await post(url + CHAT, HELLO, {"Content-Type": "text/plain"})
    assert status == 415 and check_error(answer, headers)
    status, headers, answer = await post(url + CHAT, HELLO, {"Content-Encoding": "gzip"})
    assert status == 415 and check_error(answer, headers)
    status, headers, answer = await post(url + CHAT, HELLO | {"model": "other"})
    error = check_error(answer, headers)
    assert status == 404 and (error["param"], error["code"]) == ("model", "model_not_found")
    assert (await get(f"{url}/health", method="HEAD"))[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\x01\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["garbage", "long", "key", "headers", "two lengths", "chunk"],
)
async def test_what_is_no_http(cluster: FakeCluster, caplog: pytest.LogCaptureFixture, sent: bytes) -> None:
    caplog.set_level("DEBUG", logger="router")
    host, _, port = cluster.http_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    assert b" 400 " in head.split(b"\r\n")[0] and b"X-Request-Id" in head and b"aiohttp" not in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert "sesame" not in caplog.text and b"sesame" not in body and "Traceback" not in caplog.text
    writer.close()


async def test_what_clients_send_begins_no_line_of_the_log(
    cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="router")
    host, _, port = cluster.http_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /x%20status=200%0AERROR%20forged HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b" 404 " in await asyncio.wait_for(reader.read(), 10)
    writer.close()
    status, _, answer = await post(cluster.http_url + COMPLETIONS, ONCE | {"y\nERROR forged": 1})
    assert status == 400 and answer["error"]["param"] == "y\nERROR forged"
    lines = [record.getMessage() for record in caplog.records if "event=refused" in record.getMessage()]
    assert len(lines) == 2 and not any("\n" in line for line in lines)
    assert lines[0].startswith("event=refused path=/x%20status=200%0AERROR%20forged status=404 ")
    assert said(InvalidRequest("a\nb", "\x1b[2Jé")) == "a b:  [2Jé"


async def test_a_connection_goes_on_behind_a_body_that_nobody_read(cluster: FakeCluster) -> None:
    """A refusal by the headers may come before the body does, which is then not taken for the next request."""
    host, _, port = cluster.http_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b"GET /nothing HTTP/1.1\r\n\r\n"
    for path, media_type, status in (("/v1/nothing", "json", 404), (CHAT, "xml", 415), ("/health", "json", 405)):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/{media_type}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:5])
        assert await answered(reader) == status
        writer.write(body[5:] + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await answered(reader) == 200
    writer.close()


async def answered(reader: asyncio.StreamReader) -> int:
    """The status of the next answer on a connection, which is read to its end."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode().lower()
    [length] = [line.partition(":")[2] for line in head.splitlines() if line.startswith("content-length:")]
    await asyncio.wait_for(reader.readexactly(int(length)), 10)
    return int(head.split()[1])


async def test_a_body_without_a_length_is_bounded_too(cluster: FakeCluster) -> None:
    host, _, port = cluster.http_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    for _ in range(MAX_BYTES // 8192 + 2):
        writer.write(b"2000\r\n" + b" " * 8192 + b"\r\n")
    await writer.drain()
    assert b" 413 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


async def test_a_body_that_waits_to_be_asked_for(cluster: FakeCluster) -> None:
    """`Expect: 100-continue`: a body that is taken is asked for, one that is refused need not be sent."""
    host, _, port = cluster.http_url.removeprefix("http://").rpartition(":")
    body = json.dumps(ONCE).encode()
    for length, media_type, status in ((len(body), "json", 200), (MAX_BYTES + 1, "json", 413), (3, "xml", 415)):
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/{media_type}\r\n"
        writer.write(f"{head}Content-Length: {length}\r\nExpect: 100-Continue\r\n\r\n".encode())
        if status == 200:
            assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10) == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
        assert (await asyncio.wait_for(reader.readline(), 10)).startswith(f"HTTP/1.1 {status} ".encode())
        writer.close()


async def test_request_ids(cluster: FakeCluster) -> None:
    url, ident = cluster.http_url, "x" * 128
    status, headers, answer = await post(url + COMPLETIONS, ONCE, {"X-Request-Id": ident})
    assert status == 200 and headers["X-Request-Id"] == ident and answer["id"] == f"cmpl-{ident}"
    explained = await cluster.stub.Explain(inference_pb2.ExplainRequest(request_id=ident))
    assert explained.decisions  # one journal, whichever door
    status, headers, _ = await post(url + COMPLETIONS, {}, {"X-Request-Id": "mine"})
    assert status == 400 and headers["X-Request-Id"] == "mine"
    status, headers, answer = await post(url + COMPLETIONS, ONCE, {"X-Request-Id": "x" * 129})
    assert status == 400 and check_error(answer, headers)["param"] == "X-Request-Id"
    assert len(headers["X-Request-Id"]) == 32
    status, headers, answer = await post(url + COMPLETIONS, ONCE | {"n": 2}, {"X-Request-Id": ident})
    assert status == 200 and headers["X-Request-Id"] == ident and len(answer["choices"]) == 2
    for name in ("request_id", "rid"):  # vLLM's and SGLang's places for it, behind the header
        status, headers, answer = await post(url + COMPLETIONS, ONCE | {name: f"my {name}"})
        assert status == 200 and headers["X-Request-Id"] == f"my {name}" and answer["id"] == f"cmpl-my {name}"
        status, headers, answer = await post(url + CHAT, HELLO | {name: f"my {name}"}, {"X-Request-Id": "head"})
        assert headers["X-Request-Id"] == "head" and answer["id"] == "chatcmpl-head"
    many = {"prompt": ["a", "b"], "max_tokens": 1}
    await post(url + COMPLETIONS, many, {"X-Request-Id": ident})
    for index in (0, 1):
        ask = inference_pb2.ExplainRequest(request_id=f"{'x' * 126}-{index}")
        assert (await cluster.stub.Explain(ask)).decisions


# --- what the cluster says ---


async def test_without_nodes(redis_url: str) -> None:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.open(metrics=True)
        url = cluster.http_url
        for path in ("/v1/models", "/ready"):
            status, headers, answer = await get(url + path)
            assert status == 503 and int(headers["Retry-After"]) >= 1
            assert check_error(answer, headers)["code"] == "cluster_unavailable"
        status, headers, answer = await post(url + CHAT, HELLO | {"stream": True})
        assert status == 503 and int(headers["Retry-After"]) >= 1 and check_error(answer, headers)
        assert (await get(f"{url}/health"))[0] == 200
        await cluster.add("both0")
        await eventually(lambda: cluster.router is not None and _is_ready(url), 5, "it is ready")


async def _is_ready(url: str) -> bool:
    return (await get(f"{url}/ready"))[0] == 200


async def test_rejections_say_when_to_come_again(cluster: FakeCluster) -> None:
    url = cluster.http_url
    for body in (HELLO | {"ttft_slo_ms": 1}, HELLO | {"ttft_slo_ms": 1, "stream": True}):
        status, headers, answer = await post(url + CHAT, body)
        error = check_error(answer, headers)
        assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "would_be_late")
        assert int(headers["Retry-After"]) >= 1 and int(headers["retry-after-ms"]) >= 1


async def test_a_full_cluster(redis_url: str) -> None:
    async with talking(redis_url, node_wait_s=0.3) as cluster:
        for node in cluster.nodes.values():
            node.faults["admit"] = grpc.StatusCode.RESOURCE_EXHAUSTED
            node.faults["prefill"] = grpc.StatusCode.RESOURCE_EXHAUSTED
        status, headers, answer = await post(cluster.http_url + CHAT, HELLO)
        assert status == 429 and check_error(answer, headers)["code"] == "cluster_busy"
        assert headers["Retry-After"] == "1" and headers["retry-after-ms"] == "1000"


async def test_a_deadline(cluster: FakeCluster) -> None:
    url = cluster.http_url
    for node in cluster.nodes.values():
        node.faults["start"] = lambda: asyncio.sleep(5)
    status, headers, answer = await post(url + CHAT, HELLO, {"X-Request-Timeout-Ms": "500"})
    assert status == 504 and check_error(answer, headers)["code"] == "deadline_exceeded"
    for wrong in ("soon", "0", "-1", "9" * 5000, "0" * 10 + "1" * 400, "0" * 10 + "1" * 5000):
        status, headers, answer = await post(url + CHAT, HELLO, {"X-Request-Timeout-Ms": wrong})
        assert status == 400 and check_error(answer, headers)["param"] == "X-Request-Timeout-Ms"


async def test_a_failure_of_the_router_shows_nothing_of_its_inside(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("secret")

    monkeypatch.setattr("router.frontend.check", broken)
    status, headers, answer = await post(cluster.http_url + CHAT, HELLO)
    error = check_error(answer, headers)
    assert status == 500 and error["code"] == "internal_error" and "secret" not in json.dumps(answer)


async def test_keys(redis_url: str, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(f'[[tenant]]\nname = "ours"\nkey_sha256 = "{hashlib.sha256(b"key").hexdigest()}"\n')
    async with talking(redis_url, tenants_file=str(file)) as cluster:
        url = cluster.http_url
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "key"}):
            for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
                status, given, answer = await post(url + path, HELLO, headers)
                assert status == 401 and given["WWW-Authenticate"] == "Bearer"
                assert check_error(answer, given)["code"] == "invalid_api_key"
            assert (await get(f"{url}/v1/models", headers=headers))[0] == 401
        assert (await post(url + CHAT, HELLO, {"Authorization": "Bearer key"}))[0] == 200
        assert all(request.salt for request in cluster.nodes["decode0"].seen.admits)
        for path in ("/health", "/ready", "/version", "/openapi.json"):
            assert (await get(url + path))[0] == 200


# --- clients that go, and clients that are slow ---


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("go", ["close", "abort"])
async def test_a_client_that_hangs_up_frees_its_legs(cluster: FakeCluster, is_stream: bool, go: str) -> None:
    for node in cluster.nodes.values():
        node.step_s = 0.05
    body = HELLO | {"stream": is_stream}
    reader, writer = await open_raw(cluster, CHAT, body)
    await eventually(lambda: cluster.nodes["decode0"].seen.starts, 5, "it runs")
    if is_stream:
        await reader.readuntil(b"data: ")
    writer.close() if go == "close" else writer.transport.abort()
    await eventually(lambda: cluster.active == 0, 5, "its legs are aborted")
    assert (await post(cluster.http_url + COMPLETIONS, ONCE))[0] == 200


async def test_a_client_that_hangs_up_before_the_first_token(cluster: FakeCluster) -> None:
    cluster.nodes["decode0"].faults["start"] = lambda: asyncio.sleep(60)
    _, writer = await open_raw(cluster, CHAT, HELLO | {"stream": True})
    await eventually(lambda: cluster.nodes["decode0"].seen.starts, 5, "it runs")
    writer.close()
    await eventually(lambda: cluster.active == 0, 5, "its legs are aborted")


async def test_a_client_that_does_not_read(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router stops asking for tokens long before they are all there, and gives up after a while."""
    pulled, is_over = 0, False
    generate = Frontend.generate

    async def counted(*arguments: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        nonlocal pulled, is_over
        try:
            async with aclosing(generate(*arguments)) as responses:
                async for response in responses:
                    pulled += 1
                    yield response
        finally:
            is_over = True

    monkeypatch.setattr(Frontend, "generate", counted)
    monkeypatch.setattr(HttpDoor.__init__, "__defaults__", (None, 1.0, None))
    monkeypatch.setattr(HttpDoor, "open", _with_small_buffers(HttpDoor.open))
    async with talking(redis_url, letters) as cluster:
        body = {"prompt": list(b"Once"), "max_tokens": 4000, "logprobs": 20, "stream": True}
        _, writer = await open_raw(cluster, COMPLETIONS, body)
        writer.transport.pause_reading()
        await eventually(lambda: is_over, 10, "it was given up")
        assert 10 < pulled < 2000
        writer.close()


async def test_a_client_that_does_not_read_a_whole_answer(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(HttpDoor.__init__, "__defaults__", (None, 2.0, None))
    monkeypatch.setattr(HttpDoor, "open", _with_small_buffers(HttpDoor.open))
    monkeypatch.setattr("router.http_door.MIN_BYTES_PER_S", 1 << 30)
    caplog.set_level("INFO", logger="router")
    async with talking(redis_url, lambda *_: ord("x")) as cluster:
        cluster.nodes["decode0"].tokens_per_message = 50
        body = {"prompt": "Once", "max_tokens": 2000, "logprobs": 20}
        assert (await post(cluster.http_url + COMPLETIONS, body))[0] == 200, "who reads it has it"
        _, writer = await open_raw(cluster, COMPLETIONS, body)
        writer.transport.pause_reading()
        await eventually(lambda: "event=client_gone" in caplog.text, 20, "it was given up")
        assert "event=bad_http" not in caplog.text and "Traceback" not in caplog.text
        writer.close()


def _with_small_buffers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels buffer megabytes on a loopback connection; connections inherit the listener's buffer."""
    import router.http_door as door

    listen = door._listen

    def small(host: str, port: int) -> socket.socket:
        listener = listen(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        return listener

    async def open_small(self: HttpDoor, *arguments: Any, **options: Any) -> int:
        door._listen = small
        try:
            return int(await original(self, *arguments, **options))
        finally:
            door._listen = listen

    return open_small


# --- the door itself ---


async def test_pages_about_the_router(cluster: FakeCluster) -> None:
    url = cluster.http_url
    await post(url + COMPLETIONS, ONCE)
    status, headers, page = await get(f"{url}/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    decisions = 'baton_router_decisions_total{outcome="one_leg"} 1.0'
    assert decisions in page.splitlines()
    one = "baton_router_decisions_total", "one_leg"
    assert (await scrape(cluster.metrics_address))[one] == 1.0  # the other door shows the same books
    assert (await get(f"{url}/version"))[2]["version"]
    status, headers, models = await get(f"{url}/v1/models")
    [card] = models["data"]
    assert status == 200 and (card["id"], card["max_model_len"]) == ("pocket", 4096)
    assert "X-Request-Id" in headers and headers["Server"] == "baton"


async def test_a_router_without_metrics_or_without_http(redis_url: str) -> None:
    async with talking(redis_url, metrics=False) as cluster:
        assert (await get(f"{cluster.http_url}/metrics"))[0] == 404
    router = RouterServer(RouterConfig(str(POCKET), redis_url, cluster=CLUSTER, http=False))
    record = await router.start()
    assert record["http_address"] == ""
    await router.stop()


async def test_a_port_of_ones_own_and_a_taken_one(redis_url: str) -> None:
    port = free_port()
    router = RouterServer(RouterConfig(str(POCKET), redis_url, cluster=CLUSTER, http_port=port))
    assert (await router.start())["http_address"] == f"127.0.0.1:{port}"
    other = RouterServer(RouterConfig(str(POCKET), redis_url, cluster=CLUSTER, http_port=port))
    with pytest.raises(RuntimeError, match="cannot listen for HTTP"):
        await other.start()
    await router.stop()


async def test_stopping_waits_for_calls_then_cuts_them_off(redis_url: str) -> None:
    async with talking(redis_url, drain_s=5.0) as cluster:
        for node in cluster.nodes.values():
            node.step_s = 0.02
        asking = asyncio.create_task(post(cluster.http_url + CHAT, HELLO))
        await eventually(lambda: cluster.nodes["decode0"].seen.starts, 5, "it runs")
        async with aiohttp.ClientSession() as session:  # whose connection stays open
            async with session.get(f"{cluster.http_url}/health") as health:
                assert health.status == 200
            stopping = asyncio.create_task(cluster.router.stop())
            await asyncio.sleep(0.05)
            async with session.get(f"{cluster.http_url}/health") as health:
                assert health.status == 503 and "Retry-After" in health.headers
        await stopping
        status, _, answer = await asking
        assert status == 200 and answer["choices"][0]["message"]["content"] == TALK
    async with talking(redis_url, drain_s=0.2) as cluster:
        cluster.nodes["decode0"].faults["token 3"] = lambda: asyncio.sleep(60)
        reader, writer = await open_raw(cluster, CHAT, HELLO | {"stream": True})
        await reader.readuntil(b"data: ")
        await cluster.router.stop()
        rest = await asyncio.wait_for(reader.read(), 5)
        assert b"[DONE]" not in rest
        await eventually(lambda: cluster.active == 0, 5, "its leg is cancelled")
        writer.close()
