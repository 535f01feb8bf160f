"""The endpoints that the model answers: a chat or a completion, as one object or as a stream of events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing

from aiohttp import web

from router.errors import said
from router.frontend import Frontend
from router.http_answers import ChatChoice, Choice, CompletionChoice
from router.http_call import Call, json_answer, large_json_answer
from router.http_errors import failure_of
from router.http_models import ChatRequest, CompletionRequest
from router.http_reply import Reply
from router.http_requests import Asked, ask_chat, ask_completion
from router.http_stream import ClientGone, EventStream, answers
from router.traces import TRACEPARENT, TRACESTATE, Trace

logger = logging.getLogger(__name__)

ID_PREFIXES = {"chat.completion": "chatcmpl", "text_completion": "cmpl"}


class Generation:
    """Those of one router. `stall_s`: how long a stream waits for its client to read."""

    def __init__(self, frontend: Frontend, stall_s: float) -> None:
        self._frontend = frontend
        self._stall_s = stall_s

    async def chat(self, call: Call) -> web.StreamResponse:
        with self._trace(call):
            asked = await call.ask(
                self._frontend.limits.max_message_bytes,
                lambda body: ask_chat(call.read(ChatRequest, body), call.request_id),
            )
            choices = [
                ChatChoice(index, self._frontend.piece, asked.num_logprobs, asked.is_single_call)
                for index in range(asked.num_answers)
            ]
            return await self._answer(call, asked, choices, "chat.completion")

    async def complete(self, call: Call) -> web.StreamResponse:
        with self._trace(call):
            asked = await call.ask(
                self._frontend.limits.max_message_bytes,
                lambda body: ask_completion(call.read(CompletionRequest, body), call.request_id),
            )
            choices = [
                CompletionChoice(index, self._frontend, asked.num_logprobs, asked.echoes_logprobs, asked.shows_prompt)
                for index in range(len(asked.messages) * asked.num_answers)
            ]
            return await self._answer(call, asked, choices, "text_completion")

    def _trace(self, call: Call) -> Trace:
        headers = call.request.headers
        call.trace = self._frontend.traces.begin(headers.get(TRACEPARENT, ""), headers.get(TRACESTATE, ""))
        return call.trace

    async def _answer(self, call: Call, asked: Asked, choices: Sequence[Choice], kind: str) -> web.StreamResponse:
        call.renamed = asked.renamed
        head = {
            "id": f"{ID_PREFIXES[kind]}-{call.request_id}",
            "object": f"{kind}.chunk" if asked.is_stream and asked.is_chat else kind,
            "created": int(time.time()),
            "model": self._frontend.model().model,
        }
        reply = Reply(head, asked, choices, self._frontend.piece)
        return await (self._stream if asked.is_stream else self._whole)(call, asked, reply)

    async def _whole(self, call: Call, asked: Asked, reply: Reply) -> web.StreamResponse:
        async with aclosing(answers(self._frontend, asked.messages, call.caller())) as responses:
            async for prompt, response in responses:
                if reply.is_long(response):
                    await asyncio.to_thread(reply.add, prompt, response)
                else:
                    reply.add(prompt, response)
        return await large_json_answer(reply.whole) if asked.is_large else json_answer(reply.whole())

    async def _stream(self, call: Call, asked: Asked, reply: Reply) -> web.StreamResponse:
        """Until the first response, an error is a status; after it, an event."""
        events = EventStream(call.request, call.headers, self._stall_s)
        is_open = False
        try:
            async with aclosing(answers(self._frontend, asked.messages, call.caller())) as responses:
                async for prompt, response in responses:
                    if not is_open:
                        await events.open()
                        is_open = True
                    is_long = reply.is_long(response)
                    take = reply.event
                    event = await asyncio.to_thread(take, prompt, response) if is_long else take(prompt, response)
                    if event is not None:
                        await events.send(event, is_long)
            last = reply.last()
            if last is not None:
                await events.send(last)
            return await events.finish()
        except ClientGone as gone:
            logger.info("event=client_gone request_id=%s %s", call.request_id, gone)
            return events.abandon()
        except Exception as error:
            if not is_open:
                raise
            failure = failure_of(error, asked.renamed)
            exc_info = failure.status == 500
            logger.info("event=stream_failed request_id=%s %s", call.request_id, said(error), exc_info=exc_info)
            return await events.fail(failure.body)
