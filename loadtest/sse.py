"""Parses server-sent events from bytes in arbitrary pieces, by the HTML standard's grammar. Pure state."""

from __future__ import annotations

MAX_EVENT_BYTES = 4 << 20  # of one event; a server that sends more is not believed
_BOM = b"\xef\xbb\xbf"


class BadEvent(ValueError):
    """The stream is not a sequence of events; says why."""


class EventParser:
    """Takes bytes with `feed`, which returns the data of each event that is complete.

    Lines end with CR, LF or both; `data:` lines of one event are joined by LF; comments and other fields are dropped,
    and so is an event without a closing empty line.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._limit = max_event_bytes
        self._rest = b""  # of a line that has not ended
        self._data: list[bytes] = []
        self._num_bytes = 0  # in `_data`
        self._after_cr = False
        self._at_start = True

    def feed(self, piece: bytes) -> list[str]:
        """The data of completed events. Raises `BadEvent` for one beyond the limit, or one that is not UTF-8."""
        if self._after_cr and piece:  # the LF of a CR LF that was cut apart
            piece = piece.removeprefix(b"\n")
            self._after_cr = False
        buffer = self._rest + piece
        if self._at_start:
            if len(buffer) < len(_BOM) and _BOM.startswith(buffer):
                self._rest = buffer
                return []
            buffer = buffer.removeprefix(_BOM)
            self._at_start = False
        self._after_cr = piece.endswith(b"\r")
        lines = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop()
        events = [event for line in lines if (event := self._line(line)) is not None]
        if self._num_bytes + len(self._rest) > self._limit:
            raise BadEvent(f"an event of more than {self._limit} bytes")
        return events

    def _line(self, line: bytes) -> str | None:
        """The data of the event that this line ends, if it ends one."""
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._num_bytes += len(line)
            return None
        data, self._data, self._num_bytes = self._data, [], 0
        if not data:
            return None
        try:
            return b"\n".join(data).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadEvent(f"an event that is not UTF-8: {error.reason}") from error
