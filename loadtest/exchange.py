"""One request and its answer, over any transport: what is sent, what has come so far, and its record.

A client (`grpc_client`, `http_client`) turns an `Ask` into bytes or a message before the run, and streams the answer
into a `Stream`; `exchange` times that. Knows the clock; knows no wire, no arrival process and no statistics.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from loadtest.record import RequestRecord

Content = tuple[int, ...] | str  # token ids, or text
CONNECTION_LOST = "connection lost"  # how such an error begins
_REDACTED = "[API key]"


class SendError(Exception):
    """A request failed. `refused`: the server rejected the request or had no room, which is not a server fault."""

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class Clock:
    """Seconds since it was made, or since `start_s` of `time.perf_counter`, which all processes share."""

    def __init__(self, start_s: float | None = None) -> None:
        self._start_s = time.perf_counter() if start_s is None else start_s

    def __call__(self) -> float:
        return time.perf_counter() - self._start_s


@dataclass(frozen=True)
class Tls:
    """PEM files. Without `ca`, the well-known authorities are trusted."""

    ca: Path | None = None
    cert: Path | None = None  # of the client itself, where the server asks for one; goes with `key`
    key: Path | None = None
    server_name: str = ""  # that the server's certificate is to have; "": its address


@dataclass(frozen=True)
class Target:
    """The server, and the client's key, which is shown nowhere."""

    address: str  # "host:port", or a URL for HTTP
    timeout_s: float = 600.0  # of each request
    api_key: str = field(default="", repr=False)
    tls: Tls | None = None  # None: in the clear, but for https://

    def redact(self, words: str) -> str:
        """The text without the key, in case a server repeats it."""
        return words.replace(self.api_key, _REDACTED) if self.api_key else words


@dataclass(frozen=True)
class Message:
    """One part of a conversation. `role` is "user" or "assistant"."""

    role: str
    content: Content


@dataclass(frozen=True)
class Ask:
    """What to send: the conversation so far, all of it token ids or all of it text, and how to answer."""

    messages: tuple[Message, ...]
    output_tokens: int
    seed: int


@dataclass(frozen=True)
class Sampling:
    """The same for each request of a run. SLOs in ms; only Baton's gRPC API takes them, and refuses by them."""

    temperature: float = 0.0
    ignore_eos: bool = True
    ttft_slo_ms: int | None = None
    tpot_slo_ms: int | None = None


DEFAULT_SAMPLING = Sampling()


@dataclass(frozen=True)
class ModelInfo:
    """What the server says of its model; 0 if it does not say."""

    name: str
    max_model_len: int = 0
    vocab_size: int = 0


@dataclass(frozen=True)
class Shot:
    """A request ready to be sent: built before the run, so that building it costs no measured time."""

    index: int
    scheduled_s: float
    request: Any  # what the client's `encode` made
    kind: str = ""
    leave_after: int = 0  # leave when so many messages with tokens have come; 0: stay
    read_pause_s: float = 0.0  # before each further message is read
    turn: int = 0
    ready_s: float | None = None


@dataclass
class Stream:
    """What has come of one answer so far. A client adds to it, and stops reading when `enough` is true."""

    clock: Clock
    leave_after: int = 0
    read_pause_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)  # empty where the server sends text alone
    texts: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    local_hit_tokens: int = 0
    store_hit_tokens: int = 0
    prefill_node: str = ""
    decode_node: str = ""
    migrations: int = 0

    def add(self, num_tokens: int, text: str = "", token_ids: tuple[int, ...] = ()) -> None:
        """A message with tokens has come just now."""
        self.token_times_s.append(self.clock())
        self.num_tokens += num_tokens
        self.texts.append(text)
        self.token_ids += token_ids

    @property
    def enough(self) -> bool:
        """Whether this client leaves now."""
        return bool(self.leave_after) and len(self.token_times_s) >= self.leave_after

    async def pause(self) -> None:
        """What a slow reader does between two messages."""
        if self.read_pause_s:
            await asyncio.sleep(self.read_pause_s)

    def answer(self, as_text: bool) -> Content:
        """The answer, as the next turn of the conversation repeats it."""
        return "".join(self.texts) if as_text else tuple(self.token_ids)


class Client(Protocol):
    """A connection to one server. Use it as `async with`."""

    target: Target

    async def __aenter__(self) -> Client: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def get_model(self, wait_s: float = 10.0) -> ModelInfo:
        """Waits for a server that still starts. Raises `SendError` when it names no model within `wait_s`."""

    def encode(self, ask: Ask) -> Any:
        """The request, ready for `send`."""

    def encode_malformed(self) -> Any:
        """A request that no server may take."""

    def encode_oversized(self, num_bytes: int) -> Any:
        """A request with a prompt of so many bytes."""

    async def send(self, request: Any, stream: Stream) -> None:
        """Sends it and reads the answer to its end, or until `stream.enough`. Raises `SendError`."""


async def exchange(client: Client, shot: Shot, clock: Clock) -> tuple[RequestRecord, Stream]:
    """Sends one request and reads its answer. A failure is in the record's `error`, never raised."""
    stream = Stream(clock, shot.leave_after, shot.read_pause_s)
    error, refused = "", False
    sent_s = clock()
    try:
        await client.send(shot.request, stream)
    except SendError as exc:
        error, refused = str(exc) or "failed", exc.refused
    record = RequestRecord(
        index=shot.index,
        scheduled_s=shot.scheduled_s,
        sent_s=sent_s,
        finished_s=clock(),
        token_times_s=tuple(stream.token_times_s),
        prompt_tokens=stream.prompt_tokens,
        output_tokens=stream.num_tokens,
        cached_tokens=stream.cached_tokens,
        local_hit_tokens=stream.local_hit_tokens,
        store_hit_tokens=stream.store_hit_tokens,
        prefill_node=stream.prefill_node,
        decode_node=stream.decode_node,
        migrations=stream.migrations,
        error=client.target.redact(error),
        refused=refused,
        kind=shot.kind,
        ready_s=shot.ready_s,
        turn=shot.turn,
    )
    return record, stream


async def measure_loop_lag(lags_s: list[float], interval_s: float = 0.01) -> None:
    """Appends, each `interval_s`, by how much a sleep of the event loop came back too late. Runs until cancelled.

    A client that is late itself measures its own lateness: figures are to be trusted only where this is small.
    """
    while True:
        due_s = time.perf_counter() + interval_s
        await asyncio.sleep(interval_s)
        lags_s.append(max(0.0, time.perf_counter() - due_s))
