"""W3C trace context, in and out, and the spans of a call. Without OpenTelemetry the context is only passed on.

`otel.py` makes the spans if the router was told where to send them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from batonpb import inference_pb2
from router.spans import Span

TRACEPARENT, TRACESTATE, TRACERESPONSE = "traceparent", "tracestate", "traceresponse"
MAX_STATE_CHARS = 512
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Trace:
    """One call's trace: `context` is the traceparent sent to nodes and to the client, "" if there is none.

    A context manager, to be left when the call is over.
    """

    def __init__(self, context: str = "", state: str = "") -> None:
        self.context = context
        self.metadata: tuple[tuple[str, str], ...] | None = None  # of the calls to nodes
        if context:
            self.metadata = ((TRACEPARENT, context), *([(TRACESTATE, state)] if state else []))

    @property
    def trace_id(self) -> str:
        return self.context[3:35] or "-"

    def legs(
        self, request_id: str, legs: Sequence[Span], reason: str, response: inference_pb2.GenerateResponse
    ) -> None:
        """An answer has ended with this response; `legs` says where its time went."""

    def end(self, error: BaseException | None) -> None:
        """The call is over, with `error` if it failed."""

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)


NO_TRACE = Trace()


class Traces(Protocol):
    """Starts traces."""

    def begin(self, traceparent: str, tracestate: str) -> Trace: ...

    def close(self) -> None:
        """Sends what is left; may take seconds."""


class PassedOn:
    """Makes no spans: what came in goes out, if it is a context at all."""

    def begin(self, traceparent: str, tracestate: str) -> Trace:
        return Trace(traceparent, sound_state(tracestate)) if is_context(traceparent) else NO_TRACE

    def close(self) -> None:
        pass


def is_context(traceparent: str) -> bool:
    """Whether it is one by the W3C's rules: what is not is as good as none, and starts a new trace."""
    match = _PARENT.fullmatch(traceparent) if 0 < len(traceparent) <= 128 else None
    if match is None:
        return False
    version, trace_id, span_id, _, more = match.groups()
    return version != "ff" and not (version == "00" and more) and bool(trace_id.strip("0") and span_id.strip("0"))


def sound_state(tracestate: str) -> str:
    """The other systems' part of a context: passed on unread, unless it is no header's value or too long."""
    is_sound = len(tracestate) <= MAX_STATE_CHARS and tracestate.isascii() and tracestate.isprintable()
    return tracestate if is_sound else ""
