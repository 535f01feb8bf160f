"""Counts over one router's requests. Plain state; `metrics.py` shows it to Prometheus.

Nothing here grows with what clients send: reasons and errors have fixed values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from batonpb import common_pb2, inference_pb2
from router.errors import (
    ClusterBusy,
    ClusterUnavailable,
    DeadlinePassed,
    InvalidRequest,
    RateLimited,
    WouldBeLate,
)
from router.histogram import Histogram

_TO_FIRST_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0),
)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0),
)
_REQUEST_S = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

REASONS = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
ABORT = "abort"  # the client left
ERRORS: Mapping[type[Exception], str] = {
    InvalidRequest: "invalid",
    ClusterBusy: "busy",
    WouldBeLate: "late",
    RateLimited: "limited",
    ClusterUnavailable: "unavailable",
    DeadlinePassed: "deadline",
}
INTERNAL = "internal"  # anything else

# Histograms of requests: attribute -> name behind `baton_`, what it is. Names are vLLM's where it has the same.
HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds", "Seconds from a request's receipt to its first token."),
    "inter_token": ("inter_token_latency_seconds", "Seconds between two tokens of an answer, at the router."),
    "tpot": ("request_time_per_output_token_seconds", "Mean seconds for each token behind the first, of an answer."),
    "total": ("e2e_request_latency_seconds", "Seconds from a request's receipt to its end."),
    "queue": ("request_queue_time_seconds", "Seconds that an answer waited for room and its turn on a node."),
    "prefill": ("request_prefill_time_seconds", "Seconds in which a first leg computed."),
    "decode": ("request_decode_time_seconds", "Seconds from an answer's first token to its end."),
    "inference": ("request_inference_time_seconds", "Seconds of prefill and decode."),
    "fetch": ("request_fetch_time_seconds", "Seconds that a first leg waited for blocks out of the store."),
    "handoff": ("request_handoff_time_seconds", "Seconds from the first leg's token to the second leg's first one."),
    "prompt_tokens": ("request_prompt_tokens", "Tokens of a prompt."),
    "generation_tokens": ("request_generation_tokens", "Tokens of an answer."),
    "max_tokens": ("request_params_max_tokens", "Tokens that an answer was allowed."),
}


class Tally:
    """Sums over all answers since the router came up."""

    def __init__(self) -> None:
        self.num_in_flight = 0
        self.finished: Counter[str] = Counter()  # by reason
        self.failed: Counter[str] = Counter()  # calls, by `ERRORS`
        self.num_prompt_tokens = self.num_output_tokens = 0
        self.num_local_hit_tokens = self.num_store_hit_tokens = 0
        self.num_migrations = 0
        self.ttft = Histogram(_TO_FIRST_S)
        self.inter_token, self.tpot = Histogram(_TOKEN_S), Histogram(_TOKEN_S)
        self.total, self.queue, self.prefill, self.decode = (Histogram(_REQUEST_S) for _ in range(4))
        self.inference, self.fetch, self.handoff = (Histogram(_REQUEST_S) for _ in range(3))
        self.prompt_tokens, self.generation_tokens, self.max_tokens = (Histogram(_TOKENS) for _ in range(3))

    def finish(self, response: inference_pb2.GenerateResponse, seconds: Mapping[str, float], max_tokens: int) -> None:
        """An answer has ended with this response; `seconds` are those of its legs by name."""
        usage, timeline = response.usage, response.timeline
        self.finished[REASONS.get(response.finish_reason, "stop")] += 1
        self.num_migrations += timeline.migrations
        self.num_prompt_tokens += usage.prompt_tokens
        self.num_output_tokens += usage.output_tokens
        self.num_local_hit_tokens += usage.local_hit_tokens
        self.num_store_hit_tokens += usage.store_hit_tokens
        self.prompt_tokens.observe(usage.prompt_tokens)
        self.generation_tokens.observe(usage.output_tokens)
        self.max_tokens.observe(max_tokens)
        self.total.observe(timeline.finished_s)
        if timeline.first_token_s >= 0.0:
            self._legs(timeline, seconds, usage.output_tokens)

    def fail(self, error: Exception) -> None:
        """A call has ended with an error."""
        self.failed[ERRORS.get(type(error), INTERNAL)] += 1

    def _legs(self, timeline: inference_pb2.Timeline, seconds: Mapping[str, float], num_tokens: int) -> None:
        prefill_s, decode_s = seconds.get("prefill", 0.0), timeline.finished_s - timeline.first_token_s
        self.ttft.observe(timeline.first_token_s)
        if num_tokens > 1:
            self.tpot.observe(timeline.tpot_s)
        self.queue.observe(seconds.get("admit", 0.0) + seconds.get("queue", 0.0))
        self.prefill.observe(prefill_s)
        self.decode.observe(decode_s)
        self.inference.observe(prefill_s + decode_s)
        self.fetch.observe(seconds.get("fetch", 0.0))
        if "transfer" in seconds or "decode_wait" in seconds:
            self.handoff.observe(seconds.get("transfer", 0.0) + seconds.get("decode_wait", 0.0))
