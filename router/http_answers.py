"""One of a call's answers as OpenAI's clients read it: dicts, ready for JSON. Pure; no pydantic, to be quick.

A `Choice` takes the core's responses. `delta` makes a stream's next piece of one, `add` and `whole` an object of all.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

from batonpb import common_pb2, inference_pb2
from router.http_scores import Json, Piece, finite, prompt_entries, scored

FINISH = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


class Choice(Protocol):
    """One answer of a call, as it grows."""

    def delta(self, response: inference_pb2.GenerateResponse) -> Json | None:
        """What is new, for a stream; None: nothing to show yet."""
        ...

    def add(self, response: inference_pb2.GenerateResponse) -> None: ...

    def whole(self) -> Json: ...


class Vocabulary(Protocol):
    """A model's tokens, as the core knows them."""

    def piece(self, token_id: int) -> bytes:
        """One as it is written."""
        ...

    def is_text(self, token_id: int) -> bool:
        """Whether it is part of texts; special ones are not."""
        ...


class ChatChoice:
    """Of a chat. `num_logprobs` None: none are shown. `is_single_call`: the first tool call alone is shown."""

    def __init__(self, index: int, piece: Piece, num_logprobs: int | None, is_single_call: bool) -> None:
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

    `echoes`: the prompt's logprobs come before the output's. `shows_prompt`: they are there by themselves, too.
    """

    def __init__(
        self, index: int, vocabulary: Vocabulary, num_logprobs: int | None, echoes: bool, shows_prompt: bool
    ) -> None:
        self._index = index
        self._vocabulary = vocabulary
        self._num_logprobs = num_logprobs
        self._echoes = echoes
        self._shows_prompt = shows_prompt
        self._texts: list[str] = []
        self._logprobs = _empty_logprobs(num_logprobs)
        self._prompt_logprobs: list[Json | None] | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # of the next token's text, in characters
        self._finish: str | None = None

    def delta(self, response: inference_pb2.GenerateResponse) -> Json | None:
        finish, logprobs, prompt = FINISH.get(response.finish_reason), self._lists(response), self._prompt(response)
        if not (response.text or finish or prompt or (logprobs and logprobs["tokens"])):
            return None
        delta = {"index": self._index, "text": response.text, "logprobs": logprobs, "finish_reason": finish}
        return delta if prompt is None else delta | {"prompt_logprobs": prompt}

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        self._texts.append(response.text)
        self._prompt_logprobs = self._prompt(response) or self._prompt_logprobs
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
        return whole | {"prompt_logprobs": self._prompt_logprobs} if self._shows_prompt else whole

    def _prompt(self, response: inference_pb2.GenerateResponse) -> list[Json | None] | None:
        if not (self._shows_prompt and response.HasField("prompt_logprobs")):
            return None
        return prompt_entries(response.prompt_logprobs, self._vocabulary.piece)

    def _lists(self, response: inference_pb2.GenerateResponse) -> Json | None:
        if self._num_logprobs is None:
            return None
        lists = _empty_logprobs(self._num_logprobs)
        if self._echoes and response.HasField("prompt_logprobs"):
            self._begin_with(lists, response.prompt_logprobs)
        for token in response.tokens:
            logprob = finite(token.logprobs.logprob)
            word = self._append(lists, token.token_id, logprob)
            if self._num_logprobs:
                tops = [(self._word(top.token_id), finite(top.logprob)) for top in token.logprobs.top]
                lists["top_logprobs"].append(dict(reversed(tops)) | {word: logprob})
        return lists

    def _begin_with(self, lists: Json, scores: common_pb2.PromptLogprobs) -> None:
        """The prompt's tokens, of which the first has no logprob."""
        for token in scored(scores):
            word = self._append(lists, token.token_id, token.logprob)
            if self._num_logprobs:
                tops = [(self._word(one), logprob) for one, logprob in token.top[: self._num_logprobs]]
                known = None if token.logprob is None else dict(reversed(tops)) | {word: token.logprob}
                lists["top_logprobs"].append(known)

    def _append(self, lists: Json, token_id: int, logprob: float | None) -> str:
        """One token, but for its alternatives; returns how it is shown."""
        data = self._vocabulary.piece(token_id)
        word = _word(data)
        lists["tokens"].append(word)
        lists["token_logprobs"].append(logprob)
        lists["text_offset"].append(self._offset)
        if self._vocabulary.is_text(token_id):
            self._offset += len(self._utf8.decode(data))
        return word

    def _word(self, token_id: int) -> str:
        return _word(self._vocabulary.piece(token_id))


def _empty_logprobs(num_logprobs: int | None) -> Json:
    tops: list[Json] | None = [] if num_logprobs else None
    return {"tokens": [], "token_logprobs": [], "top_logprobs": tops, "text_offset": []}


def _word(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
