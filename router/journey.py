"""The state of one request: what it is, what it has so far, and which nodes not to ask again. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from batonpb import common_pb2, node_pb2
from kvstore.blocks import BlockHash, hash_blocks, salted
from router.errors import LegFailed, LegRefused, RouterError
from router.hits import Hit
from router.plan import RequestView
from router.registry import Pool
from router.traces import NO_TRACE, Trace

UNFINISHED = common_pb2.FINISH_REASON_UNSPECIFIED
LASTING_TOKENS = 32  # after this many new tokens since the last failure, failures are counted afresh
MAX_REFUSALS = 3  # of one leg, for want of room: those nodes were the cheapest, so the others are as full or worse


@dataclass(frozen=True)
class RoutedRequest:
    """A request at its start: tokens, and all defaults filled in."""

    request_id: str
    prompt_ids: Sequence[int]
    sampling: common_pb2.SamplingParams  # seed and max_tokens set, within the model's length
    end_ids: frozenset[int]  # tokens that end it, after min_tokens
    deadline_s: float | None = None  # on the dispatcher's clock
    salt: bytes = b""  # the tenant's; never anything that a client has sent
    kv_quota_bytes: int = 0  # that the tenant's blocks may take in each arena; 0: no bound
    priority: int = 0  # smaller values are computed first
    first_due_s: float | None = None  # when its first token is due by its SLO, on the dispatcher's clock
    tpot_limit_s: float | None = None
    has_begun: bool = False  # the client already has part of the call: another of its n answers
    prompt_logprobs: int | None = None  # alternatives of each prompt token; None: not requested
    trace: Trace = NO_TRACE  # of the call


@dataclass(frozen=True)
class Progress:
    """Tokens that came; the last one has the finish reason, the first one the prompt's logprobs, if any."""

    tokens: Sequence[common_pb2.Token]
    finish_reason: common_pb2.FinishReason = UNFINISHED
    prompt_logprobs: common_pb2.PromptLogprobs | None = None


@dataclass(eq=False)
class Journey:
    """One request on its way: what it has so far, and which nodes not to ask again."""

    request: RoutedRequest
    output_ids: list[int] = field(default_factory=list)
    num_failures: int = 0
    last_failure: RouterError | None = None
    failed: set[str] = field(default_factory=set)  # node ids
    refused: dict[str, set[str]] = field(default_factory=lambda: {"prefill": set(), "decode": set()})
    stuck_since_s: float | None = None  # no node takes it
    pool: Pool | None = None  # whose nodes may run it
    _failed_at_tokens: int = 0
    _root: BlockHash | None = None
    _hashes: list[BlockHash] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.prompt_ids, *self.output_ids]

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    def hashes(self, pool: Pool) -> list[BlockHash]:
        """The names of all full blocks so far; only new ones are hashed."""
        root = salted(pool.root, self.request.salt)
        if root != self._root:
            self._root, self._hashes = root, []
        begin = len(self._hashes) * pool.block_size
        if self.num_tokens - begin >= pool.block_size:
            parent = self._hashes[-1] if self._hashes else root
            self._hashes += hash_blocks(parent, self.token_ids[begin:], pool.block_size)
        return self._hashes

    @property
    def has_begun(self) -> bool:
        """Whether giving up the request now would be visible to the client as a failure.

        True once a leg of it has failed, too: the failed node may be back by now, under a new incarnation.
        """
        return bool(self.request.has_begun or self.output_ids or self.num_failures)

    @property
    def is_refused(self) -> bool:
        """Whether enough nodes had no room for a leg: under overload nobody asks them all. What has begun goes on."""
        return not self.has_begun and any(len(nodes) >= MAX_REFUSALS for nodes in self.refused.values())

    @property
    def is_scoring(self) -> bool:
        """Whether its prompt's logprobs are still to come; they come with the first token, and only once."""
        return self.request.prompt_logprobs is not None and not self.output_ids

    def view(self, hits: Mapping[str, Hit], warming: Mapping[str, int], now_s: float) -> RequestView:
        """The request as a policy sees it. One that has begun has no limits any more: it must not be lost."""
        due_s = [moment for moment in (self.request.first_due_s, self.request.deadline_s) if moment is not None]
        has_limits = not self.has_begun
        return RequestView(
            num_tokens=self.num_tokens,
            max_new_tokens=self.request.sampling.max_tokens - len(self.output_ids),
            hits=hits,
            warming={} if self.is_scoring else warming,
            ttft_limit_s=min(due_s) - now_s if due_s and has_limits else None,
            tpot_limit_s=self.request.tpot_limit_s if has_limits else None,
            failed=frozenset(self.failed),
            no_prefill=frozenset(self.refused["prefill"]),
            no_decode=frozenset(self.refused["decode"]),
        )

    def admit(self, runs_alone: bool) -> node_pb2.DecodeRequest:
        """The first message to a decode node. Filled in place, because protobuf copies a message put into another."""
        message, request = node_pb2.DecodeRequest(), self.request
        message.admit.runs_alone = runs_alone
        told = message.admit.request
        told.request_id = request.request_id
        told.token_ids.extend(request.prompt_ids)
        told.token_ids.extend(self.output_ids)
        told.num_prompt_tokens = len(request.prompt_ids)
        told.sampling.CopyFrom(request.sampling)
        told.salt = request.salt
        told.kv_quota_bytes = request.kv_quota_bytes
        told.priority = request.priority
        if runs_alone and self.is_scoring and request.prompt_logprobs is not None:
            told.prompt_logprobs = request.prompt_logprobs
        return message

    def scoring(self, message: node_pb2.NodeRequest) -> node_pb2.NodeRequest:
        """The message to a first leg: `message`, plus the request for prompt logprobs, which only first legs get."""
        if not self.is_scoring:
            return message
        asking = node_pb2.NodeRequest(prompt_logprobs=self.request.prompt_logprobs)
        asking.MergeFrom(message)
        return asking

    def is_whole(self, scores: common_pb2.PromptLogprobs) -> bool:
        """Whether a node has sent all of the prompt's logprobs."""
        num_scored = len(self.request.prompt_ids) - 1
        num_tops = num_scored * scores.num_top
        return (
            len(scores.token_ids) == len(self.request.prompt_ids)
            and len(scores.logprobs) == len(scores.ranks) == num_scored
            and len(scores.top_token_ids) == len(scores.top_logprobs) == num_tops
        )

    def take(self, tokens: Sequence[common_pb2.Token]) -> None:
        self.output_ids += [token.token_id for token in tokens]
        self.stuck_since_s = None

    def note(self, failure: LegFailed | LegRefused) -> None:
        """A node that failed counts as dead for this request; one without room may still run the other leg."""
        self.last_failure = failure
        if isinstance(failure, LegRefused) and not failure.is_draining:
            self.refused[failure.leg].add(failure.node_id)
        else:
            self.failed.add(failure.node_id)
        # A dying machine takes many nodes with it; calls that no node accepted are not attempts.
        if isinstance(failure, LegFailed) and not failure.is_unreached:
            self._count_failure()

    def _count_failure(self) -> None:
        """Counts consecutive failures; the count restarts once the request has made progress in between."""
        if len(self.output_ids) - self._failed_at_tokens >= LASTING_TOKENS:
            self.num_failures = 0
        self._failed_at_tokens = len(self.output_ids)
        self.num_failures += 1
        self.stuck_since_s = None

    def forgive(self) -> None:
        """All nodes may be asked again, as the reasons against them may have passed."""
        self.failed.clear()
        self.refused = {"prefill": set(), "decode": set()}

    def end(self) -> common_pb2.FinishReason:
        """The finish reason, if the tokens so far are complete but the node died before it could say so."""
        sampling, count = self.request.sampling, len(self.output_ids)
        # Before min_tokens, an end token comes only if a grammar allows nothing else; then it is an end.
        may_end = count >= sampling.min_tokens or sampling.WhichOneof("grammar") is not None
        if count and self.output_ids[-1] in self.request.end_ids and may_end:
            return common_pb2.FINISH_REASON_STOP
        return common_pb2.FINISH_REASON_LENGTH if count >= sampling.max_tokens else UNFINISHED
