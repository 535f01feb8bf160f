"""Parses tool calls in a model's text, in the format of the Hermes and Qwen chat templates. Pure.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Text outside of calls is released as soon as it is final; whitespace around calls belongs to the format and is dropped,
as templates add their own in the next turn. What looked like a call but is not one stays text, to the last character.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from typing import Any

from batonpb import inference_pb2

OPEN, CLOSE = "<tool_call>", "</tool_call>"
WHITESPACE = " \t\r\n"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BETWEEN = re.compile(r"[ \t\r\n,:]*")  # members of an object that is known to be valid


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object in `text`; None if it is not one, or could not be written again as UTF-8 JSON."""
    try:
        value = json.loads(text, parse_float=_number)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _number(text: str) -> float:
    """Neither JSON nor its grammar bounds numbers: 1e999 is valid, but must be finite to be written again."""
    return max(-sys.float_info.max, min(sys.float_info.max, float(text)))


def parse_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call, the latter exactly as in `text`; None if it is not a call."""
    call = parse_object(text)
    if call is None or not isinstance(call.get("arguments"), dict):
        return None
    name = call.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return None
    return name, _member_texts(text)["arguments"]


def _member_texts(text: str) -> dict[str, str]:
    """The members of a valid JSON object, each value exactly as in `text`."""
    decode, members = json.JSONDecoder().raw_decode, {}
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        key, at = decode(text, at)
        start = _skip(text, at)
        _, end = decode(text, start)
        members[key] = text[start:end]
        at = _skip(text, end)
    return members


def _skip(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    return match.end() if match else at


@dataclass
class _Body:
    """The state of reading a call, character by character."""

    text: str = ""
    has_begun: bool = False  # its brace is there
    is_string: bool = False
    is_escape: bool = False

    def takes(self, char: str) -> bool:
        """Whether a call can continue with `char`. Inside a string anything can, except a bare control character."""
        if self.is_string:
            if self.is_escape:
                self.is_escape = False
            elif char == "\\":
                self.is_escape = True
            elif char == '"':
                self.is_string = False
            return char >= " "
        if not self.has_begun:
            self.has_begun = char == "{"
            return self.has_begun or char in WHITESPACE
        self.is_string = char == '"'
        return char != "<"


class ToolCallParser:
    """Splits one answer into text and calls, however it comes in pieces. The calls' ids are derived from `key`."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._rest = ""  # not looked at yet, or undecided
        self._opening = ""  # of the call being read: the tag and the whitespace before it
        self._body: _Body | None = None
        self._is_behind_call = False
        self.num_calls = 0

    def feed(self, text: str) -> tuple[str, list[inference_pb2.ToolCall]]:
        """Final text, and complete calls."""
        self._rest += text
        pieces: list[str] = []
        calls: list[inference_pb2.ToolCall] = []
        while True:
            body = self._body
            if body is None:
                if not self._find_opening(pieces):
                    break
            elif not self._read(body, pieces, calls):
                break
        return "".join(pieces), calls

    def finish(self) -> tuple[str, list[inference_pb2.ToolCall]]:
        """What is left at the end. A call that only lacks its closing tag counts as a call."""
        text, self._rest = self._rest, ""
        if self._body is None:
            is_format = self._is_behind_call and not text.strip(WHITESPACE)
            return ("" if is_format else text), []
        body, self._body = self._body.text, None
        # The closing tag itself may have been cut.
        call = self._call(body) if CLOSE.startswith(text) else None
        return ("", [call]) if call else (self._opening + body + text, [])

    def _find_opening(self, pieces: list[str]) -> bool:
        """Releases text up to the next call. Returns whether there is one."""
        rest = self._rest
        at = rest.find(OPEN)
        end = at if at >= 0 else len(rest) - _overlap(rest)
        certain = rest[:end].rstrip(WHITESPACE)
        if certain:
            pieces.append(certain)
            self._is_behind_call = False
        if at < 0:
            self._rest = rest[len(certain) :]
            return False
        self._opening, self._rest = rest[len(certain) : at + len(OPEN)], rest[at + len(OPEN) :]
        self._body = _Body()
        return True

    def _read(self, body: _Body, pieces: list[str], calls: list[inference_pb2.ToolCall]) -> bool:
        """Continues to read a call, up to its end or to something invalid. Returns whether it got there."""
        rest = self._rest
        for at, char in enumerate(rest):
            if char == "<" and body.has_begun and not body.is_string:
                tail = rest[at : at + len(CLOSE)]
                if tail != CLOSE and CLOSE.startswith(tail):
                    body.text, self._rest = body.text + rest[:at], rest[at:]
                    return False
                if tail == CLOSE:
                    self._close(body.text + rest[:at], rest[at + len(CLOSE) :], pieces, calls)
                    return True
            if not body.takes(char):
                self._give_back(body.text + rest[:at], rest[at:], pieces)
                return True
        body.text, self._rest = body.text + rest, ""
        return False

    def _close(self, body: str, rest: str, pieces: list[str], calls: list[inference_pb2.ToolCall]) -> None:
        call = self._call(body)
        if call is None:
            self._give_back(body + CLOSE, rest, pieces)
            return
        calls.append(call)
        self._body, self._rest, self._is_behind_call = None, rest, True

    def _give_back(self, body: str, rest: str, pieces: list[str]) -> None:
        """It was not a call, so it is text. Whitespace at its end may belong to the next call."""
        text = self._opening + body
        certain = text.rstrip(WHITESPACE)
        pieces.append(certain)
        self._body, self._rest, self._is_behind_call = None, text[len(certain) :] + rest, False

    def _call(self, body: str) -> inference_pb2.ToolCall | None:
        found = parse_call(body)
        if found is None:
            return None
        name, arguments = found
        digest = hashlib.sha256(f"{self._key}/{self.num_calls}".encode()).hexdigest()
        self.num_calls += 1
        return inference_pb2.ToolCall(id=f"call_{digest[:24]}", name=name, arguments=arguments)


def _overlap(text: str) -> int:
    """How many characters at the end of `text` are a prefix of the opening tag."""
    longest = min(len(OPEN) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(OPEN[:length])), 0)
