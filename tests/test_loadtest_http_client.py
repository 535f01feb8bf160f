"""The HTTP client against an OpenAI server over a real socket: what it sends and counts, and how it fails."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_server import OpenAiServer

from loadtest.exchange import Ask, Clock, Message, Sampling, SendError, Shot, Target, Tls, exchange
from loadtest.http_client import HttpClient, base_url_of
from loadtest.record import RequestRecord

IDS = tuple(range(40))
TEXT = " ".join(["word"] * 40)


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    thread = OpenAiServer()
    yield thread
    thread.close()


async def send(
    server: OpenAiServer, chat: bool = False, num_tokens: int = 6, leave_after: int = 0, target: Target | None = None
) -> RequestRecord:
    async with HttpClient(target or Target(server.base_url, 30.0), chat, sampling=Sampling(ignore_eos=True)) as client:
        await client.get_model()
        request = client.encode(Ask((Message("user", TEXT if chat else IDS),), num_tokens, seed=7))
        record, _ = await exchange(client, Shot(3, 0.0, request, leave_after=leave_after), Clock())
        return record


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("piece_bytes", [0, 1, 7])
async def test_a_record_says_what_came(server: OpenAiServer, chat: bool, piece_bytes: int) -> None:
    server.script.piece_bytes = piece_bytes
    server.script.newline = "\r\n" if piece_bytes else "\n"
    record = await send(server, chat)
    assert record.error == ""
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (40, 6, 20)
    assert len(record.token_times_s) == 6  # neither the role nor the finish reason is a token
    times_s = [record.sent_s, *record.token_times_s, record.finished_s]
    assert times_s == sorted(times_s)
    body = server.bodies[0]
    assert server.paths == ["/v1/chat/completions" if chat else "/v1/completions"]
    assert body["messages" if chat else "prompt"] == ([{"role": "user", "content": TEXT}] if chat else list(IDS))
    assert (body["model"], body["max_tokens"], body["seed"], body["ignore_eos"]) == ("fake", 6, 7, True)
    assert body["stream"] and body["stream_options"] == {"include_usage": True}


async def test_times_are_what_the_server_takes(server: OpenAiServer) -> None:
    """Lower bounds only: a sleep can take longer, and never less."""
    server.script.first_pause_s, server.script.pause_s = 0.1, 0.02
    record = await send(server, num_tokens=6)
    assert record.ttft_s >= 0.1
    assert record.e2e_s >= 0.1 + 5 * 0.02
    assert record.tpot_s is not None
    assert record.tpot_s == pytest.approx((record.e2e_s - record.ttft_s) / 5)
    assert len(record.itls_s) == 5
    assert sum(record.itls_s) == pytest.approx(record.token_times_s[-1] - record.token_times_s[0])


async def test_bundled_tokens_are_one_message(server: OpenAiServer) -> None:
    server.script.bundle = 4
    record = await send(server)
    assert (record.output_tokens, len(record.token_times_s)) == (6, 2)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("cut", "Client"),  # aiohttp's names begin so
        ("no-done", "without [DONE]"),
        ("no-usage", "without usage"),
        ("no-finish", "without a finish reason"),
        ("error-event", "in the stream: the node is gone"),
        ("nonsense", "the answer is broken"),
        ("bad-utf8", "not UTF-8"),
    ],
)
async def test_a_stream_that_is_not_whole_is_an_error(server: OpenAiServer, fault: str, error: str, chat: bool) -> None:
    server.script.fault = fault
    record = await send(server, chat)
    assert error in record.error
    assert not record.refused


async def test_an_answer_without_text_has_the_time_of_its_end(server: OpenAiServer) -> None:
    """All of its tokens may be special ones."""
    server.script.fault = "no-token"
    record = await send(server)
    assert (record.error, len(record.token_times_s), record.output_tokens) == ("", 1, 6)


@pytest.mark.parametrize(
    ("status", "body", "error", "refused"),
    [
        (429, '{"error": {"message": "busy"}}', "HTTP 429: busy", True),
        (400, '{"object": "error", "message": "too long"}', "HTTP 400: too long", True),
        (503, "no node", "HTTP 503: no node", False),
        (500, "x" * 100_000, "HTTP 500: " + "x" * 300, False),
    ],
)
async def test_errors_name_the_status(server: OpenAiServer, status: int, body: str, error: str, refused: bool) -> None:
    server.script.status, server.script.body = status, body
    record = await send(server)
    assert (record.error, record.refused) == (error, refused)


async def test_a_key_is_sent_and_not_repeated(server: OpenAiServer) -> None:
    server.script.status, server.script.body = 401, "no such key: my-key"
    record = await send(server, target=Target(server.base_url, 30.0, api_key="my-key"))
    assert server.keys == {"Bearer my-key"}
    assert record.error == "HTTP 401: no such key: [API key]"


async def test_a_deadline_ends_a_request(server: OpenAiServer) -> None:
    server.script.pause_s = 20.0
    record = await send(server, target=Target(server.base_url, 0.3))
    assert record.error == "timeout: no end within 0.3 s"


async def test_who_leaves_takes_the_connection_along(server: OpenAiServer) -> None:
    server.script.pause_s = 0.01
    record = await send(server, num_tokens=10_000, leave_after=3)
    assert record.error == "" and len(record.token_times_s) >= 3
    async with asyncio.timeout(10):
        while not server.num_dropped:
            await asyncio.sleep(0.01)


async def test_malformed_and_oversized_requests_are_refused(server: OpenAiServer) -> None:
    for chat in (False, True):
        async with HttpClient(Target(server.base_url), chat) as client:
            for request in (client.encode_malformed(), client.encode_oversized(2 << 20)):
                record, _ = await exchange(client, Shot(0, 0.0, request), Clock())
                assert record.refused, record.error


async def test_a_conversation_in_words(server: OpenAiServer) -> None:
    said = (Message("user", "a b"), Message("assistant", " c"), Message("user", " d"))
    for chat in (False, True):
        async with HttpClient(Target(server.base_url), chat) as client:
            await client.get_model()
            _, stream = await exchange(client, Shot(0, 0.0, client.encode(Ask(said, 2, seed=1))), Clock())
            assert stream.answer(as_text=True) == " é é"
    assert server.bodies[0]["prompt"] == "a b c d"
    assert [m["role"] for m in server.bodies[1]["messages"]] == ["user", "assistant", "user"]


async def test_the_model_is_the_first_or_the_one_named(server: OpenAiServer) -> None:
    async with HttpClient(Target(server.base_url), chat=False) as client:
        model = await client.get_model()
        assert (model.name, model.max_model_len, model.vocab_size) == ("fake", 2048, 0)
    async with HttpClient(Target(server.base_url), chat=False, model="other") as client:
        with pytest.raises(SendError, match="there is no model other; there are: fake"):
            await client.get_model()


async def test_no_server_is_said_in_time() -> None:
    async with HttpClient(Target("127.0.0.1:1"), chat=False) as client:
        with pytest.raises(SendError, match="Cannot connect"):
            await client.get_model(wait_s=0.2)


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("h:8000", "http://h:8000"),
        ("https://h/", "https://h"),
        ("http://h:8000/v1", "http://h:8000"),
        ("http://[::1]:8000/v1/", "http://[::1]:8000"),
        ("https://h/proxy", "https://h/proxy"),
    ],
)
def test_addresses(address: str, url: str) -> None:
    assert base_url_of(address) == url


@pytest.mark.parametrize("address", ["ftp://h", "http://", "http://h?x=1", "http://[::1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError):
        base_url_of(address)


async def test_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    command = ["openssl", *words.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server = OpenAiServer(tls=context)
    try:
        assert (await send(server, target=Target(server.base_url, tls=Tls(cert)))).error == ""
        async with HttpClient(Target(server.base_url), chat=False) as client:
            with pytest.raises(SendError, match="certificate"):
                await client.get_model(wait_s=0.1)
    finally:
        server.close()
