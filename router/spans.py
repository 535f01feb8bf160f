"""Divides a request's time into legs, from its timeline. Pure; for the live page, the histograms and traces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from batonpb import inference_pb2


@dataclass(frozen=True)
class Span:
    """One leg of a request. Seconds since the router received it."""

    name: str
    start_s: float
    end_s: float
    node_id: str = ""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


# name -> what happens in it; in order, and together all of a request's time
LEGS = {
    "route": "the router checks, tokenises, looks up and decides",
    "admit": "the decode node is asked for room",
    "queue": "the first leg waits for room and its turn",
    "fetch": "the first leg waits for blocks out of the store",
    "prefill": "the first leg computes, up to the first token",
    "transfer": "the decode node waits for the prompt's last blocks",
    "decode_wait": "the decode node computes the tail and its first token",
    "decode": "the other tokens come",
}


def spans(timeline: inference_pb2.Timeline) -> list[Span]:
    """The legs that the timeline has stamps for, in order. Waits reported by nodes are capped at what was seen here.

    After a migration, the legs before the first token are those of the attempt that produced it.
    """
    return [span for span in _all(timeline) if span.end_s > span.start_s]


def _all(timeline: inference_pb2.Timeline) -> Iterator[Span]:
    first_node = timeline.prefill_node or timeline.decode_node
    second_node = timeline.decode_node
    first_s, end_s = timeline.first_token_s, timeline.finished_s
    if timeline.planned_s < 0.0:
        yield Span("route", 0.0, end_s)
        return
    yield Span("route", 0.0, timeline.planned_s)
    yield Span("admit", timeline.planned_s, timeline.admitted_s, second_node)
    began_s = timeline.prefill_start_s
    if began_s < 0.0 or first_s < began_s:
        return
    fetch_s = min(began_s + timeline.queue_s, first_s)
    prefill_s = min(fetch_s + timeline.fetch_s, first_s)
    yield Span("queue", began_s, fetch_s, first_node)
    yield Span("fetch", fetch_s, prefill_s, first_node)
    yield Span("prefill", prefill_s, first_s, first_node)
    second_s = timeline.second_token_s
    if timeline.prefill_node and first_s < second_s:
        wait_s = min(first_s + timeline.transfer_s, second_s)
        yield Span("transfer", first_s, wait_s, second_node)
        yield Span("decode_wait", wait_s, second_s, second_node)
        first_s = second_s
    yield Span("decode", first_s, end_s, second_node)
