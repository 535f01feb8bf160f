"""From the core's responses to what OpenAI's clients read: dicts, ready for JSON. Pure; no pydantic, to be quick.

A `Choice` is one of a call's answers. `delta` makes a stream's next piece of a response, `add` and `whole` one object
of all of them.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from batonpb import common_pb2, inference_pb2
from router.http_scores import Json, Piece, finite, prompt_entries, scored

FINISH = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


class Choice(Protocol):
    """One answer of a call, as it grows. `prompt_logprobs`: where they are to be shown by themselves."""

    prompt_logprobs: list[Json | None] | None

    def delta(self, response: inference_pb2.GenerateResponse) -> Json | None:
        """What is new, for a stream; None: nothing to show yet."""
        ...

    def add(self, response: inference_pb2.GenerateResponse) -> None: ...

    def whole(self) -> Json: ...


class ChatChoice:
    """Of a chat. `num_logprobs` None: none are shown. `is_single_call`: the first tool call alone is shown."""

    def __init__(
        self, index: int, piece: Piece, num_logprobs: int | None, is_single_call: bool, shows_prompt: bool = False
    ) -> None:
        self.prompt_logprobs: list[Json | None] | None = None
        self._shows_prompt = shows_prompt
        self._index = index
        self._piece = piece
        self._num_logprobs = num_logprobs
        self._is_single_call = is_single_call
        self._has_begun = False
        self._texts: list[str] = []
        self._calls: list[Json] = []
        self._logprobs: list[Json] = []
        self._finish: str | None = None

    def delta(self, response: inference_pb2.GenerateResponse) -> Json | None:
        calls, finish = self._new_calls(response), FINISH.get(response.finish_reason)
        entries = self._entries(response.tokens)
        if not (response.text or calls or entries or finish):
            return None
        delta: Json = {} if self._has_begun else {"role": "assistant", "content": ""}
        self._has_begun = True
        if response.text:
            delta["content"] = response.text
        if calls:
            delta["tool_calls"] = [{"index": index, **call} for index, call in calls]
        logprobs = None if entries is None else {"content": entries, "refusal": None}
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        self._texts.append(response.text)
        self._new_calls(response)
        if self._shows_prompt and response.HasField("prompt_logprobs"):
            self.prompt_logprobs = prompt_entries(response.prompt_logprobs, self._piece)
        self._logprobs += self._entries(response.tokens) or ()
        self._finish = FINISH.get(response.finish_reason)

    def whole(self) -> Json:
        text = "".join(self._texts)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message |= {"content": text or None, "tool_calls": self._calls}
        logprobs = None if self._num_logprobs is None else {"content": self._logprobs, "refusal": None}
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": self._finish}

    def _new_calls(self, response: inference_pb2.GenerateResponse) -> list[tuple[int, Json]]:
        new = []
        for call in response.tool_calls:
            if self._calls and self._is_single_call:
                break
            function = {"name": call.name, "arguments": call.arguments}
            new.append((len(self._calls), {"id": call.id, "type": "function", "function": function}))
            self._calls.append(new[-1][1])
        return new

    def _entries(self, tokens: Iterable[common_pb2.Token]) -> list[Json] | None:
        if self._num_logprobs is None:
            return None
        entries = []
        for token in tokens:
            entry = self._entry(token.token_id, token.logprobs.logprob)
            entry["top_logprobs"] = [self._entry(top.token_id, top.logprob) for top in token.logprobs.top]
            entries.append(entry)
        return entries

    def _entry(self, token_id: int, logprob: float) -> Json:
        data = self._piece(token_id)
        return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}


class CompletionChoice:
    """Of a completion. A token that is no text by itself is shown as OpenAI shows it: bytes:\\xe2\\x82.

    `is_text` None: the prompt's logprobs do not come before the output's; else it says which tokens are part of a text.
    """

    def __init__(
        self,
        index: int,
        piece: Piece,
        num_logprobs: int | None,
        is_text: Callable[[int], bool] | None = None,
        shows_prompt: bool = False,
    ) -> None:
        self.prompt_logprobs: list[Json | None] | None = None
        self._is_text = is_text
        self._shows_prompt = shows_prompt
        self._index = index
        self._piece = piece
        self._num_logprobs = num_logprobs
        self._texts: list[str] = []
        self._logprobs = _empty_logprobs(num_logprobs)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # of the next token's text, in characters
        self._finish: str | None = None

    def delta(self, response: inference_pb2.GenerateResponse) -> Json | None:
        finish, logprobs = FINISH.get(response.finish_reason), self._lists(response)
        if not (response.text or finish or (logprobs and logprobs["tokens"])):
            return None
        return {"index": self._index, "text": response.text, "logprobs": logprobs, "finish_reason": finish}

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        self._texts.append(response.text)
        if self._shows_prompt and response.HasField("prompt_logprobs"):
            self.prompt_logprobs = prompt_entries(response.prompt_logprobs, self._piece)
        new = self._lists(response)
        if new is not None:
            for name, values in new.items():
                if values is not None:
                    self._logprobs[name] += values
        self._finish = FINISH.get(response.finish_reason)

    def whole(self) -> Json:
        logprobs = None if self._num_logprobs is None else self._logprobs
        text = "".join(self._texts)
        whole = {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": self._finish}
        return whole | {"prompt_logprobs": self.prompt_logprobs} if self._shows_prompt else whole

    def _lists(self, response: inference_pb2.GenerateResponse) -> Json | None:
        if self._num_logprobs is None:
            return None
        lists = _empty_logprobs(self._num_logprobs)
        if self._is_text is not None and response.HasField("prompt_logprobs"):
            self._begin_with(lists, response.prompt_logprobs, self._is_text)
        for token in response.tokens:
            data = self._piece(token.token_id)
            logprob = finite(token.logprobs.logprob)
            lists["tokens"].append(_word(data))
            lists["token_logprobs"].append(logprob)
            lists["text_offset"].append(self._offset)
            self._offset += len(self._utf8.decode(data))
            if self._num_logprobs:
                tops = [(_word(self._piece(top.token_id)), finite(top.logprob)) for top in token.logprobs.top]
                lists["top_logprobs"].append(dict(reversed(tops)) | {_word(data): logprob})
        return lists

    def _begin_with(self, lists: Json, scores: common_pb2.PromptLogprobs, is_text: Callable[[int], bool]) -> None:
        """The prompt's tokens, of which the first has no logprob."""
        for token in scored(scores):
            data = self._piece(token.token_id)
            lists["tokens"].append(_word(data))
            lists["token_logprobs"].append(token.logprob)
            lists["text_offset"].append(self._offset)
            if is_text(token.token_id):
                self._offset += len(self._utf8.decode(data))
            if self._num_logprobs:
                tops = [(_word(self._piece(one)), logprob) for one, logprob in token.top[: self._num_logprobs]]
                known = None if token.logprob is None else dict(reversed(tops)) | {_word(data): token.logprob}
                lists["top_logprobs"].append(known)


class Totals:
    """A call's usage. A prompt counts once, whatever its answers; it was cached as far as all of them found it."""

    def __init__(self, num_prompts: int) -> None:
        self._prompt_tokens = [0] * num_prompts
        self._cached_tokens: list[int | None] = [None] * num_prompts
        self._output_tokens = 0

    def add(self, prompt: int, usage: inference_pb2.Usage) -> None:
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


class Counts:
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


def whole_answer(head: Json, choices: Sequence[Choice], totals: Totals) -> Json:
    return {**head, "choices": [choice.whole() for choice in choices], "usage": totals.usage()}


def _empty_logprobs(num_logprobs: int | None) -> Json:
    tops: list[Json] | None = [] if num_logprobs else None
    return {"tokens": [], "token_logprobs": [], "top_logprobs": tops, "text_offset": []}


def _word(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
