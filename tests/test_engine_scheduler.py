"""The scheduler as played by hand: the test computes nothing, it only moves the cursors and appends tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.block_pool import BlockPool
from engine.errors import NoRoom
from engine.request import FinishReason, FullBlock, Request, RequestStatus, SamplingParams
from engine.scheduler import Chunk, Scheduler
from kvstore.blocks import BlockHash

BLOCK = 4
ROOT = BlockHash(bytes(16))


class Play:
    """A scheduler, its pool, and a cursor that "computes" what was scheduled; new tokens are 1000, 1001 and so on."""

    def __init__(self, num_blocks: int = 16, budget: int = 64, max_requests: int = 8, caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, BLOCK, budget, max_requests, caching)
        self.pins: list[list[int]] = []
        self.reported: list[tuple[str, FullBlock]] = []

    def request(self, request_id: str, tokens: Sequence[int] | int, max_tokens: int = 1000) -> Request:
        """A prompt; an int asks for so many tokens that no other prompt begins with."""
        ids = [hash_free(request_id) + i for i in range(tokens)] if isinstance(tokens, int) else list(tokens)
        return Request(request_id, ids, len(ids), SamplingParams(max_tokens=max_tokens), ROOT, BLOCK)

    def add(self, request_id: str, tokens: Sequence[int] | int, max_tokens: int = 1000) -> Request:
        request = self.request(request_id, tokens, max_tokens)
        self.scheduler.add(request)
        return request

    def hold(self, request_id: str, tokens: Sequence[int] | int) -> Request:
        request = self.request(request_id, tokens)
        self.scheduler.hold(request)
        return request

    def hand_on(self, request_id: str, tokens: Sequence[int] | int, num_imported: int | None = None) -> Request:
        """Takes over from a prefill node: a token is there, and the store brings the full blocks, or so many."""
        request = self.hold(request_id, tokens)
        request.append(999)
        for _ in range((request.num_tokens - 1) // BLOCK if num_imported is None else num_imported):
            self.scheduler.adopt_import(request)
        self.scheduler.release(request)
        return request

    def step(self, now_s: float = 0.0, tokens_per_s: float = 0.0) -> dict[str, int]:
        """Runs a step and returns the number of tokens of each request in it."""
        chunks = self.scheduler.schedule(now_s, tokens_per_s)
        for chunk in chunks:
            self.compute(chunk)
        self.check()
        return {chunk.request.request_id: chunk.num_tokens for chunk in chunks}

    def compute(self, chunk: Chunk) -> None:
        request = chunk.request
        assert chunk.start == request.num_computed_tokens and chunk.num_tokens > 0
        assert len(request.block_table) * BLOCK >= chunk.start + chunk.num_tokens
        full = self.scheduler.advance(request, chunk.num_tokens)
        self.reported += [(request.request_id, block) for block in full]
        if chunk.samples:
            assert request.num_computed_tokens == request.num_tokens
            request.append(1000 + request.num_output_tokens)
            if request.num_output_tokens >= request.params.max_tokens:
                self.scheduler.remove(request, FinishReason.LENGTH)

    def check(self) -> None:
        requests = self.scheduler.requests.values()
        holders = Counter(block_id for request in requests for block_id in request.block_table)
        holders.update(block_id for pin in self.pins for block_id in pin)
        self.pool.check_integrity(holders)
        for request in requests:
            assert request.status is not RequestStatus.FINISHED
            assert request.num_computed_tokens < request.num_tokens

    def pin(self, request: Request) -> None:
        self.pins.append(list(request.block_table))
        self.pool.acquire(self.pins[-1])

    def finish(self, request: Request) -> None:
        self.scheduler.remove(request, FinishReason.STOP)
        self.check()


def hash_free(request_id: str) -> int:
    return 10_000 + sum(byte * 131**i for i, byte in enumerate(request_id.encode())) % 30_000


def test_the_cursor_catches_up_in_chunks_and_then_token_by_token() -> None:
    play = Play(budget=5)
    a = play.add("a", 12)
    assert [play.step() for _ in range(4)] == [{"a": 5}, {"a": 5}, {"a": 2}, {"a": 1}]
    assert a.num_output_tokens == 2


def test_decode_comes_first_and_prefill_takes_the_rest_of_the_budget() -> None:
    play = Play(budget=6)
    play.add("a", 3)
    play.step()
    play.add("long", 20)
    play.add("late", 2)
    assert play.step() == {"a": 1, "long": 5}
    assert play.step() == {"a": 1, "long": 5}


def test_a_step_never_exceeds_its_budget_or_its_number_of_requests() -> None:
    play = Play(num_blocks=64, budget=7, max_requests=3)
    for name in "abcdef":
        play.add(name, 5, max_tokens=4)
    for _ in range(40):
        step = play.step()
        assert sum(step.values()) <= 7 and len(step) <= 3
    assert not play.scheduler.requests


def test_waiting_requests_start_in_order_of_arrival() -> None:
    play = Play(num_blocks=4, budget=64)
    play.add("a", 8)
    play.add("b", 12)  # does not fit beside a
    play.add("c", 2)  # would fit, but came later
    assert play.step() == {"a": 8}


def test_a_prompt_starts_only_with_room_for_all_of_it() -> None:
    play = Play(num_blocks=4, budget=4)
    play.add("a", 6, max_tokens=2)
    b = play.add("b", 12)
    assert play.step() == {"a": 4}
    assert play.step() == {"a": 2}
    assert not b.block_table
    play.step()  # a ends
    assert play.step() == {"b": 4}
    assert len(b.block_table) == 3


def test_growth_preempts_the_last_come_and_loses_no_token() -> None:
    play = Play(num_blocks=4, budget=64, caching=False)
    a, b = play.add("a", 8), play.add("b", 7)
    play.step()
    b_tokens = list(b.token_ids)
    assert play.step() == {"a": 1}  # a needs a third block, b gives up its two
    assert b.status is RequestStatus.WAITING and not b.block_table and b.num_computed_tokens == 0
    assert b.token_ids == b_tokens
    play.finish(a)
    assert play.step() == {"b": 8}  # its output token is computed again with the prompt
    assert b.num_output_tokens == 2


def test_a_request_preempted_after_its_turn_is_not_in_the_batch() -> None:
    play = Play(num_blocks=4, budget=6, caching=False)
    a = play.add("a", 8)
    b = play.add("b", 3)
    play.step()  # a: 6
    play.step()  # a: 2, b: 3
    assert b.num_output_tokens == 1
    a.append(7)  # two tokens to catch up with, so b's decode step has its turn before a
    assert play.step() == {"a": 2, "b": 1}
    a.append(8)
    a.append(9)
    a.append(10)
    assert play.step() == {"a": 4}
    assert b.status is RequestStatus.WAITING


def test_with_nobody_later_to_take_from_a_request_stalls_with_its_blocks() -> None:
    play = Play(num_blocks=4)
    a = play.add("a", 8)
    play.step()
    held = play.hold("h", 3)
    pinned = play.pool.allocate(1)
    assert play.scheduler.schedule() == []  # the held one is not taken from, though it came later
    assert a.status is RequestStatus.RUNNING and len(a.block_table) == 2
    play.pool.release(pinned)
    assert play.step() == {"a": 1}
    assert held.status is RequestStatus.HELD and len(held.block_table) == 1


def test_a_victim_that_would_free_nothing_is_left_alone() -> None:
    play = Play(num_blocks=4)
    a, b = play.add("a", 8), play.add("b", 7)
    play.step()
    play.pin(b)
    assert play.step() == {"b": 1}
    assert a.status is RequestStatus.RUNNING and b.status is RequestStatus.RUNNING


def test_a_prefix_hit_is_adopted_and_its_last_token_is_computed() -> None:
    play = Play()
    prompt = list(range(2 * BLOCK))
    play.add("a", prompt, max_tokens=1)
    play.step()
    whole = play.add("same", prompt)
    longer = play.add("longer", [*prompt, 1, 2])
    assert play.step() == {"same": BLOCK, "longer": 2}
    assert whole.num_local_hit_tokens == BLOCK
    assert longer.num_local_hit_tokens == 2 * BLOCK
    assert whole.block_table[0] == longer.block_table[0]


def test_without_prefix_caching_nothing_is_shared() -> None:
    play = Play(caching=False)
    prompt = list(range(2 * BLOCK))
    play.add("a", prompt, max_tokens=1)
    play.step()
    b = play.add("b", prompt)
    assert play.step() == {"b": 2 * BLOCK}
    assert b.num_local_hit_tokens == 0
    assert [name for name, _ in play.reported] == ["a", "a", "b", "b"]


def test_full_blocks_are_reported_once_for_each_request_local_hits_too() -> None:
    play = Play(num_blocks=6, budget=3)
    a = play.add("a", 10, max_tokens=7)
    while not a.is_finished:
        play.step()
    assert [block.block_hash for _, block in play.reported] == a.block_hashes[:4]  # 16 of 17 tokens are computed
    b = play.add("b", a.token_ids[:10])
    play.step()
    assert b.num_local_hit_tokens == 8
    assert [block.block_hash for name, block in play.reported if name == "b"] == b.block_hashes[:2]


def test_a_preempted_request_finds_its_blocks_again_and_reports_none_twice() -> None:
    play = Play(num_blocks=5)
    a, b = play.add("a", 8), play.add("b", 10)
    play.step()
    while b.status is RequestStatus.RUNNING:
        play.step()
    play.finish(a)
    before = len(play.reported)
    tokens = play.step()["b"]
    assert tokens < b.num_tokens
    assert b.num_local_hit_tokens == 0  # they were its own
    hashes = [block.block_hash for name, block in play.reported if name == "b"]
    assert len(set(hashes)) == len(hashes)
    assert len(play.reported) >= before


def test_two_requests_compute_the_same_block_at_once() -> None:
    play = Play()
    prompt = list(range(2 * BLOCK + 1))
    a, b = play.add("a", prompt), play.add("b", prompt)
    assert play.step() == {"a": 9, "b": 9}
    assert set(a.block_table).isdisjoint(b.block_table)
    c = play.add("c", prompt)
    play.step()
    assert c.block_table[:2] == a.block_table[:2]
    for request in (a, c, b):
        play.finish(request)
    assert play.pool.num_free == 16


def test_a_sibling_that_came_too_early_for_a_hit_takes_over_what_was_computed_meanwhile() -> None:
    play = Play(budget=2 * BLOCK)
    prefix = list(range(4 * BLOCK))
    first, second = play.hold("first", [*prefix, 1]), play.hold("second", [*prefix, 2, 3])
    free = play.pool.num_free
    for request in (first, second):
        play.scheduler.release(request)
    assert play.step() == {"first": 8}
    assert play.step() == {"first": 8}
    assert play.step() == {"first": 1, "second": 2}
    assert second.block_table[:4] == first.block_table[:4] and play.pool.num_free == free + 4
    assert (second.num_late_hit_tokens, second.num_local_hit_tokens) == (16, 0)
    names = [name for name, _ in play.reported]
    assert names.count("first") == names.count("second") == 4, "each says which blocks it has"


def test_a_block_that_is_half_computed_is_given_up_for_a_whole_one() -> None:
    play = Play(budget=BLOCK + 2)
    prefix = list(range(3 * BLOCK))
    slow = play.add("slow", [*prefix, 1])
    play.step()
    assert slow.num_computed_tokens == BLOCK + 2
    quick = play.request("quick", [*prefix, 2])
    quick.priority = -1
    play.scheduler.add(quick)
    while quick.num_computed_tokens < len(prefix):
        play.step(0.0, 10.0)
    play.finish(quick)
    assert play.step() == {"slow": 1}
    assert slow.num_late_hit_tokens % BLOCK, "it was in the middle of a block"


def test_a_hold_takes_room_for_one_more_token_or_nothing() -> None:
    play = Play(num_blocks=4)
    held = play.hold("h", 8)
    assert len(held.block_table) == 3 and held.status is RequestStatus.HELD
    assert play.step() == {}
    with pytest.raises(NoRoom):
        play.hold("i", 4)
    assert play.pool.num_free == 1 and "i" not in play.scheduler.requests
    held.append(5)
    play.scheduler.release(held)
    assert play.step() == {"h": 9}


def test_a_hold_is_refused_while_a_preempted_request_waits_for_that_room() -> None:
    play = Play(num_blocks=4)
    a, b = play.add("a", 8), play.add("b", 8)
    play.step()
    play.step()
    assert b.status is RequestStatus.WAITING and play.pool.num_free == 1
    with pytest.raises(NoRoom):
        play.hold("h", 3)
    play.finish(a)
    assert play.hold("h", 3).status is RequestStatus.HELD  # 4 free, 3 set aside for b


def test_released_requests_overtake_a_preempted_one_without_room() -> None:
    play = Play(num_blocks=6)
    a, b = play.add("a", 12), play.add("b", 7)
    ready = play.hold("ready", 3)
    play.step()
    assert play.step() == {"a": 1}  # took a block of b's
    assert b.status is RequestStatus.WAITING and play.pool.num_free == 1
    play.scheduler.release(ready)
    assert play.step() == {"a": 1, "ready": 3}
    play.finish(a)
    assert play.step() == {"ready": 1, "b": 4}  # the rest of b was still cached


def test_waiting_requests_that_hold_what_others_need_do_not_deadlock() -> None:
    play = Play(num_blocks=4, budget=64, caching=False)
    first, second = play.hold("first", 4), play.hold("second", 4)  # two blocks each: none is free
    for request in (first, second):
        for token in range(5):
            request.append(token)  # a failover brought more tokens than were held for: three blocks each
        play.scheduler.release(request)
    assert play.step() == {"first": 9}
    assert not second.block_table
    play.finish(first)
    assert play.step() == {"second": 9}


def test_an_older_waiting_request_with_blocks_is_not_locked_out_by_the_batch_limit() -> None:
    play = Play(num_blocks=4, max_requests=1, caching=False)
    older = play.hold("older", 6)
    younger = play.add("younger", 8)
    play.step()
    play.scheduler.release(older)
    assert play.step() == {"older": 6}  # younger stalls for want of a third block
    assert younger.status is RequestStatus.RUNNING


def test_more_decodes_than_a_step_takes_go_by_turns() -> None:
    play = Play(num_blocks=32, max_requests=2)
    streams = [play.hand_on(name, 8 + length) for length, name in enumerate("abc")]
    assert [list(play.step()) for _ in range(4)] == [["a", "b"], ["c", "a"], ["b", "c"], ["a", "b"]]
    for _ in range(8):
        play.step()
        counts = [request.num_output_tokens for request in streams]
        assert max(counts) - min(counts) <= 1
    assert sum(counts) == 3 + 2 * 12
    play.finish(streams[1])
    assert [list(play.step()) for _ in range(2)] == [["a", "c"], ["a", "c"]]


@pytest.mark.parametrize("budget", [3, 64])
@pytest.mark.parametrize("speed", [0.0, 10.0])
def test_a_stream_comes_to_the_end_of_the_turns_however_many_there_are(budget: int, speed: float) -> None:
    play = Play(num_blocks=256, budget=budget, max_requests=4)
    streams = [play.hand_on(f"{number}", 8 + number % 5) for number in range(20)]
    last: dict[str, int] = {}
    for step in range(60):
        for name in play.step(0.0, speed):
            last[name] = step
        if step >= 40:
            assert len(last) == 20 and step - min(last.values()) <= 20 / min(budget, 4) + 1
    assert min(request.num_output_tokens for request in streams) > 5


@pytest.mark.parametrize("speed", [0.0, 10.0])
def test_a_prompt_gets_a_place_beside_decodes_that_go_by_turns(speed: float) -> None:
    play = Play(num_blocks=64, budget=8, max_requests=3)
    streams = [play.hand_on(name, 8) for name in "abcd"]
    play.add("prompt", 20, max_tokens=1)
    steps = [play.step(0.0, speed) for _ in range(4)]
    assert [step.pop("prompt") for step in steps] == [6, 6, 6, 2]
    assert [list(step) for step in steps] == [["a", "b"], ["c", "d"], ["a", "b"], ["c", "d"]]
    assert play.step() == {"a": 1, "b": 1, "c": 1} and not play.scheduler.requests.keys() - set("abcd")
    assert [request.num_output_tokens for request in streams] == [4, 4, 4, 3]


def test_a_stream_whose_blocks_did_not_come_is_computed_beside_the_others() -> None:
    play = Play(num_blocks=64, budget=8, max_requests=2)
    for name in "ab":
        play.hand_on(name, 8)
    play.hand_on("missed", 12, num_imported=0)
    steps = [play.step(0.0, 10.0) for _ in range(4)]
    assert [list(step.items()) for step in steps[:2]] == [[("a", 1), ("missed", 7)], [("b", 1), ("missed", 6)]]
    assert [list(step) for step in steps[2:]] == [["a", "b"], ["missed", "a"]]


def test_a_step_that_takes_all_goes_by_arrival() -> None:
    play = Play(num_blocks=64, max_requests=4)
    for name in "abc":
        play.hand_on(name, 8)
    play.add("prompt", 10)
    assert list(play.step()) == ["a", "b", "c", "prompt"]
    play.add("late", 10)
    for _ in range(3):
        assert list(play.step()) == ["a", "b", "c", "prompt"], "a prompt waits for one of them to end, as ever"


def test_turns_change_nothing_about_who_is_preempted() -> None:
    play = Play(num_blocks=9, max_requests=2, caching=False)
    streams = [play.hand_on(name, 7) for name in "abc"]  # two blocks each, and a third as they grow
    for _ in range(6):
        play.step()
    assert play.pool.num_free == 0
    for _ in range(6):
        play.step()
    statuses = [request.status for request in streams]
    assert statuses == [RequestStatus.RUNNING, RequestStatus.RUNNING, RequestStatus.WAITING], "the last come gave way"


def test_the_shortest_prompt_goes_first_also_before_one_that_has_begun() -> None:
    play = Play(num_blocks=64, budget=10)
    play.add("long", 40)
    assert play.step(0.0, 10.0) == {"long": 10}
    for name, tokens in (("middle", 20), ("short", 6)):
        play.add(name, tokens)
    assert play.step(0.0, 10.0) == {"short": 6, "middle": 4}
    assert play.step(0.0, 10.0) == {"short": 1, "middle": 9}
    assert play.step(0.0, 10.0) == {"short": 1, "middle": 7, "long": 2}


def test_who_has_waited_long_enough_goes_before_a_shorter_one() -> None:
    play = Play(num_blocks=64, budget=10)
    play.add("long", 30)  # 3 s, as much as 60 s of waiting
    late = play.request("late", 10)  # 1 s
    late.arrived_s = 39.0
    play.scheduler.add(late)
    assert play.step(39.0, 10.0) == {"late": 10}
    for name, arrived_s in (("later", 39.0), ("latest", 41.0)):
        request = play.request(name, 10)
        request.arrived_s = arrived_s
        play.scheduler.add(request)
    play.finish(late)
    assert list(play.step(41.0, 10.0)) == ["later"], "less than 40 s behind"
    assert list(play.step(41.0, 10.0)) == ["later", "long"]


def test_a_smaller_priority_goes_first() -> None:
    play = Play(num_blocks=64, budget=10)
    play.add("short", 10)
    urgent = play.request("urgent", 40)
    urgent.priority = -1
    play.scheduler.add(urgent)
    assert list(play.step(0.0, 10.0)) == ["urgent"]
    assert list(play.step(101.0, 10.0)) == ["urgent"], "both have waited"


@pytest.mark.parametrize("limits", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_limits_that_no_step_could_keep_are_refused(limits: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Scheduler(BlockPool(1), *limits)


class Life(RuleBasedStateMachine):
    """Requests come, are held, released, pinned and aborted between steps, in any order and at any pressure."""

    @initialize(budget=st.integers(1, 20), max_requests=st.integers(1, 4), caching=st.booleans())
    def start(self, budget: int, max_requests: int, caching: bool) -> None:
        self.play = Play(num_blocks=8, budget=budget, max_requests=max_requests, caching=caching)
        self.count = 0

    def some(self, data: st.DataObject, *statuses: RequestStatus) -> Request | None:
        live = [r for r in self.play.scheduler.requests.values() if not statuses or r.status in statuses]
        return data.draw(st.sampled_from(live)) if live else None

    @rule(size=st.integers(1, 20), max_tokens=st.integers(1, 12), hold=st.booleans())
    def arrive(self, size: int, max_tokens: int, hold: bool) -> None:
        self.count += 1
        request = self.play.request(str(self.count), [size % 2] * size, max_tokens)  # few prompts: many hits
        if not hold:
            self.play.scheduler.add(request)
            return
        free = self.play.pool.num_free
        try:
            self.play.scheduler.hold(request)
            assert len(request.block_table) * BLOCK > size
        except NoRoom:
            assert not request.block_table and self.play.pool.num_free == free

    @rule(data=st.data(), num_tokens=st.integers(0, 11))
    def release(self, data: st.DataObject, num_tokens: int) -> None:
        if request := self.some(data, RequestStatus.HELD):
            for token in range(num_tokens):
                request.append(token)
            self.play.scheduler.release(request)

    @rule(data=st.data())
    def bring(self, data: st.DataObject) -> None:
        request = self.some(data, RequestStatus.HELD)
        if request and request.num_computed_tokens // BLOCK < (request.num_tokens - 1) // BLOCK:
            self.play.scheduler.adopt_import(request)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if request := self.some(data):
            self.play.scheduler.remove(request, FinishReason.ABORT)

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        if request := self.some(data):
            self.play.pin(request)

    @rule()
    def unpin(self) -> None:
        if self.play.pins:
            self.play.pool.release(self.play.pins.pop())

    @rule(tokens_per_s=st.sampled_from([0.0, 1.0, 100.0]))
    def step(self, tokens_per_s: float) -> None:
        if not self.play.step(0.0, tokens_per_s):
            assert not self.play.step(0.0, tokens_per_s), (
                "an empty batch must stay empty until the caller changes something"
            )

    @invariant()
    def books_add_up(self) -> None:
        if hasattr(self, "play"):
            self.play.check()

    def teardown(self) -> None:
        if not hasattr(self, "play"):
            return
        while self.play.pins:
            self.unpin()
        for request in self.play.scheduler.requests.values():
            if request.status is RequestStatus.HELD:
                self.play.scheduler.release(request)
        while self.play.scheduler.requests:
            assert self.play.step(), "live requests, nothing pinned or held, and yet an empty batch"
        assert self.play.pool.num_free == 8
        hashes = [(name, block.block_hash) for name, block in self.play.reported]
        assert len(set(hashes)) == len(hashes)


Life.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
