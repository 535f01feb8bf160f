"""The engine: requests in, one step at a time, tokens and full blocks out. Knows no network, and uses a clock only to
measure speed.

Not thread safe, except for `export_blocks`, `lend_blocks`, `timing` and `rank_work`: one thread owns an engine
(see `engine.loop`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engine.alone import measure_prefill, run_alone, run_throw_away
from engine.block_pool import BlockPool
from engine.config import EngineConfig, ModelConfig, kv_layout
from engine.cuda_graphs import GraphedModel, on_device
from engine.errors import InvalidRequest, UnknownRequest
from engine.kv_cache import TORCH_DTYPES, make_cache
from engine.limits import check_length, check_tokens, end_reason, longest_model_len
from engine.loans import Loan, Loans
from engine.model import Model
from engine.native_model import fastest
from engine.parallel import RankGroup
from engine.pieces import pieces_of
from engine.rank_meter import RankWork
from engine.ranks import LedModel
from engine.request import EngineLoad, FinishReason, OutputToken, Request, RequestOutput, RequestStatus, SamplingParams
from engine.runner import Runner
from engine.scheduler import Chunk, Scheduler
from engine.shard import Shard
from engine.speed import LONG_TOKENS, SpeedMeter, StepTiming
from engine.weights import load_model
from kvstore.blocks import Payload

Progress = Callable[[int, int], object]  # steps done, and of how many


class Engine:
    """One model, its KV cache, and the requests being computed."""

    def __init__(
        self, model_config: ModelConfig, engine_config: EngineConfig, model: Model, group: RankGroup | None = None
    ) -> None:
        """`model` is this rank's part, `model_config` that of the whole model; `group` has the other ranks, if any."""
        self.config = engine_config
        self.layout = kv_layout(model_config, engine_config)
        self.pieces = pieces_of(model_config, engine_config, group.shard if group else Shard())
        self.vocab_size = model_config.vocab_size
        self._cache = make_cache(model_config, engine_config, group)
        num_blocks = self._cache.spare_block
        self.max_model_len = longest_model_len(model_config, engine_config, num_blocks)
        self.eos_token_ids = frozenset(model_config.eos_token_ids)
        self._pool = BlockPool(num_blocks)
        self._scheduler = Scheduler(
            self._pool,
            engine_config.block_size,
            engine_config.max_num_batched_tokens,
            engine_config.max_num_requests,
            engine_config.enable_prefix_caching,
        )
        self._model = on_device(model, self._cache)
        self._led = LedModel(self._model, group, self.vocab_size) if group else None
        self._runner = Runner(self._led or self._model, self._cache.tensor, model_config.eos_token_ids)
        self._pins: Counter[int] = Counter()
        self._loans = Loans(self._pin, self.unpin)
        self.measure_anew()
        self.timing = StepTiming()  # sum over all steps so far; a new object for each step, so any thread may read it

    @classmethod
    def from_pretrained(cls, folder: Path, engine_config: EngineConfig, group: RankGroup | None = None) -> Engine:
        """An engine for a Hugging Face folder; with a `group`, the engine of its leader.

        Raises `UnsupportedModel`, `RanksDisagree`.
        """
        model_config = ModelConfig.from_pretrained(folder)
        layout = kv_layout(model_config, engine_config)
        if group is not None:
            group.agree(layout)
        dtype = TORCH_DTYPES[layout.dtype]
        model = load_model(folder, model_config, dtype, torch.device(engine_config.device), group)
        return cls(model_config, engine_config, fastest(model), group)

    def watch_ranks(self, on_failure: Callable[[BaseException], None]) -> None:
        """From now on calls `on_failure`, on some thread, when a rank is lost while no step runs."""
        if self._led is not None:
            self._led.watch(on_failure)

    def close(self) -> None:
        """Ends the other ranks. Nothing may be computed after this."""
        if self._led is not None:
            self._led.close()

    def warm_up(self, progress: Progress = lambda done, total: None) -> None:
        """Does one-time work before the first request comes: thread pools, libraries, graphs, anything built lazily.

        To be called on the thread that will run the steps. Leaves no request, no block, no cached prefix that anyone
        could hit, and no measurement except `long_prefill_tokens_per_s`: the first steps say little about later ones.
        """
        if self._scheduler.requests:
            raise ValueError("an engine is warmed up before its first request")
        steps: list[Callable[[], object]] = [lambda: run_throw_away(self)]
        if isinstance(self._model, GraphedModel):
            steps += self._model.captures(self.config.max_num_requests, self.max_model_len)
        steps.append(lambda: measure_prefill(self))
        for done, step in enumerate(steps):
            progress(done, len(steps))
            step()
        progress(len(steps), len(steps))
        self._speed.forget()
        self.timing = StepTiming()

    def measure_anew(self) -> None:
        """Forgets how fast steps have been.

        If steps are small, half of one counts as a long chunk, because prompts share steps with decoding requests.
        """
        self._speed = SpeedMeter(min(LONG_TOKENS, max(2, self.config.max_num_batched_tokens // 2)))

    # --- requests ---

    def check(self, request: Request) -> None:
        """Raises `InvalidRequest` for a request that this engine could never run."""
        if not request.num_prompt_tokens:
            raise InvalidRequest("prompt", "must have at least one token")
        if request.block_size != self.layout.block_size:
            raise InvalidRequest("block_size", f"must be {self.layout.block_size}, got {request.block_size}")
        check_tokens("prompt", request.token_ids, self.vocab_size)
        check_length("prompt", request.num_tokens, self.max_model_len)

    def add(self, request: Request, hold: bool = False) -> None:
        """Accepts a request: into the queue, or, with `hold`, giving it blocks for all its tokens and one more at once.

        A held request is not scheduled until `release`, and keeps its blocks. Raises `InvalidRequest`, and with `hold`
        also `NoRoom`; then nothing is kept.
        """
        self.check(request)
        if request.request_id in self._scheduler.requests:
            raise InvalidRequest("request_id", f"{request.request_id!r} is taken by a live request")
        request.arrived_s = time.perf_counter()
        if hold:
            self._scheduler.hold(request)
        else:
            self._scheduler.add(request)

    def lend_blocks(self, request: Request, num_blocks: int) -> Loan | None:
        """Lends the memory of blocks that will be imported to a wire, which writes there. Any thread may call this.

        They are the `num_blocks` right after what a held request has computed, and nobody else's until `end_loan`,
        whatever becomes of the request. What was written counts once it is given to `import_blocks`. None: the memory
        cannot be lent, so payloads have to be copied.
        """
        first = request.num_computed_tokens // self.layout.block_size
        end = min(first + num_blocks, (request.num_tokens - 1) // self.layout.block_size)
        return self._loans.lend(request, first, end, self._cache.views)

    def end_loan(self, loan: Loan, kept_ids: Sequence[int] = ()) -> None:
        """To be called once nothing is written any more. The blocks in `kept_ids` stay pinned until `unpin`."""
        self._loans.end(loan, kept_ids)

    def import_blocks(self, request_id: str, payloads: Sequence[Payload]) -> int:
        """Adopts blocks computed elsewhere, right after what a held request has; returns how many.

        Stops at the first invalid one, and before the block of the last token, which must be computed. Adopts none for
        a request with prompt logprobs, whose whole prompt must be computed. Where blocks travel in pieces, each block
        takes as many payloads as there are pieces here, in the order of `pieces`.
        """
        request = self._held(request_id)
        if request.is_scoring:
            return 0
        first = request.num_computed_tokens // self.layout.block_size
        end = (request.num_tokens - 1) // self.layout.block_size
        adopted, num_pieces = 0, len(self.pieces)
        for block_id in request.block_table[first:end]:
            parts = payloads[adopted * num_pieces : (adopted + 1) * num_pieces]
            if len(parts) < num_pieces or not self._cache.write_block(block_id, parts):
                break
            self._scheduler.adopt_import(request)
            adopted += 1
        return adopted

    def pin_held(self, request_id: str, num_blocks: int) -> list[int]:
        """Pins blocks of a held request, right after what it has computed, for the other ranks to fill.

        Whatever becomes of the request, nobody else gets them until `unpin`.
        """
        request = self._held(request_id)
        first = request.num_computed_tokens // self.layout.block_size
        block_ids = request.block_table[first : first + num_blocks]
        self._pin(block_ids)
        return block_ids

    def release(self, request_id: str, tokens: Sequence[int] = ()) -> None:
        """Lets a held request run, after appending `tokens` that were sampled elsewhere.

        Not to be called while a wire writes into blocks that it has lent. Raises `InvalidRequest` for bad `tokens`.
        """
        request = self._held(request_id)
        check_tokens("tokens", tokens, self.vocab_size)
        check_length("tokens", request.num_tokens + len(tokens), self.max_model_len)
        for token_id in tokens:
            request.append(token_id)
        self._loans.part(request_id, lambda: self._scheduler.release(request))

    def abort(self, request_id: str) -> None:
        """Ends a request in any status and frees its blocks; full computed ones stay cached. Ignores unknown ids."""
        request = self._scheduler.requests.get(request_id)
        if request is not None:
            self._loans.part(request_id, lambda: self._scheduler.remove(request, FinishReason.ABORT))

    def request(self, request_id: str) -> Request:
        """A live request. Raises `UnknownRequest`."""
        try:
            return self._scheduler.requests[request_id]
        except KeyError:
            raise UnknownRequest(request_id) from None

    # --- steps ---

    def has_work(self) -> bool:
        """Whether a request is waiting or running. Held ones do not count: they wait for the caller."""
        return any(request.status is not RequestStatus.HELD for request in self._scheduler.requests.values())

    def step(self) -> list[RequestOutput]:
        """Schedules, computes, samples; returns one output for each request of the step.

        Full blocks come pinned: the caller returns them with `unpin`. An empty list means that nothing can run until
        the caller adds, releases, aborts or unpins something.
        """
        begin = time.perf_counter()
        chunks = self._scheduler.schedule(begin, self._speed.long_prefill_tokens_per_s)
        if not chunks:
            return []
        schedule_s = time.perf_counter() - begin
        for chunk in chunks:
            if chunk.request.started_s is None:
                chunk.request.started_s = begin
        ran = self._runner.run(chunks)
        self._speed.observe(chunks, ran.seconds.total_s)
        self.timing += StepTiming.of_step(chunks, schedule_s, ran.seconds)
        if self._led is not None:
            self._led.end_step(ran.seconds.forward_s)
        for index, scores in ran.scores.items():
            known = chunks[index].request.prompt_logprobs
            assert known is not None
            known.extend(scores)
        return [self._advance(chunk, token) for chunk, token in zip(chunks, ran.tokens, strict=True)]

    def _advance(self, chunk: Chunk, token: OutputToken | InvalidRequest | None) -> RequestOutput:
        request = chunk.request
        full_blocks = self._scheduler.advance(request, chunk.num_tokens)
        self._pin([block.block_id for block in full_blocks])
        if isinstance(token, InvalidRequest):
            self._scheduler.remove(request, FinishReason.FAILED)
            return RequestOutput(request.request_id, (), tuple(full_blocks), FinishReason.FAILED, token)
        finish_reason = None
        if token is not None:
            request.append(token.token_id)
            request.num_new_tokens += 1
            finish_reason = end_reason(request, self.eos_token_ids, self.max_model_len)
            if finish_reason is not None:
                self._scheduler.remove(request, finish_reason)
        tokens = () if token is None else (token,)
        return RequestOutput(request.request_id, tokens, tuple(full_blocks), finish_reason)

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        """The output tokens of each prompt, run to completion together. For tests and offline use."""
        return run_alone(self, prompts, params, self.layout.root())

    # --- blocks that leave ---

    def export_blocks(self, block_ids: Sequence[int], destinations: Sequence[memoryview]) -> list[int]:
        """Copies pinned blocks out, each to its destination of `block_bytes` bytes. Any thread may call this.

        Returns the xxh3_64 of each copied block. Where blocks travel in pieces, use `export_pieces`.
        """
        return self.export_pieces(block_ids, destinations)

    def export_pieces(self, piece_ids: Sequence[int], destinations: Sequence[memoryview]) -> list[int]:
        """The same for pieces; a piece id is block_id * len(pieces) + the piece's index in `pieces`."""
        loose = [piece_id for piece_id in piece_ids if not self._pins[piece_id // len(self.pieces)]]
        if loose:
            raise ValueError(f"blocks {loose} are not pinned: their bytes may change at any time")
        return self._cache.read(piece_ids, destinations)

    def unpin(self, block_ids: Sequence[int]) -> None:
        """Returns the pins that `RequestOutput.full_blocks` came with, one for each time a block was reported."""
        loose = Counter(block_ids) - self._pins
        if loose:
            raise ValueError(f"blocks {sorted(loose)} are not pinned that often")
        self._pins -= Counter(block_ids)
        self._pool.release(block_ids)

    def _pin(self, block_ids: Sequence[int]) -> None:
        self._pool.acquire(block_ids)
        self._pins.update(block_ids)

    # --- questions ---

    @property
    def num_told_steps(self) -> int:
        """Steps sent to the other ranks. When a rank has finished these, its blocks are as current as this rank's."""
        return self._led.num_told_steps if self._led is not None else 0

    @property
    def rank_work(self) -> RankWork:
        """What the leader of a wide node has done so far, in the form the other ranks report; any thread may ask."""
        return self._led.work if self._led is not None else RankWork()

    @property
    def long_prefill_tokens_per_s(self) -> float:
        """Prefill speed of a long prompt, by the newest measurement, or by that of the warm-up; 0.0 if unknown.

        Not part of the load: a node that has run no request yet reports no speed to routers.
        """
        return self._speed.long_prefill_tokens_per_s

    def load(self) -> EngineLoad:
        """A snapshot for heartbeats."""
        requests = self._scheduler.requests.values()
        num_running = sum(request.status is RequestStatus.RUNNING for request in requests)
        return EngineLoad(
            num_running=num_running,
            num_waiting=len(requests) - num_running,
            queued_prefill_tokens=sum(max(0, r.num_prompt_tokens - r.num_computed_tokens) for r in requests),
            free_blocks=self._pool.num_free,
            total_blocks=self._pool.num_blocks,
            prefill_tokens_per_s=self._speed.prefill_tokens_per_s,
            decode_step_s=self._speed.decode_step_s * max(1.0, num_running / self._scheduler.num_places),  # by turns
        )

    def check_integrity(self) -> None:
        """Checks that each block's references are its requests plus its pins. Raises `AssertionError`."""
        holders = Counter(self._pins)
        for request in self._scheduler.requests.values():
            assert request.num_computed_tokens < request.num_tokens, f"{request.request_id} has nothing left to compute"
            assert len(request.block_table) * self.layout.block_size >= request.num_computed_tokens, request.request_id
            holders.update(request.block_table)
        self._pool.check_integrity(holders)

    def _held(self, request_id: str) -> Request:
        request = self.request(request_id)
        if request.status is not RequestStatus.HELD:
            raise UnknownRequest(f"{request_id} is not held, it is {request.status.value}")
        return request
