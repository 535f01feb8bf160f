"""The gRPC client, against a real gRPC server with scripted answers."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from scripted_router import RouterThread

from loadtest.exchange import Ask, Clock, Message, Sampling, SendError, Shot, Target, Tls, exchange, measure_loop_lag
from loadtest.grpc_client import GrpcClient
from loadtest.record import RequestRecord


@pytest.fixture
def router() -> Iterator[RouterThread]:
    thread = RouterThread()
    yield thread
    thread.close()


async def generate(
    router: RouterThread, num_tokens: int = 6, timeout_s: float = 30.0, leave_after: int = 0
) -> RequestRecord:
    async with GrpcClient(Target(router.address, timeout_s)) as client:
        request = client.encode(Ask((Message("user", tuple(range(40))),), num_tokens, seed=1))
        record, _ = await exchange(client, Shot(3, 0.0, request, leave_after=leave_after), Clock())
        return record


async def test_a_record_says_what_came(router: RouterThread) -> None:
    router.service.pause_s = 0.01
    record = await generate(router)
    assert record.error == ""
    assert (record.index, record.prompt_tokens, record.output_tokens) == (3, 40, 6)
    assert (record.cached_tokens, record.local_hit_tokens, record.store_hit_tokens) == (20, 10, 10)
    assert (record.prefill_node, record.decode_node, record.migrations) == ("p0", "d1", 1)
    times_s = [record.sent_s, *record.token_times_s, record.finished_s]
    assert times_s == sorted(times_s)
    assert len(record.token_times_s) == 6
    assert record.e2e_s >= 6 * 0.01  # the server slept that long, so no reading can be shorter


async def test_bundled_tokens_are_one_message(router: RouterThread) -> None:
    router.service.bundle = 4
    record = await generate(router)
    assert (record.output_tokens, len(record.token_times_s), len(record.itls_s)) == (6, 2, 1)


@pytest.mark.parametrize(
    ("fault", "error"), [("cut", "without a finish reason"), ("miscount", "6 tokens came, usage says 7")]
)
async def test_a_stream_that_is_not_whole_is_an_error(router: RouterThread, fault: str, error: str) -> None:
    router.service.fault = fault
    record = await generate(router)
    assert error in record.error
    assert not record.succeeded and not record.refused


async def test_a_deadline_ends_a_request(router: RouterThread) -> None:
    router.service.pause_s = 20.0
    record = await generate(router, timeout_s=0.2)
    assert record.error.startswith("DEADLINE_EXCEEDED")


async def test_who_leaves_cancels_the_call(router: RouterThread) -> None:
    router.service.pause_s = 0.005
    record = await generate(router, num_tokens=10_000, leave_after=3)
    assert (record.error, record.output_tokens) == ("", 3)
    async with asyncio.timeout(10):
        while router.service.in_flight:
            await asyncio.sleep(0.01)


async def test_malformed_and_oversized_requests_are_refused(router: RouterThread) -> None:
    async with GrpcClient(Target(router.address)) as client:
        for request in (client.encode_malformed(), client.encode_oversized(8 << 20)):
            record, _ = await exchange(client, Shot(0, 0.0, request), Clock())
            assert record.refused, record.error


async def test_a_conversation_is_one_run_of_tokens() -> None:
    async with GrpcClient(Target("127.0.0.1:1"), Sampling(ttft_slo_ms=500)) as client:
        said = (Message("user", (1, 2)), Message("assistant", (7,)), Message("user", (3,)))
        request = client.encode(Ask(said, 5, seed=9))
        assert list(request.tokens.token_ids) == [1, 2, 7, 3]
        assert (request.sampling.max_tokens, request.sampling.seed, request.ttft_slo_ms) == (5, 9, 500)
        assert not request.HasField("tpot_slo_ms")
        said_in_words = (Message("user", "a b"), Message("assistant", " c"), Message("user", " d"))
        assert client.encode(Ask(said_in_words, 5, seed=9)).text == "a b c d"


async def test_a_router_without_nodes_is_asked_again(router: RouterThread) -> None:
    router.service.calls_without_node = 2
    async with GrpcClient(Target(router.address, 30.0)) as client:
        model = await client.get_model()
        assert (model.name, model.max_model_len, model.vocab_size) == ("scripted", 512, 50)
        router.service.calls_without_node = 10**6
        with pytest.raises(SendError, match="no node"):
            await client.get_model(wait_s=0.2)


async def test_no_router_is_said_in_time() -> None:
    async with GrpcClient(Target("127.0.0.1:1", 30.0)) as client:
        with pytest.raises(SendError):
            await client.get_model(wait_s=0.2)


def test_the_key_is_in_no_words() -> None:
    target = Target("127.0.0.1:1", api_key="my-key")
    assert "my-key" not in repr(target)
    assert target.redact("no such key: my-key") == "no such key: [API key]"
    assert Target("127.0.0.1:1").redact("as it is") == "as it is"


async def test_a_blocked_event_loop_is_noticed() -> None:
    import time

    lags_s: list[float] = []
    meter = asyncio.create_task(measure_loop_lag(lags_s, interval_s=0.001))
    await asyncio.sleep(0.01)
    time.sleep(0.2)  # what the test is about: something blocks the loop
    await asyncio.sleep(0.01)
    meter.cancel()
    assert max(lags_s) > 0.15


async def test_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    command = ["openssl", *words.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    router = RouterThread(credentials=credentials)
    try:
        async with GrpcClient(Target(router.address, tls=Tls(cert))) as client:
            assert (await client.get_model()).name == "scripted"
        async with GrpcClient(Target(router.address)) as client:
            with pytest.raises(SendError):
                await client.get_model(wait_s=0.2)
    finally:
        router.close()
