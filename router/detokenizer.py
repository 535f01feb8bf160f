"""Turns output tokens into text as they come, and finds stop strings. Pure; knows no request and no cluster.

Text is released as soon as it is final: never half a character, and never what may turn out to be the beginning
of a stop string. All pieces together equal the text of decoding all tokens at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from router.tokenizer import Decoder

PROMPT_TAIL = 6  # tokens of the prompt that a window starts with: some decoders drop a space at the very beginning
MAX_TOKENS_PER_CHARACTER = 4  # with byte fallback, one token per byte


class Detokenizer(Protocol):
    """Decodes one output incrementally."""

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain."""
        ...

    def flush(self) -> str:
        """What was held back, at the end."""
        ...


def detokenizer(decoder: Decoder, prompt_ids: Sequence[int]) -> Detokenizer:
    """The exact one if each token is a fixed byte string, else the one that decodes a sliding window."""
    if decoder.bytes_of is not None:
        return ByteDetokenizer(decoder.bytes_of)
    return WindowDetokenizer(decoder.decode, prompt_ids)


class ByteDetokenizer:
    """For byte-level BPE: bytes go through an incremental UTF-8 decoder."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For every other tokenizer: decodes the last few tokens with and without the new one; the difference is new.

    The window `[start, end)` has been released already and serves as context; tokens from `end` on are undecided.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._token_ids = list(prompt_ids[-PROMPT_TAIL:])
        self._start = 0
        self._end = len(self._token_ids)

    def feed(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        text = self._undecided()
        # A replacement character at the end is half a character, unless it stays one for too long.
        if text.endswith("\ufffd") and len(self._token_ids) - self._end < MAX_TOKENS_PER_CHARACTER:
            return ""
        if text:
            self._start = self._end  # tokens without text are no context: the ones before them stay
        self._end = len(self._token_ids)
        return text

    def flush(self) -> str:
        text = self._undecided()
        self._start, self._end = self._end, len(self._token_ids)
        return text

    def _undecided(self) -> str:
        known = self._decode(self._token_ids[self._start : self._end])
        return self._decode(self._token_ids[self._start :])[len(known) :]


class StopFinder:
    """Finds the stop string that is completed first, however the text is split into pieces."""

    def __init__(self, stops: Sequence[str], keeps_stop: bool = False) -> None:
        """`keeps_stop`: the stop string itself is part of the text."""
        self._stops = stops
        self._keeps_stop = keeps_stop
        self._held = ""  # possibly the beginning of a stop string

    def feed(self, text: str, may_stop: bool) -> tuple[str, bool]:
        """Final text, and whether a stop string was found; if so, it is the text up to it, and the last."""
        if not self._stops:
            return text, False
        text = self._held + text
        if may_stop:
            starts = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
            if starts:
                self._held = ""
                end, start = min(starts)
                return text[: end if self._keeps_stop else start], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a proper prefix of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class TextStream:
    """The text of one request's output.

    The text of a token that may end the request is held back: if it does, it is not part of the output, unless
    `keeps_stop` is set. Stop strings count only after `min_tokens` tokens.
    """

    def __init__(
        self,
        words: Detokenizer,
        stops: Sequence[str],
        end_ids: Collection[int],
        min_tokens: int,
        keeps_stop: bool = False,
    ) -> None:
        self._words = words
        self._stops = StopFinder(stops, keeps_stop)
        self._keeps_stop = keeps_stop
        self._end_ids = end_ids
        self._min_tokens = min_tokens
        self._held_id: int | None = None
        self._num_tokens = 0
        self.is_stopped = False  # a stop string is complete: nothing may follow

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain."""
        text = self._release()
        self._num_tokens += 1
        if self.is_stopped:
            return text
        if token_id in self._end_ids:
            self._held_id = token_id
            return text
        return text + self._find(self._words.feed(token_id))

    def finish(self, ended_by_token: bool) -> str:
        """The rest, after the last token. `ended_by_token`: that token ended the output, and is usually not text."""
        text = "" if ended_by_token and not self._keeps_stop else self._release()
        if self.is_stopped:
            return text
        return text + self._find(self._words.flush()) + self._stops.flush()

    def _release(self) -> str:
        if self._held_id is None:
            return ""
        token_id, self._held_id = self._held_id, None
        return self._find(self._words.feed(token_id))

    def _find(self, text: str) -> str:
        certain, self.is_stopped = self._stops.feed(text, self._num_tokens >= self._min_tokens)
        return certain
