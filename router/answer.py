"""From a request's tokens to its client's responses: text, token ids, and at the end finish reason, usage, timeline."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from batonpb import common_pb2, inference_pb2
from router.detokenizer import TextStream, detokenizer
from router.journey import UNFINISHED, Progress, RoutedRequest
from router.timeline import Timeline
from router.tokenizer import Decoder
from router.tools import ToolCallParser

logger = logging.getLogger(__name__)

STOP = common_pb2.FINISH_REASON_STOP


@dataclass(frozen=True)
class Form:
    """The form of one answer."""

    request_id: str  # the call's id, shared by its n answers
    index: int = 0
    stops: Sequence[str] = ()
    keeps_stop: bool = False  # the output includes what ended it
    echo: str = ""  # text that comes first
    calls_tools: bool = False
    is_silent: bool = False  # no output is shown: max_tokens was 0


class Answer:
    """One request's responses, one for each `Progress`. The first with a finish reason is the last."""

    def __init__(self, request: RoutedRequest, form: Form, decoder: Decoder, timeline: Timeline) -> None:
        self._request = request
        self._form = form
        self._timeline = timeline
        words = detokenizer(decoder, request.prompt_ids)
        self._text = TextStream(words, form.stops, request.end_ids, request.sampling.min_tokens, form.keeps_stop)
        self._calls = ToolCallParser(f"{form.request_id}/{form.index}") if form.calls_tools else None
        self._lead = form.echo
        self._num_tokens = 0
        self._is_first = True

    def respond(self, progress: Progress) -> inference_pb2.GenerateResponse:
        """Tokens at once, their text as far as it is final. A stop string ends the request, whatever follows it."""
        if self._form.is_silent:
            progress = _silenced(progress)
        text, tokens, reason = self._text, [], progress.finish_reason
        pieces: list[str] = []
        for token in progress.tokens:
            tokens.append(token)
            pieces.append(text.feed(token.token_id))
            if text.is_stopped:
                break
        if reason and not text.is_stopped:
            pieces.append(text.finish(ended_by_token=reason == STOP))
        self._num_tokens += len(tokens)
        response = inference_pb2.GenerateResponse(
            request_id=self._form.request_id,
            index=self._form.index,
            text="".join(pieces),
            tokens=tokens,
            finish_reason=STOP if text.is_stopped else reason,
        )
        if self._calls is not None:
            self._part(response, self._calls)
        response.text, self._lead = self._lead + response.text, ""
        if progress.prompt_logprobs is not None:
            response.prompt_logprobs.CopyFrom(progress.prompt_logprobs)
        if self._is_first:
            response.prompt_tokens, self._is_first = len(self._request.prompt_ids), False
        if response.finish_reason:
            self._conclude(response)
        return response

    def _part(self, response: inference_pb2.GenerateResponse, parser: ToolCallParser) -> None:
        """Extracts tool calls from a response's text."""
        response.text, calls = parser.feed(response.text)
        response.tool_calls.extend(calls)
        if response.finish_reason:
            rest, calls = parser.finish()
            response.text += rest
            response.tool_calls.extend(calls)
            if response.finish_reason == STOP and parser.num_calls:
                response.finish_reason = common_pb2.FINISH_REASON_TOOL_CALLS

    def _conclude(self, response: inference_pb2.GenerateResponse) -> None:
        timeline = self._timeline.finish(self._num_tokens)
        usage = self._timeline.usage(len(self._request.prompt_ids), self._num_tokens)
        response.timeline.CopyFrom(timeline)
        response.usage.CopyFrom(usage)
        logger.info(
            "request_id=%s event=finished trace_id=%s reason=%s prompt_tokens=%d cached_tokens=%d output_tokens=%d "
            "prefill=%s decode=%s migrations=%d predicted_ttft_s=%.4f ttft_s=%.4f tpot_s=%.4f total_s=%.4f",
            *(
                self._request.request_id,
                self._request.trace.trace_id,
                common_pb2.FinishReason.Name(response.finish_reason),
            ),
            *(usage.prompt_tokens, usage.cached_tokens, usage.output_tokens),
            *(timeline.prefill_node or "-", timeline.decode_node, timeline.migrations, timeline.predicted_ttft_s),
            *(timeline.first_token_s, timeline.tpot_s, timeline.finished_s),
        )


def _silenced(progress: Progress) -> Progress:
    """Drops the token of a request with max_tokens 0 (a node makes at least one); the finish reason is LENGTH."""
    reason = common_pb2.FINISH_REASON_LENGTH if progress.finish_reason else UNFINISHED
    return Progress((), reason, progress.prompt_logprobs)
