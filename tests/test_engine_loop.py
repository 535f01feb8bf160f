"""The engine's thread as asyncio sees it: a real tiny engine, many clients, cancellations, and failures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import eventually
from engine_driver import (
    BLOCK,
    GREEDY,
    Store,
    assert_all_free,
    drive,
    make_engine,
    make_model,
    make_prompt,
    make_request,
)

from engine.engine import Engine
from engine.errors import InvalidRequest, UnknownRequest
from engine.loop import EngineLoop, EngineStopped
from engine.request import EngineLoad, FinishReason, Request, RequestOutput, SamplingParams

LONG = SamplingParams(temperature=0.0, max_tokens=480)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", folder)
    return folder


@pytest.fixture
async def loop(folder: Path) -> AsyncIterator[EngineLoop]:
    failures: list[BaseException] = []
    loop = EngineLoop(make_engine(folder, num_threads=1, max_model_len=512), failures.append)
    loop.start()
    yield loop
    await eventually(lambda: all_free(loop), what="all blocks free")
    await loop.stop()
    assert not failures
    assert_all_free(loop.engine)
    assert not loop._thread.is_alive()


async def all_free(loop: EngineLoop) -> bool:
    load = await loop.call(Engine.load)
    return load.free_blocks == load.total_blocks and load.num_running == load.num_waiting == 0


async def run(loop: EngineLoop, request: Request, hold: bool = False) -> list[int]:
    """As a node would: subscribe, add, take the outputs, give the pins back."""
    tokens: list[int] = []
    stream = loop.subscribe(request.request_id)
    try:
        await loop.call(lambda engine: engine.add(request, hold))
        if hold:
            await loop.call(lambda engine: engine.release(request.request_id))
        async for output in stream:
            tokens += [token.token_id for token in output.tokens]
            give_back(loop, output)
    finally:
        loop.abort(request.request_id)
    return tokens


def give_back(loop: EngineLoop, output: RequestOutput) -> None:
    block_ids = [block.block_id for block in output.full_blocks]
    loop.post(lambda engine: engine.unpin(block_ids))


async def test_many_at_once_get_the_text_that_each_gets_alone(folder: Path, loop: EngineLoop) -> None:
    alone = make_engine(folder)
    prompts = [make_prompt(1 + 3 * i) for i in range(12)]
    expected = [drive(alone, [make_request(alone, "r", prompt)]).ids("r") for prompt in prompts]
    requests = [make_request(loop.engine, str(i), prompt) for i, prompt in enumerate(prompts)]
    results = await asyncio.gather(*(run(loop, request, hold=i % 2 == 0) for i, request in enumerate(requests)))
    assert results == expected


async def test_an_idle_engine_wakes_without_polling(loop: EngineLoop) -> None:
    for turn in range(3):
        await assert_idle(loop)
        assert len(await run(loop, make_request(loop.engine, str(turn), make_prompt(5)))) == GREEDY.max_tokens


async def assert_idle(loop: EngineLoop) -> None:
    """The thread comes to rest, and nothing runs until it is told to."""
    await loop.call(Engine.load)
    await eventually(lambda: loop.stalled_s == 0.0)
    progress = loop.last_progress_s
    await asyncio.sleep(0.05)
    assert loop.last_progress_s == progress, "something ran while there was nothing to do"


async def test_call_returns_what_the_function_returns_or_raises(loop: EngineLoop) -> None:
    thread = await loop.call(lambda _: threading.current_thread())
    assert thread.name == "engine" and thread is not threading.current_thread()
    assert await loop.call(lambda _: torch.get_num_threads()) == 1
    with pytest.raises(InvalidRequest, match="at least one token"):
        await loop.call(lambda engine: engine.add(make_request(engine, "r", [])))
    with pytest.raises(UnknownRequest):
        await loop.call(lambda engine: engine.request("r"))
    assert isinstance(await loop.call(Engine.load), EngineLoad)


async def test_commands_run_in_the_order_they_came(loop: EngineLoop) -> None:
    order: list[int] = []
    calls = [loop.call(lambda _, i=i: order.append(i)) for i in range(50)]  # type: ignore[misc]
    await asyncio.gather(*calls)
    assert order == list(range(50))


async def test_a_call_runs_even_when_its_caller_was_cancelled(loop: EngineLoop) -> None:
    """Or else a cancelled unpin would leak its blocks."""
    gate, ran = threading.Event(), threading.Event()
    blocker = asyncio.create_task(loop.call(lambda _: gate.wait(10)))
    cancelled = asyncio.create_task(loop.call(lambda _: ran.set()))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    gate.set()
    await blocker
    await eventually(ran.is_set)


@pytest.mark.parametrize("taken", [0, 1, 5])
async def test_abort_midway_ends_the_stream_and_frees_all(loop: EngineLoop, taken: int) -> None:
    request = make_request(loop.engine, "r", make_prompt(40), LONG)
    stream = loop.subscribe("r")
    await loop.call(lambda engine: engine.add(request))
    for _ in range(taken):
        give_back(loop, await anext(stream))
    loop.abort("r")
    loop.abort("r")
    assert [output async for output in stream] == []
    await eventually(lambda: all_free(loop))
    assert request.finish_reason is FinishReason.ABORT


async def test_a_cancelled_client_leaves_nothing_behind(loop: EngineLoop) -> None:
    others = [asyncio.create_task(run(loop, make_request(loop.engine, f"o{i}", make_prompt(20 + i)))) for i in range(3)]
    ends = []
    for attempt in range(20):
        request = make_request(loop.engine, f"c{attempt}", make_prompt(30, seed=attempt), LONG)
        task = asyncio.create_task(run(loop, request, hold=attempt % 2 == 0))
        await asyncio.sleep(0.0005 * attempt)
        task.cancel()
        ends += await asyncio.gather(task, return_exceptions=True)
    assert any(isinstance(end, asyncio.CancelledError) for end in ends)  # a fast machine may be done with some
    assert [len(tokens) for tokens in await asyncio.gather(*others)] == [GREEDY.max_tokens] * 3


async def test_a_waiting_reader_is_woken_by_an_abort(loop: EngineLoop) -> None:
    request = make_request(loop.engine, "r", make_prompt(3))
    stream = loop.subscribe("r")
    await loop.call(lambda engine: engine.add(request, hold=True))
    reader = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0.01)
    assert not reader.done()
    loop.abort("r")
    assert await reader is None


async def test_blocks_of_unheard_outputs_are_given_back(loop: EngineLoop) -> None:
    request = make_request(loop.engine, "unheard", make_prompt(5 * BLOCK))
    await loop.call(lambda engine: engine.add(request))
    await eventually(lambda: request.is_finished)


async def test_blocks_of_outputs_that_nobody_took_are_given_back(loop: EngineLoop) -> None:
    request = make_request(loop.engine, "r", make_prompt(5 * BLOCK))
    stream = loop.subscribe("r")
    await loop.call(lambda engine: engine.add(request))
    await eventually(lambda: request.is_finished)
    load = await loop.call(Engine.load)
    assert load.free_blocks < load.total_blocks
    stream.close()
    stream.close()


async def test_an_id_has_one_stream_at_a_time(loop: EngineLoop) -> None:
    stream = loop.subscribe("r")
    with pytest.raises(ValueError, match="has a stream"):
        loop.subscribe("r")
    stream.close()
    assert len(await run(loop, make_request(loop.engine, "r", [1]))) == GREEDY.max_tokens
    loop.subscribe("r").close()


async def test_pins_that_hold_all_up_are_waited_for_without_spinning(folder: Path) -> None:
    engine = make_engine(folder, num_blocks=4)
    loop = EngineLoop(engine, pytest.fail)
    loop.start()
    first = loop.subscribe("first")
    request = make_request(engine, "first", make_prompt(3 * BLOCK), SamplingParams(temperature=0.0, max_tokens=1))
    await loop.call(lambda engine: engine.add(request))
    outputs = [output async for output in first]
    second = asyncio.create_task(run(loop, make_request(engine, "second", make_prompt(2 * BLOCK, seed=1))))
    await eventually(lambda: loop.call(lambda engine: engine.load().num_waiting))
    await assert_idle(loop)
    assert not second.done()
    for output in outputs:
        give_back(loop, output)
    assert len(await second) == GREEDY.max_tokens
    await loop.stop()
    assert_all_free(engine)


async def test_export_from_a_publishers_thread(loop: EngineLoop) -> None:
    """While the engine goes on, another thread copies pinned blocks out."""
    store = Store()
    prompt = make_prompt(6 * BLOCK + 1)
    request = make_request(loop.engine, "r", prompt)
    stream = loop.subscribe("r")
    await loop.call(lambda engine: engine.add(request))

    async def publish(output: RequestOutput) -> None:
        buffers = [bytearray(loop.engine.layout.block_bytes) for _ in output.full_blocks]
        block_ids = [block.block_id for block in output.full_blocks]
        views = [memoryview(buffer) for buffer in buffers]
        await asyncio.to_thread(loop.engine.export_blocks, block_ids, views)
        for block, buffer in zip(output.full_blocks, buffers, strict=True):
            store.blocks[block.block_hash] = bytes(buffer)
        await loop.call(lambda engine: engine.unpin(block_ids))

    tokens: list[int] = []
    publishing = []
    async for output in stream:
        tokens += [token.token_id for token in output.tokens]
        publishing.append(asyncio.create_task(publish(output)))
    await asyncio.gather(*publishing)
    again = make_request(loop.engine, "again", [*prompt, *tokens], GREEDY, num_prompt_tokens=len(prompt))
    assert set(store.blocks) == set(again.block_hashes[: (again.num_tokens - 1) // BLOCK])


# --- the end of the thread ---


async def test_stop_ends_streams_and_calls(folder: Path) -> None:
    loop = EngineLoop(make_engine(folder, max_model_len=512), pytest.fail)
    loop.start()
    task = asyncio.create_task(run(loop, make_request(loop.engine, "r", make_prompt(9), LONG)))
    await eventually(lambda: loop.call(lambda engine: engine.load().num_running))
    await loop.stop()
    await loop.stop()
    with pytest.raises(EngineStopped, match="was stopped"):
        await task
    for act in (lambda: loop.call(Engine.load), lambda: stopped_subscribe(loop)):
        with pytest.raises(EngineStopped):
            await act()
    loop.abort("r")
    loop.post(lambda engine: pytest.fail("ran after the end"))
    assert loop.stalled_s == 0.0


async def stopped_subscribe(loop: EngineLoop) -> None:
    loop.subscribe("s")


async def test_stop_of_a_loop_that_never_started(folder: Path) -> None:
    await EngineLoop(make_engine(folder, max_model_len=512), pytest.fail).stop()


def break_step(engine: Engine) -> None:
    def step() -> list[RequestOutput]:
        raise RuntimeError("the device is gone")

    engine.step = step  # type: ignore[method-assign]


def break_books(engine: Engine) -> None:
    engine.unpin([0])


@pytest.mark.parametrize("harm", [break_step, break_books])
async def test_a_failure_is_told_once_and_nobody_waits_for_ever(folder: Path, harm: Callable[[Engine], None]) -> None:
    failures: list[BaseException] = []
    loop = EngineLoop(make_engine(folder), failures.append)
    loop.start()
    request = make_request(loop.engine, "r", make_prompt(9), LONG)
    stream = loop.subscribe("r")
    await loop.call(lambda engine: engine.add(request, hold=True))
    loop.post(harm)
    late: list[Awaitable[object]] = [asyncio.create_task(loop.call(lambda engine: time.sleep(0.01))) for _ in range(3)]
    loop.post(lambda engine: engine.release("r"))
    with pytest.raises(EngineStopped, match="the engine died") as caught:
        await anext(stream)
    assert failures == [caught.value.__cause__]
    for result in await asyncio.gather(*late, return_exceptions=True):
        assert result is None or isinstance(result, EngineStopped)
    with pytest.raises(EngineStopped):
        await loop.call(Engine.load)
    stream.close()
    await loop.stop()


async def test_a_stalled_step_shows(folder: Path) -> None:
    loop = EngineLoop(make_engine(folder, max_model_len=512), pytest.fail)
    loop.start()
    gate = threading.Event()
    loop.post(lambda _: gate.wait(30))
    await eventually(lambda: loop.stalled_s > 0.05)
    gate.set()
    await eventually(lambda: loop.stalled_s == 0.0)
    await loop.stop()


def test_the_thread_ends_when_the_event_loop_is_gone(folder: Path) -> None:
    """A node that crashed out of asyncio.run must not leave an engine computing for nobody."""
    started: list[EngineLoop] = []

    async def crash() -> None:
        loop = EngineLoop(make_engine(folder, max_model_len=512), pytest.fail)
        started.append(loop)
        loop.start()
        request = make_request(loop.engine, "r", make_prompt(9), LONG)
        await loop.call(lambda engine: engine.add(request))

    asyncio.run(crash())
    started[0]._thread.join(timeout=30)
    assert not started[0]._thread.is_alive()
