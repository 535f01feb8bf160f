"""How processes write their logs: lines of text, or one JSON object a line for whoever collects them.

Our messages are `event=name key=value ...` and words; JSON has each key as a field. What looks like a secret is blotted
out in both, although nothing here logs one.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO

FORMATS = ("text", "json")
TEXT = "%(levelname)s %(message)s"
BLOT = "***"
MAX_VALUE_CHARS = 2048
_FIELD = re.compile(r"""(?<!\S)(\w+)=(\[[^\]]*\]|\([^)]*\)|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\S*)""")
_SECRETS = re.compile(
    r"""(\b(?:bearer|basic)\s+|://[^\s/@:]*:(?=[^\s/@]*@)|"""
    r"""\b(?:api[_-]?key|wire_key|password|passwd|secret|authorization)['"]?\s*[=:]\s*['"]?(?:bearer\s+)?)"""
    r"""[^\s'",;@]+""",
    re.IGNORECASE,
)
_OURS = {"ts", "level", "logger", "event", "message", "exception"}
_RAYS_PREFIX = re.compile(r"^(?:\x1b\[\d+m)*\([^()]*\)(?:\x1b\[\d+m)* ")


def configure(level: str, form: str = "text", stream: TextIO | None = None) -> None:
    """Sends all logs of this process to `stream`, by default standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def blotted(text: str) -> str:
    """The text without what looks like a key, a password or a token of authorization."""
    return _SECRETS.sub(rf"\1{BLOT}", text)


def fields_of(message: str) -> dict[str, Any]:
    """`key=value` as fields, numbers as numbers; the other words are `message`. Of equal keys the first counts."""
    found: dict[str, Any] = {}
    words: list[str] = []
    end = 0
    for match in _FIELD.finditer(message):
        key, value = match.groups()
        key = "request_id" if key == "request" else key
        key = f"{key}_" if key in _OURS - {"event"} else key
        if key not in found:
            words.append(message[end : match.start()])
            end = match.end()
            found[key] = _value(value)
    words.append(message[end:])
    text = " ".join(" ".join(words).split())
    return found | ({"message": text} if text else {})


class TextFormatter(logging.Formatter):
    """Level and message."""

    def format(self, record: logging.LogRecord) -> str:
        return blotted(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object: ts, level, logger, event where there is one, and the message's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = head(record.levelname.lower(), record.name, record.created) | fields_of(blotted(record.getMessage()))
        if record.exc_info:
            line["exception"] = blotted(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


def head(level: str, name: str, created_s: float) -> dict[str, Any]:
    moment = datetime.fromtimestamp(created_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"ts": moment, "level": level, "logger": name}


class JsonLines(io.TextIOBase):
    """Makes each line of a stream a JSON object: what Ray forwards loses its prefix, plain words become a message.

    Several threads may write, each its own lines, in as many parts as it likes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._own = threading.local()

    def write(self, text: str) -> int:
        *lines, self._own.part = (getattr(self._own, "part", "") + text).split("\n")
        for line in lines:
            if line.strip():
                self._stream.write(as_json(line) + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


def as_json(line: str) -> str:
    """One line as one JSON object, which it may be already."""
    bare = _RAYS_PREFIX.sub("", line)
    if bare.startswith('{"ts"'):
        return bare
    said = blotted(line.removeprefix("baton: "))
    return json.dumps(head("info", "baton", datetime.now(UTC).timestamp()) | {"message": said}, ensure_ascii=False)


def _value(text: str) -> Any:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1][:MAX_VALUE_CHARS]
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if number == number and abs(number) != float("inf") else text
    return text[:MAX_VALUE_CHARS]
