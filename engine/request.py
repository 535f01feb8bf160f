"""A request from birth to death, and an engine's output for it. Plain data: no torch, no I/O.

There are no phases. A request has tokens and a cursor, `num_computed_tokens`; each step lets the cursor catch up. A
prompt, a chunk of it, a decode step and the tail after a prefix hit are all "tokens not computed yet".
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.errors import InvalidRequest
from kvstore.blocks import BlockHash, hash_blocks

if TYPE_CHECKING:
    from engine.mask import TokenMask
    from engine.penalties import SeenTokens

MAX_LOGPROBS = 20
MAX_BIASES = 300
MAX_BIAS = 100.0


class RequestStatus(enum.Enum):
    HELD = "held"  # has its blocks, waits for `Engine.release` (its KV is being fetched, or prefill runs elsewhere)
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    HANDOFF = "handoff"  # this leg is over; the request continues elsewhere
    ABORT = "abort"
    FAILED = "failed"  # its mask allows no token; the output's `error` says why


@dataclass(frozen=True)
class SamplingParams:
    """How to sample tokens. Ranges are checked here, once; `InvalidRequest` names the field and the limit.

    `logprobs` is the number of top alternatives to report (None: no logprobs at all). Stop strings are not here: the
    engine knows no text; the router matches them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), each id once

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, limit: str) -> None:
            if not ok:
                raise InvalidRequest(f"sampling.{name}", f"must be {limit}, got {getattr(self, name)!r}")

        check("temperature", 0.0 <= self.temperature <= 2.0, "in [0, 2]")
        check("top_k", self.top_k >= 0, "at least 0")
        check("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        check("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        check("repetition_penalty", 0.0 < self.repetition_penalty <= 2.0, "in (0, 2]")
        check("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]")
        check("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]")
        check("seed", 0 <= self.seed < 2**64, "in [0, 2**64)")
        check("max_tokens", self.max_tokens >= 1, "at least 1")
        check("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"in [0, max_tokens = {self.max_tokens}]")
        check("stop_token_ids", len(self.stop_token_ids) <= 16, "16 ids at most")
        check("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"in [0, {MAX_LOGPROBS}]")
        check("logit_bias", len(self.logit_bias) <= MAX_BIASES, f"{MAX_BIASES} ids at most")
        biases_fit = all(abs(bias) <= MAX_BIAS for _, bias in self.logit_bias)
        check("logit_bias", biases_fit, f"in [-{MAX_BIAS:.0f}, {MAX_BIAS:.0f}]")


@dataclass
class PromptLogprobs:
    """Log probabilities of a prompt's tokens, each behind those before it: of all but the first one, in order.

    Those of a request grow as its prompt is computed.
    """

    num_top: int  # alternatives of each
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)  # 1: the most likely token
    top_ids: list[int] = field(default_factory=list)  # `num_top` for each token, most likely first
    top_logprobs: list[float] = field(default_factory=list)

    def extend(self, more: PromptLogprobs) -> None:
        self.logprobs += more.logprobs
        self.ranks += more.ranks
        self.top_ids += more.top_ids
        self.top_logprobs += more.top_logprobs


@dataclass(eq=False)
class Request:
    """`token_ids` is the prompt, then every output token, including those of an earlier node before a failover.

    `handoff_after` ends this leg after that many new tokens without ending the request (a prefill node passes 1).
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    root: BlockHash
    block_size: int
    handoff_after: int | None = None
    priority: int = 0  # smaller values are computed first; has no effect on tokens
    mask: TokenMask | None = None  # which tokens are allowed; None: all
    prompt_logprobs: PromptLogprobs | None = None  # None: not requested

    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)  # hashes of the full blocks of token_ids
    num_computed_tokens: int = 0
    num_local_hit_tokens: int = 0
    num_store_hit_tokens: int = 0
    num_late_hit_tokens: int = 0  # computed here for other requests while this one waited
    num_new_tokens: int = 0  # sampled by this engine
    num_published_blocks: int = 0  # leading full blocks already reported in an output
    last_chunk: int = 0  # the number of its newest one among all of the scheduler's; 0: none yet
    seen_tokens: SeenTokens | None = None  # what penalties made of token_ids so far; None: nobody asked
    arrived_s: float = 0.0  # time.perf_counter() when an engine accepted it
    started_s: float | None = None  # time.perf_counter() of its first step; None: it still waits

    def __post_init__(self) -> None:
        self._extend_hashes()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_scoring(self) -> bool:
        """Whether logprobs of its prompt are still to come. Then nothing of it is a hit: all of it must be computed."""
        scores = self.prompt_logprobs
        return scores is not None and len(scores.logprobs) < self.num_prompt_tokens - 1

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def append(self, token_id: int) -> None:
        """Adds an output token, and the hash of the block that it completes, if any."""
        self.token_ids.append(token_id)
        if len(self.token_ids) % self.block_size == 0:
            self._extend_hashes()

    def _extend_hashes(self) -> None:
        done = len(self.block_hashes)
        parent = self.block_hashes[-1] if done else self.root
        self.block_hashes += hash_blocks(parent, self.token_ids[done * self.block_size :], self.block_size)


@dataclass(frozen=True)
class OutputToken:
    token_id: int
    logprob: float | None = None  # None if not requested
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True)
class FullBlock:
    """A block that became full and computed. It stays pinned until `Engine.unpin`, so that it can be exported."""

    block_hash: BlockHash
    block_id: int


@dataclass(frozen=True)
class RequestOutput:
    """What one step did for one request; a chunk in the middle of a prompt may have blocks, but has no token."""

    request_id: str
    tokens: tuple[OutputToken, ...] = ()
    full_blocks: tuple[FullBlock, ...] = ()
    finish_reason: FinishReason | None = None
    error: InvalidRequest | None = None  # with FAILED


@dataclass(frozen=True)
class EngineLoad:
    """A snapshot for heartbeats. Speeds are moving averages; 0.0 before the first measurement."""

    num_running: int
    num_waiting: int  # held ones included
    queued_prefill_tokens: int  # prompt tokens not computed yet, over all requests
    free_blocks: int  # cached but unreferenced blocks count as free
    total_blocks: int
    prefill_tokens_per_s: float
    decode_step_s: float  # what a running request waits for its next token
