"""One thread owns the engine; asyncio talks to it.

In: commands, run in order between steps. Out: one call into the event loop per step. When idle, the thread sleeps on
its queue, and a command wakes it. A command runs even if its caller was cancelled meanwhile, so that an unpin or an
abort is never lost. Knows nothing of what the requests are for.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from engine.engine import Engine
from engine.errors import EngineError
from engine.request import RequestOutput

logger = logging.getLogger(__name__)

T = TypeVar("T")


class EngineStopped(EngineError):
    """The engine's thread has ended: it was stopped, or died of the error that is this one's cause."""


@dataclass(frozen=True)
class _Command:
    fn: Callable[[Engine], Any]
    reply: asyncio.Future[Any] | None  # None: nobody waits, and an error ends the engine


@dataclass(frozen=True)
class _Reply:
    future: asyncio.Future[Any]
    value: Any
    error: Exception | None


class OutputStream:
    """The outputs of one request, in order; ends after the one with a finish reason, or when closed.

    The consumer of an output owns the pins of its full blocks. Always call `close` (in `finally`): it returns the
    pins of outputs that were not consumed. Raises `EngineStopped` if the engine ends before the request.
    """

    def __init__(self, request_id: str, on_close: Callable[[OutputStream, list[RequestOutput]], None]) -> None:
        self.request_id = request_id
        self._on_close = on_close
        self._items: asyncio.Queue[RequestOutput | EngineStopped | None] = asyncio.Queue()
        self._is_closed = False

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_closed and self._items.empty():
            raise StopAsyncIteration
        item = await self._items.get()
        if isinstance(item, RequestOutput):
            if item.finish_reason is not None:
                self.close()
            return item
        self._items.put_nowait(item)  # the end stays in the queue, for all waiters and later calls
        if item is None:
            raise StopAsyncIteration
        raise item

    def put(self, output: RequestOutput) -> None:
        self._items.put_nowait(output)

    def fail(self, error: EngineStopped) -> None:
        self._items.put_nowait(error)

    def close(self) -> None:
        """Ends the stream; does nothing the second time."""
        if self._is_closed:
            return
        self._is_closed = True
        unread: list[RequestOutput] = []
        while not self._items.empty():
            item = self._items.get_nowait()
            if isinstance(item, RequestOutput):
                unread.append(item)
        self._items.put_nowait(None)
        self._on_close(self, unread)


class EngineLoop:
    """Runs an engine. All methods must be called on the event loop that called `start`."""

    def __init__(self, engine: Engine, on_failure: Callable[[BaseException], None]) -> None:
        """`on_failure` is called on the engine's thread when a step raises; the engine is unusable after that."""
        self.engine = engine  # other threads use only what is immutable, or listed in its module
        self.last_progress_s = time.monotonic()
        self._on_failure = on_failure
        self._is_busy = False
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()  # None: stop
        self._streams: dict[str, OutputStream] = {}
        self._stopped: EngineStopped | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def stalled_s(self) -> float:
        """Seconds since the last finished step or command while there is something to do; 0.0 when idle."""
        return time.monotonic() - self.last_progress_s if self._is_busy else 0.0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the commands queued so far; open streams and later calls get `EngineStopped`."""
        if self._thread.ident is None:
            return
        self._commands.put(None)
        await self._ended.wait()
        self._thread.join()

    async def call(self, fn: Callable[[Engine], T]) -> T:
        """Runs `fn` on the engine's thread, between steps, and returns what it returns or raises."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._hand_in(_Command(fn, future))
        return await future

    def post(self, fn: Callable[[Engine], object]) -> None:
        """Like `call`, but does not wait, so that a cancelled task can still clean up. `fn` must not raise."""
        if self._stopped is None:
            self._hand_in(_Command(fn, None))

    def abort(self, request_id: str) -> None:
        """Ends a request and its stream, whatever their state. Does not wait."""
        self.post(lambda engine: engine.abort(request_id))
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.close()

    def subscribe(self, request_id: str) -> OutputStream:
        """The outputs of a request, from now on. Blocks of outputs that nobody subscribed to are unpinned at once."""
        if self._stopped is not None:
            raise self._stopped
        if request_id in self._streams:
            raise ValueError(f"request {request_id!r} has a stream already")
        self._streams[request_id] = OutputStream(request_id, self._forget)
        return self._streams[request_id]

    # --- on the event loop ---

    def _hand_in(self, command: _Command) -> None:
        if self._stopped is not None:
            raise self._stopped
        self._commands.put(command)

    def _forget(self, stream: OutputStream, unread: Sequence[RequestOutput]) -> None:
        del self._streams[stream.request_id]
        self._unpin(unread)

    def _unpin(self, outputs: Sequence[RequestOutput]) -> None:
        block_ids = [block.block_id for output in outputs for block in output.full_blocks]
        if block_ids:
            self.post(lambda engine: engine.unpin(block_ids))

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        unheard: list[RequestOutput] = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                unheard.append(output)
            else:
                stream.put(output)
        self._unpin(unheard)

    def _reply(self, replies: Sequence[_Reply]) -> None:
        for reply in replies:
            if reply.future.done():
                continue  # its caller was cancelled
            if reply.error is None:
                reply.future.set_result(reply.value)
            else:
                reply.future.set_exception(reply.error)

    def _end(self, error: BaseException | None) -> None:
        self._stopped = EngineStopped("the engine was stopped" if error is None else f"the engine died: {error!r}")
        self._stopped.__cause__ = error
        for stream in self._streams.values():
            stream.fail(self._stopped)
        while not self._commands.empty():
            command = self._commands.get_nowait()
            if command is not None and command.reply is not None and not command.reply.done():
                command.reply.set_exception(self._stopped)
        self._ended.set()

    # --- on the engine's thread ---

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            if self.engine.config.num_threads > 0:
                torch.set_num_threads(self.engine.config.num_threads)
            self._serve()
        except BaseException as failure:
            error = failure
            logger.exception("event=engine_died")
            self._on_failure(failure)
        finally:
            self._is_busy = False
            self._tell(self._end, error)

    def _serve(self) -> None:
        has_more = False  # to do without a new command
        while self._run_commands(wait=not has_more):
            outputs = self.engine.step() if self.engine.has_work() else []
            self.last_progress_s = time.monotonic()
            if outputs:
                self._tell(self._deliver, outputs)
            has_more = bool(outputs)

    def _run_commands(self, wait: bool) -> bool:
        """Runs the queued commands; with `wait`, at least one. False: it was told to stop."""
        replies: list[_Reply] = []
        try:
            for _ in range(max(int(wait), self._commands.qsize())):  # later commands must not delay the step
                command = self._next()
                if command is None:
                    return False
                reply = self._run_command(command)
                if reply is not None:
                    replies.append(reply)
                self.last_progress_s = time.monotonic()
            return True
        finally:
            if replies:
                self._tell(self._reply, replies)

    def _next(self) -> _Command | None:
        if not self._commands.empty():
            return self._commands.get_nowait()
        self._is_busy = False
        command = self._commands.get()
        self.last_progress_s = time.monotonic()
        self._is_busy = True
        return command

    def _run_command(self, command: _Command) -> _Reply | None:
        if command.reply is None:
            command.fn(self.engine)
            return None
        try:
            return _Reply(command.reply, command.fn(self.engine), None)
        except Exception as error:
            return _Reply(command.reply, None, error)

    def _tell(self, fn: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(fn, *args)
        except RuntimeError:  # the event loop is closed: there is nobody left to work for
            self._commands.put(None)
