"""W3C trace context in and out, and spans for each leg: in memory, and over OTLP to a receiver on the loopback."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from conftest import REPOSITORY, eventually
from http_support import events, post, talking
from router_fakes import FakeCluster, request

from router.errors import UnusableTraces
from router.otel import OtelTraces, open_traces
from router.spans import LEGS
from router.traces import PassedOn, is_context, sound_state

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
ALL = {"generate", "first_token", *LEGS}
BODY = {"prompt": "hello " * 30, "max_tokens": 6}


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    async with talking(redis_url) as cluster:
        for node in cluster.nodes.values():
            node.queue_s, node.fetch_s, node.step_s = 0.003, 0.002, 0.01
        cluster.nodes["prefill0"].faults["prefill"] = lambda: asyncio.sleep(0.02)
        yield cluster


def url(cluster: FakeCluster) -> str:
    return f"{cluster.http_url}/v1/completions"


@pytest.mark.parametrize(
    "text", [PARENT, f"00-{TRACE}-{SPAN}-00", f"01-{TRACE}-{SPAN}-01-more", f"cc-{TRACE}-{SPAN}-09"]
)
def test_what_is_a_context(text: str) -> None:
    assert is_context(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"01-{TRACE}-{SPAN}-01-" + "x" * 200,
        f"{PARENT}\n",
    ],
)
def test_what_is_none(text: str) -> None:
    assert not is_context(text)


def test_the_state_of_others_is_passed_on_unread_unless_it_is_none() -> None:
    assert sound_state("congo=t61rcWkgMzE,rojo=1") == "congo=t61rcWkgMzE,rojo=1"
    assert sound_state("a\r\nb") == sound_state("x" * 513) == sound_state("ü=1") == ""


async def test_without_opentelemetry_the_context_goes_on_to_nodes_back_to_the_client_and_into_the_log(
    cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    status, headers, _ = await post(url(cluster), BODY, {"traceparent": PARENT, "tracestate": "a=1"})
    assert status == 200 and headers["traceresponse"] == PARENT
    for node in cluster.nodes.values():
        (metadata,) = node.metadata
        assert metadata["traceparent"] == PARENT and metadata["tracestate"] == "a=1"
    assert any(f"trace_id={TRACE}" in record.getMessage() for record in caplog.records)
    for given in ({}, {"traceparent": "nonsense"}):
        _, headers, _ = await post(url(cluster), BODY, given)
        assert "traceresponse" not in headers and "traceparent" not in cluster.nodes["decode0"].metadata[-1]


async def test_over_grpc_it_comes_as_metadata(cluster: FakeCluster) -> None:
    call = cluster.stub.Generate(request("hello", max_tokens=3), metadata=(("traceparent", PARENT),))
    assert dict(await call.initial_metadata())["traceresponse"] == PARENT
    assert len([response async for response in call]) >= 3
    assert cluster.nodes["decode0"].metadata[-1]["traceparent"] == PARENT


def in_memory(cluster: FakeCluster):  # type: ignore[no-untyped-def]
    """Turns traces on in a router that runs; returns where spans come to."""
    pytest.importorskip("opentelemetry.sdk", reason="baton[otel] is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    cluster.router.frontend.traces = OtelTraces(provider, "pocket")
    return exporter


async def test_a_span_for_each_leg_under_the_callers(cluster: FakeCluster) -> None:
    exporter = in_memory(cluster)
    status, headers, _ = await post(url(cluster), BODY, {"traceparent": PARENT, "X-Request-Id": "r1"})
    assert status == 200
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == ALL
    root = spans["generate"]
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == SPAN
    assert headers["traceresponse"] == f"00-{TRACE}-{root.context.span_id:016x}-01"
    assert cluster.nodes["decode0"].metadata[-1]["traceparent"] == headers["traceresponse"], "nodes are its children"
    assert root.attributes["gen_ai.usage.output_tokens"] == 6 and root.attributes["gen_ai.request.model"] == "pocket"
    slack_ns = 20_000_000  # the root's clock began at the door
    for name in ALL - {"generate"}:
        span = spans[name]
        assert span.parent.span_id == root.context.span_id and span.attributes["baton.request_id"] == "r1"
        assert root.start_time - slack_ns <= span.start_time <= span.end_time <= root.end_time + slack_ns
    assert spans["prefill"].attributes["baton.node"] == "prefill0"
    assert spans["decode"].attributes["baton.node"] == "decode0"
    fetch = spans["fetch"]
    assert (fetch.end_time - fetch.start_time) / 1e9 == pytest.approx(0.002, abs=1e-4)
    order = [spans[name].start_time for name in LEGS]
    assert order == sorted(order)


async def test_a_call_without_a_parent_begins_a_trace_and_one_that_is_not_sampled_makes_no_spans(
    cluster: FakeCluster,
) -> None:
    exporter = in_memory(cluster)
    _, headers, _ = await post(url(cluster), BODY)
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", headers["traceresponse"])
    exporter.clear()
    _, headers, _ = await post(url(cluster), BODY, {"traceparent": f"00-{TRACE}-{SPAN}-00"})
    assert headers["traceresponse"].startswith(f"00-{TRACE}-") and headers["traceresponse"].endswith("-00")
    assert not exporter.get_finished_spans()


async def test_streams_answers_of_n_and_refusals_have_spans_too(cluster: FakeCluster) -> None:
    exporter = in_memory(cluster)
    await events(url(cluster), BODY | {"stream": True, "n": 2})
    spans = exporter.get_finished_spans()
    assert len([span for span in spans if span.name == "generate"]) == 1
    assert {span.attributes["baton.answer"] for span in spans if span.name == "decode"} == {0, 1}
    exporter.clear()
    status, _, _ = await post(url(cluster), BODY | {"temperature": 99.0})
    (span,) = exporter.get_finished_spans()
    assert status == 400 and not span.status.is_ok and span.attributes["error.type"] == "InvalidRequest"


async def test_spans_reach_a_receiver_over_otlp(redis_url: str) -> None:
    """A real exporter, a real socket; the receiver reads OpenTelemetry's own messages."""
    pytest.importorskip("opentelemetry.sdk", reason="baton[otel] is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: dict[str, str] = {}

    async def take(call: web.BaseRequest) -> web.Response:
        body = await call.read()
        if call.headers.get("Content-Encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"]
            received.update({span.name: service for scope in resource.scope_spans for span in scope.spans})
        return web.Response(body=b"", content_type="application/x-protobuf")

    runner = web.ServerRunner(web.Server(take))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with talking(redis_url, otlp_endpoint=f"http://127.0.0.1:{port}") as cluster:
        assert (await post(url(cluster), BODY))[0] == 200
    await eventually(lambda: "decode" in received, what="spans arrive, at the latest when the router stops")
    assert set(received.values()) == {"baton-router"} and {"generate", "prefill", "first_token"} <= set(received)
    await runner.cleanup()


def test_who_asks_for_traces_without_the_packages_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UnusableTraces, match=r"baton\[otel\]"):
        open_traces("http://127.0.0.1:4318", "m", {})
    assert isinstance(open_traces("", "m", {}), PassedOn)
    given = {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:1"}
    assert isinstance(open_traces("", "m", given), PassedOn)
    with pytest.raises(UnusableTraces):
        open_traces("", "m", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x:1/v1/traces"})


def test_a_router_without_traces_imports_no_exporter() -> None:
    code = "import sys, router.server; sys.exit('opentelemetry.exporter' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
