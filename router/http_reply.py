"""What a call's client reads of the core's responses: events of a stream, or one object of all of them. Pure.

A response may be long to show (`is_long`) for the sake of a prompt's logprobs; the others take microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from batonpb import inference_pb2
from router.http_answers import Choice
from router.http_requests import Asked
from router.http_scores import Entries, Json, Piece, prompt_entries


class Reply:
    """One call's. `event` and `last` make a stream, `add` and `whole` one object. `head` is in each of them."""

    def __init__(self, head: Json, asked: Asked, choices: Sequence[Choice], piece: Piece) -> None:
        self._head = head
        self._asked = asked
        self._is_scored = asked.is_scored
        self._shows_beside = asked.is_scored and asked.is_chat
        self._choices = choices
        self._piece = piece
        self._totals = _Totals(len(asked.messages))
        self._counts = _Counts(len(choices))
        self._entries = Entries()
        self._beside: Json = {}  # the choices, as it is of all of them; in a stream until an event has had it

    def is_long(self, response: inference_pb2.GenerateResponse) -> bool:
        """Whether it brings a prompt's logprobs that are shown. A chat shows them once, whatever its answers."""
        if not (self._is_scored and response.HasField("prompt_logprobs")):
            return False
        return not (self._shows_beside and response.index)

    def event(self, prompt: int, response: inference_pb2.GenerateResponse) -> Json | None:
        """The next event, of a response to that prompt of the call; None: nothing to show yet."""
        index = self._take(prompt, response)
        self._counts.add(index, response)
        delta = self._choices[index].delta(response)
        if delta is None:
            return None
        event = {**self._head, "choices": [delta]}
        if self._beside:
            event |= self._beside
            self._beside = {}
        if self._asked.includes_usage:
            event["usage"] = self._counts.usage(index) if self._asked.counts_usage else None
        return event

    def last(self) -> Json | None:
        """The event behind all others, where one was asked for. Raises `RuntimeError` where an answer has no end."""
        self._check_ends()
        if not self._asked.includes_usage:
            return None
        return {**self._head, "choices": [], "usage": self._totals.usage()}

    def add(self, prompt: int, response: inference_pb2.GenerateResponse) -> None:
        """Raises `InvalidRequest` for more of prompts' logprobs than one object may have."""
        if self.is_long(response):
            self._entries.add(response.prompt_logprobs)
        self._choices[self._take(prompt, response)].add(response)

    def whole(self) -> Json:
        """Raises `RuntimeError` where an answer has no end."""
        self._check_ends()
        choices = [choice.whole() for choice in self._choices]
        return {**self._head, "choices": choices, "usage": self._totals.usage(), **self._beside}

    def _take(self, prompt: int, response: inference_pb2.GenerateResponse) -> int:
        """Notes what is not of one choice alone; returns whose the response is."""
        if response.finish_reason:
            self._totals.add(prompt, response.usage)
        if self._shows_beside and self.is_long(response):
            self._beside = {"prompt_logprobs": prompt_entries(response.prompt_logprobs, self._piece)}
        return prompt * self._asked.num_answers + response.index

    def _check_ends(self) -> None:
        num_ended = self._totals.num_answers
        if num_ended != len(self._choices):
            raise RuntimeError(f"the core ended after {num_ended} of {len(self._choices)} answers")


class _Totals:
    """A call's usage. A prompt counts once, whatever its answers; it was cached as far as all of them found it."""

    def __init__(self, num_prompts: int) -> None:
        self.num_answers = 0  # that have ended
        self._prompt_tokens = [0] * num_prompts
        self._cached_tokens: list[int | None] = [None] * num_prompts
        self._output_tokens = 0

    def add(self, prompt: int, usage: inference_pb2.Usage) -> None:
        """An answer to that prompt has ended."""
        self.num_answers += 1
        self._prompt_tokens[prompt] = usage.prompt_tokens
        known = self._cached_tokens[prompt]
        self._cached_tokens[prompt] = usage.cached_tokens if known is None else min(known, usage.cached_tokens)
        self._output_tokens += usage.output_tokens

    def usage(self) -> Json:
        prompt_tokens = sum(self._prompt_tokens)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._output_tokens,
            "total_tokens": prompt_tokens + self._output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached or 0 for cached in self._cached_tokens)},
        }


class _Counts:
    """How far each choice of a stream has come."""

    def __init__(self, num_choices: int) -> None:
        self._prompt_tokens = [0] * num_choices
        self._output_tokens = [0] * num_choices

    def add(self, index: int, response: inference_pb2.GenerateResponse) -> None:
        self._prompt_tokens[index] += response.prompt_tokens
        self._output_tokens[index] += len(response.tokens)

    def usage(self, index: int) -> Json:
        prompt_tokens, output_tokens = self._prompt_tokens[index], self._output_tokens[index]
        total = prompt_tokens + output_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens, "total_tokens": total}
