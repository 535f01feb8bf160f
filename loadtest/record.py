"""The record of one request of a load test, as the client saw it. Pure data; knows no network and no clock.

All times are seconds on one clock that starts with the run, so that records of one run can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class RequestRecord:
    """One request. `error` is empty for a success; only then are the usage fields and the figures below meaningful.

    `token_times_s` has one entry for each message that brought tokens, however many tokens were in it.
    """

    index: int
    scheduled_s: float  # when the arrival process wanted it sent, or its turn of a conversation was due
    sent_s: float
    finished_s: float  # the end of the stream, or the error
    token_times_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # of the prompt; local + store hits of the first leg
    local_hit_tokens: int = 0
    store_hit_tokens: int = 0
    prefill_node: str = ""  # empty where the decode node ran both legs
    decode_node: str = ""
    migrations: int = 0
    error: str = ""
    refused: bool = False  # the error says that the request was at fault, or that there was no room for it
    kind: str = ""  # of a client that misbehaves or leaves (`behaviour.Kind`); such requests are counted apart
    ready_s: float | None = None  # when the client could first have sent it; None: `scheduled_s`
    turn: int = 0  # of its conversation, from 0

    @property
    def succeeded(self) -> bool:
        return not self.error

    @property
    def ttft_s(self) -> float:
        """From sending to the first message with tokens."""
        return self.token_times_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.finished_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """(e2e - TTFT) / (n - 1); None for a request of a single token."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itls_s(self) -> list[float]:
        """The gaps between messages with tokens: a message of several tokens ends one gap, as in `vllm bench serve`."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]

    @property
    def send_delay_s(self) -> float:
        """How late it was sent: the client's own delay, plus the wait for a place in flight."""
        return self.sent_s - self.scheduled_s

    @property
    def lateness_s(self) -> float:
        """How late it was sent by the client's own fault: counted from when it was due and had a place."""
        return self.sent_s - (self.scheduled_s if self.ready_s is None else self.ready_s)
