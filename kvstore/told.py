"""A store's answers to its operator, to JSON and back. Pure; the reader checks every type, and raises on a mismatch.

Each answer is one object. It has `error`, as text, or what its verb asks for:

    stats             store (`StoreStats`), tiers (a list of `TierStats`)
    list              blocks (a list of `BlockRow`), num_blocks (that match, on all pages)
    inspect           blocks (a list of `BlockDetail`, one for each place that holds one of those asked for)
    evict, evict all  num_memory_blocks, num_disk_blocks
    drain, undrain    draining
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from kvstore.errors import BadFrame
from kvstore.frames import MAX_TOLD_BYTES
from kvstore.records import build
from kvstore.tally import TIERS

UNKNOWN = -1  # in place of an unknown number
_HASH = re.compile(r"[0-9a-f]{32}")
_STATES = ("free", "writing", "ready", "")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """Gauges and counters of a store as a whole."""

    arena_id: str
    draining: bool
    uptime_s: float
    slot_bytes: int
    num_writers: int  # that hold slots now
    num_committed: int  # blocks
    num_demoted: int
    num_promoted: int
    num_mapped_reads: int  # as far as seen
    num_full: int  # reservations
    num_draining: int  # reservations
    num_reaped: int  # writers
    num_refused_control: int  # frames
    num_refused_data: int  # frames


@dataclass(frozen=True, kw_only=True)
class TierStats:
    """Gauges and counters of one tier."""

    tier: str
    capacity_blocks: int
    num_blocks: int  # that can be had
    num_writing: int
    num_free: int
    num_bytes: int  # of the blocks that can be had
    num_hits: int
    num_misses: int
    num_evicted: int
    num_removed: int


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One block in one tier. A block that is in both has two rows."""

    hash: str  # 32 hex digits
    tier: str
    place: int  # slot or record
    num_bytes: int
    age_s: float  # since its last use; UNKNOWN
    num_reads: int  # over the wire; UNKNOWN


@dataclass(frozen=True, kw_only=True)
class BlockDetail:
    """All that a store knows of a block in one tier: of a slot, its header; of a record on disk, only its checksum."""

    hash: str
    tier: str
    place: int
    state: str  # "ready" or "writing"
    generation: int = 0
    length: int = 0  # bytes
    checksum: str = ""  # xxh3_64, 16 hex digits
    verifies: bool = False  # the bytes are there and match the checksum now
    age_s: float = UNKNOWN
    num_reads: int = UNKNOWN


def encode(answer: Mapping[str, Any]) -> bytes:
    """The answer as JSON. Raises ValueError when it exceeds the limit."""
    text = json.dumps(answer).encode()
    if len(text) > MAX_TOLD_BYTES:
        raise ValueError(f"an answer of {len(text)} bytes; at most {MAX_TOLD_BYTES}")
    return text


def decode(text: bytes | memoryview) -> dict[str, Any]:
    """The answer. Raises `BadFrame` unless it is one JSON object within the limit."""
    if len(text) > MAX_TOLD_BYTES:
        raise BadFrame(f"an answer of {len(text)} bytes")
    try:
        answer = json.loads(bytes(text))
    except (ValueError, RecursionError):
        raise BadFrame("the answer is no JSON") from None
    if not isinstance(answer, dict):
        raise BadFrame("the answer is no JSON object")
    return answer


def one(cls: type[T], value: object) -> T:
    """A part of an answer as `cls`. Raises `BadFrame` if it is not one: nothing may reach a terminal unchecked."""
    item = build(cls, value) if isinstance(value, dict) else None
    if item is None:
        raise BadFrame(f"the answer has no {cls.__name__} where one belongs")
    fields = vars(item)
    is_sound = fields.get("tier", TIERS[0]) in TIERS and fields.get("state", "") in _STATES
    is_sound &= all(_HASH.fullmatch(fields[name]) is not None for name in ("hash", "arena_id") if name in fields)
    is_sound &= re.fullmatch(r"[0-9a-f]{0,16}", fields.get("checksum", "")) is not None
    if not is_sound:
        raise BadFrame(f"the answer has a {cls.__name__} with a field that cannot be")
    return item


def many(cls: type[T], value: object) -> list[T]:
    """A list of such parts."""
    if not isinstance(value, list):
        raise BadFrame(f"the answer has no list of {cls.__name__}")
    return [one(cls, item) for item in value]


def count(value: object) -> int:
    """A number outside of such parts."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise BadFrame("the answer has no count where one belongs")
    return value
