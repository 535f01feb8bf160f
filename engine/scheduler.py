"""Which tokens of which requests are computed in the next step. Pure: no torch, no clock, no I/O.

The one rule: a request's `num_computed_tokens` catches up with its tokens, as far as the step's token budget and the
free blocks allow. There are no phases, so a decode step, a chunk of a prompt and the tail after a prefix hit are the
same thing.

- A request starts only when there are blocks for all its tokens, so only its growth, a token at a time, can run short.
- If it does, the request that came last is preempted: its tokens are kept, and its full blocks stay in the prefix cache
  while there is room. If there is no later request to preempt, the growing one stalls and keeps its blocks.
- Decode steps come first, then prompts, begun or not, in the order of `engine.order`; equals in order of arrival.
- More decodes than fit in a step take turns, those first that have waited the longest; one place is left for prompts.
- Requests that already have their blocks (they were held) may overtake a head of the queue that finds no room: they
  take nothing from it and will give blocks back.
- A request whose prompt is to be scored hits nothing until then, and has small chunks: each of their tokens has logits.
- An empty batch means that only the caller can change something: abort, release or unpin. So there is no need to poll.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.errors import NoRoom
from engine.order import rank
from engine.request import FinishReason, FullBlock, Request, RequestStatus

logger = logging.getLogger(__name__)

MAX_SCORED_TOKENS = 256  # per step: bounds the memory of their logits, a whole vocabulary for each
NOTHING = range(0)


@dataclass(frozen=True)
class Chunk:
    """The next `num_tokens` tokens of a request, from `start` on. It `samples` when no token is left behind it.

    `scored` are the positions in it whose next token's logprob is wanted, none of which samples.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    scored: range = NOTHING


class Scheduler:
    """Keeps the live requests and gives them blocks."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_num_batched_tokens: int,
        max_num_requests: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        if min(block_size, max_num_batched_tokens, max_num_requests) < 1:
            raise ValueError("block_size, max_num_batched_tokens and max_num_requests must be at least 1")
        self.requests: dict[str, Request] = {}  # every live request, in order of arrival
        self._pool = pool
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_requests = max_num_requests
        self.num_places = min(max_num_requests, max_num_batched_tokens)  # for decodes, in a step
        self._enable_prefix_caching = enable_prefix_caching
        self._num_preempted = 0
        self._num_chunks = 0

    # --- a request's life ---

    def add(self, request: Request) -> None:
        """Queues a request; it gets its blocks when it starts."""
        request.status = RequestStatus.WAITING
        self.requests[request.request_id] = request

    def hold(self, request: Request) -> None:
        """Gives a request blocks for all its tokens and one more, without scheduling it. Raises `NoRoom`: not kept.

        Blocks that earlier requests still need are set aside first; otherwise a stream of newcomers could starve one
        that was preempted.
        """
        set_aside = sum(max(0, self._num_missing(earlier)) for earlier in self._catching_up())
        if not self._take_blocks(request, request.num_tokens + 1, set_aside):
            free = self._pool.num_free
            raise NoRoom(f"no room for {request.num_tokens + 1} tokens: {free} blocks free, {set_aside} set aside")
        request.status = RequestStatus.HELD
        self.requests[request.request_id] = request

    def release(self, request: Request) -> None:
        """Lets a held request take part from the next step on; it keeps its blocks."""
        request.status = RequestStatus.WAITING

    def remove(self, request: Request, reason: FinishReason) -> None:
        """Ends a request in any status and gives its blocks back."""
        self._free_blocks(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self.requests[request.request_id]

    def advance(self, request: Request, num_tokens: int) -> list[FullBlock]:
        """Moves the cursor over `num_tokens` that are now in the cache; returns full blocks not reported before.

        Local hits are reported too: the store may have evicted or lost them, and other nodes can get them nowhere
        else. Blocks that came from the store are not.
        """
        self._move(request, num_tokens)
        end = request.num_computed_tokens // self._block_size
        first_import = request.num_local_hit_tokens // self._block_size
        imported = range(first_import, first_import + request.num_store_hit_tokens // self._block_size)
        unreported = [index for index in range(request.num_published_blocks, end) if index not in imported]
        request.num_published_blocks = max(request.num_published_blocks, end)
        return [FullBlock(request.block_hashes[index], request.block_table[index]) for index in unreported]

    def adopt_import(self, request: Request) -> None:
        """Moves the cursor over the next block, which came from the store."""
        self._move(request, self._block_size)
        request.num_store_hit_tokens += self._block_size

    def _move(self, request: Request, num_tokens: int) -> None:
        before = request.num_computed_tokens // self._block_size
        request.num_computed_tokens += num_tokens
        if self._enable_prefix_caching:
            for index in range(before, request.num_computed_tokens // self._block_size):
                self._pool.register(request.block_table[index], request.block_hashes[index])

    # --- a step ---

    def schedule(self, now_s: float = 0.0, prefill_tokens_per_s: float = 0.0) -> list[Chunk]:
        """The next step's batch: decode first, then whatever has more to catch up with, until the budget is spent.

        `now_s` is on the clock of `Request.arrived_s`. While the speed is 0.0 (unknown), prompts are computed in order
        of arrival, those that have begun first.
        """
        waiting = self._with_status(RequestStatus.WAITING)
        chunks: list[Chunk] = []
        budget, is_blocked, num_preempted = self._max_num_batched_tokens, False, self._num_preempted
        scorable = MAX_SCORED_TOKENS
        for request in self._in_order(waiting, now_s, prefill_tokens_per_s):
            if budget == 0 or len(chunks) == self._max_num_requests:
                break
            is_scoring = request.is_scoring
            if is_scoring and scorable == 0:
                continue
            if request.status is RequestStatus.RUNNING:
                is_ready = self._make_room(request)
            elif self._num_preempted == num_preempted:
                is_ready = not (is_blocked and self._num_missing(request) > 0)
                is_ready = is_ready and self._take_blocks(request, request.num_tokens)
                is_blocked = is_blocked or not is_ready
            else:
                is_ready = False  # a request was preempted, so the remaining room is not for new ones
            if is_ready:
                chunks.append(self._start(request, min(budget, scorable) if is_scoring else budget))
                budget -= chunks[-1].num_tokens
                scorable -= chunks[-1].num_tokens if is_scoring else 0
        # A request scheduled and then preempted for an older one is dropped again; its share of the budget is lost.
        chunks = [chunk for chunk in chunks if chunk.request.status is RequestStatus.RUNNING]
        return chunks or self._unblock(waiting)

    def _in_order(self, waiting: list[Request], now_s: float, prefill_tokens_per_s: float) -> list[Request]:
        running = self._with_status(RequestStatus.RUNNING)
        decoding = [request for request in running if _num_left(request) <= 1]
        others = [request for request in running if _num_left(request) > 1] + waiting
        tails = [request for request in others if self._is_tail(request)]
        if prefill_tokens_per_s > 0.0:
            others.sort(key=lambda request: _rank(request, now_s, prefill_tokens_per_s))
        num_streams = len(decoding) + sum(bool(r.num_output_tokens and r.block_table) for r in others)
        if num_streams <= self.num_places:
            return decoding + others
        return _by_turns(decoding + tails, others, self.num_places)

    def _is_tail(self, request: Request) -> bool:
        """Whether what is left of an output's KV is its last block's, as of one that comes from a prefill node."""
        is_short = request.num_output_tokens > 0 and _num_left(request) <= self._block_size
        return is_short and self._num_missing(request) <= 0

    def _unblock(self, waiting: list[Request]) -> list[Chunk]:
        """If nothing can run, because all hold blocks that others need, the request that came first takes them."""
        if not waiting or not self._make_room(waiting[0]):
            return []
        budget = self._max_num_batched_tokens
        return [self._start(waiting[0], min(budget, MAX_SCORED_TOKENS) if waiting[0].is_scoring else budget)]

    def _start(self, request: Request, budget: int) -> Chunk:
        request.status = RequestStatus.RUNNING
        self._num_chunks += 1
        request.last_chunk = self._num_chunks
        return self._chunk(request, budget)

    def _chunk(self, request: Request, budget: int) -> Chunk:
        is_scoring = request.is_scoring
        if self._enable_prefix_caching and not is_scoring and _num_left(request) > 1:
            self._adopt_late(request)
        start = request.num_computed_tokens
        end = start + min(request.num_tokens - start, budget)
        scored = _scored(request, start, end) if is_scoring else NOTHING
        return Chunk(request, start, end - start, end == request.num_tokens, scored)

    # --- blocks ---

    def _make_room(self, request: Request) -> bool:
        """Gives a request blocks for all its tokens, preempting later ones if necessary."""
        while not self._take_blocks(request, request.num_tokens):
            victim = next(self._victims(request), None)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _take_blocks(self, request: Request, num_tokens: int, set_aside: int = 0) -> bool:
        """Extends the block table to `num_tokens`, or does nothing. An empty table starts with the prefix hit."""
        hits = [] if request.block_table else self._match(request)
        num_new = max(0, self._num_blocks(num_tokens) - len(request.block_table) - len(hits))
        if num_new + self._pool.num_unreferenced(hits) + set_aside > self._pool.num_free:
            return False
        self._pool.acquire(hits)
        request.block_table += hits + self._pool.allocate(num_new)
        if hits:
            self._adopt(request, len(hits))
        return True

    def _match(self, request: Request) -> list[int]:
        """The cached blocks of a request, without the block of its last token, which must be computed."""
        if not self._enable_prefix_caching or request.is_scoring:
            return []
        return self._pool.match(request.block_hashes[: (request.num_tokens - 1) // self._block_size])

    def _adopt(self, request: Request, num_blocks: int) -> None:
        request.num_computed_tokens = num_blocks * self._block_size
        if request.num_published_blocks == 0 and request.num_store_hit_tokens == 0:
            # otherwise it was preempted, and finds its earlier blocks again
            request.num_local_hit_tokens = request.num_computed_tokens

    def _adopt_late(self, request: Request) -> None:
        """Adopts blocks that another request has computed since this one got its own, and gives its own back.

        In a burst with a common prefix, all requests have their blocks before the first has computed any.
        """
        first, end = request.num_computed_tokens // self._block_size, (request.num_tokens - 1) // self._block_size
        hits = self._pool.match(request.block_hashes[first:end])
        if not hits:
            return
        own = request.block_table[first : first + len(hits)]
        self._pool.acquire(hits)
        self._pool.release(own)
        request.block_table[first : first + len(hits)] = hits
        before, request.num_computed_tokens = request.num_computed_tokens, (first + len(hits)) * self._block_size
        request.num_late_hit_tokens += request.num_computed_tokens - before

    def _preempt(self, request: Request) -> None:
        logger.debug("event=preempt request=%s computed_tokens=%d", request.request_id, request.num_computed_tokens)
        self._num_preempted += 1
        self._free_blocks(request)
        request.num_computed_tokens = request.num_late_hit_tokens = 0
        request.status = RequestStatus.WAITING

    def _free_blocks(self, request: Request) -> None:
        self._pool.release(request.block_table)
        request.block_table.clear()

    def _victims(self, request: Request) -> Iterator[Request]:
        """Requests that came after `request`, last first, are not held, and have a block that nobody else holds."""
        for later in reversed(self.requests.values()):
            if later is request:
                return
            if later.status is not RequestStatus.HELD and self._pool.num_sole(later.block_table):
                yield later

    # --- questions ---

    def _catching_up(self) -> Iterator[Request]:
        return (request for request in self.requests.values() if request.status is not RequestStatus.HELD)

    def _with_status(self, status: RequestStatus) -> list[Request]:
        return [request for request in self.requests.values() if request.status is status]

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _num_missing(self, request: Request) -> int:
        return self._num_blocks(request.num_tokens) - len(request.block_table)


def _scored(request: Request, start: int, end: int) -> range:
    """Positions whose next token is the prompt's and has no logprob yet; one that was preempted has some."""
    assert request.prompt_logprobs is not None
    return range(max(start, len(request.prompt_logprobs.logprobs)), min(end, request.num_prompt_tokens - 1))


def _by_turns(streams: list[Request], others: list[Request], num_places: int) -> list[Request]:
    """Streams, the one that has waited the longest first, and one place for those of `others` that are none.

    Without it a prompt would wait for as long as streams come.
    """
    streams.sort(key=lambda request: request.last_chunk)
    among_streams = set(streams)
    num_first = max(1, num_places - 1)
    rest = [request for request in others if request not in among_streams]
    return streams[:num_first] + rest + streams[num_first:]


def _num_left(request: Request) -> int:
    return request.num_tokens - request.num_computed_tokens


def _rank(request: Request, now_s: float, tokens_per_s: float) -> float:
    return rank(_num_left(request) / tokens_per_s, now_s - request.arrived_s, request.priority)
