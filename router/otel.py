"""Spans for OpenTelemetry, sent over OTLP: an extra, `pip install baton[otel]`, imported only where it is asked for.

A call's own span begins with it; those of its legs are made at its end from the timeline, so that traces are not on the
path of a token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from batonpb import inference_pb2
from router.errors import UnusableTraces
from router.spans import Span
from router.traces import NO_TRACE, PassedOn, Trace, Traces, is_context, sound_state

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

SERVICE = "baton-router"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # OpenTelemetry's own variables
PATH = "/v1/traces"


def open_traces(endpoint: str, model: str, environment: Mapping[str, str] = os.environ) -> Traces:
    """`endpoint` is an OTLP receiver's "http://host:port"; "": what OpenTelemetry's variables say, or none.

    Raises `UnusableTraces` if spans are requested and the packages are not installed.
    """
    is_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if is_off or not (endpoint or any(environment.get(name) for name in ENDPOINTS)):
        return PassedOn()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UnusableTraces(f"traces need the packages of baton[otel]: {error}") from None
    service = environment.get("OTEL_SERVICE_NAME", SERVICE)
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    url = endpoint if not endpoint or endpoint.endswith(PATH) else endpoint.rstrip("/") + PATH
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url or None)))
    return OtelTraces(provider, model)


class OtelTraces:
    """Starts traces whose spans go to the provider."""

    def __init__(self, provider: TracerProvider, model: str = "") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("baton.router")
        self._model = model

    def begin(self, traceparent: str, tracestate: str) -> Trace:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {}
        if is_context(traceparent):
            carrier = {"traceparent": traceparent, "tracestate": sound_state(tracestate)}
        parent = TraceContextTextMapPropagator().extract(carrier)
        span = self._tracer.start_span("generate", parent, SpanKind.SERVER)
        if self._model and span.is_recording():
            span.set_attribute("gen_ai.request.model", self._model)
        return _OtelTrace(self._tracer, span)

    def close(self) -> None:
        self._provider.shutdown()


class _OtelTrace(Trace):
    """One call's span. `tracer` and `span` are OpenTelemetry's."""

    def __init__(self, tracer: Any, span: Any) -> None:
        context = span.get_span_context()
        if not context.is_valid:
            super().__init__(NO_TRACE.context)
        else:
            head = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
            super().__init__(head, context.trace_state.to_header())
        self._tracer = tracer
        self._span = span

    def legs(
        self, request_id: str, legs: Sequence[Span], reason: str, response: inference_pb2.GenerateResponse
    ) -> None:
        if not self._span.is_recording():
            return
        from opentelemetry.trace import set_span_in_context

        usage, timeline = response.usage, response.timeline
        received_ns = time.time_ns() - int(timeline.finished_s * 1e9)
        parent = set_span_in_context(self._span)
        common = {"baton.request_id": request_id, "baton.answer": response.index}
        self._span.set_attributes(
            common
            | {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.output_tokens,
                "gen_ai.response.finish_reasons": [reason],
                "gen_ai.latency.time_to_first_token": timeline.first_token_s,
                "gen_ai.latency.e2e": timeline.finished_s,
                "baton.cached_tokens": usage.cached_tokens,
                "baton.migrations": timeline.migrations,
            }
        )
        firsts = [Span("first_token", 0.0, timeline.first_token_s)] if timeline.first_token_s > 0.0 else []
        for leg in [*firsts, *legs]:
            attributes = common | ({"baton.node": leg.node_id} if leg.node_id else {})
            begin_ns = received_ns + int(leg.start_s * 1e9)
            span = self._tracer.start_span(leg.name, parent, attributes=attributes, start_time=begin_ns)
            span.end(received_ns + int(leg.end_s * 1e9))

    def end(self, error: BaseException | None) -> None:
        if error is not None and self._span.is_recording():
            from opentelemetry.trace import Status, StatusCode

            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        self._span.end()
