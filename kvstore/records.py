"""The directory's records of arenas and nodes, and how they are parsed from untrusted text. Pure."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar


@dataclass(frozen=True, kw_only=True)
class ArenaRecord:
    """One arena, as its heartbeat describes it. A restarted store is another arena."""

    arena_id: str  # 32 hex digits, new at each start
    address: str  # "tcp://ip:port" that blocks are read from
    host: str  # label of the machine; nodes with the same label map the arena
    slot_bytes: int
    num_slots: int
    free_slots: int = 0
    draining: bool = False  # takes no new blocks
    metrics_address: str = ""  # "ip:port" of its /metrics; "" is none
    tcp_address: str = ""  # "tcp://ip:port" of unencrypted reads; "": ZeroMQ only


@dataclass(frozen=True, kw_only=True)
class NodeRecord:
    """One node, as its heartbeat describes it. `(node_id, incarnation)` is one process."""

    node_id: str
    incarnation: str
    role: str  # "prefill", "decode" or "both"
    address: str  # "ip:port" of its gRPC server
    model: str  # served name
    kv_root: str  # hex of KVLayout.root()
    block_size: int  # tokens
    block_bytes: int  # of a whole block, even if a rank moves only a part of it
    vocab_size: int
    max_model_len: int  # tokens
    arena_id: str = ""  # of the arena it maps; "" is none
    host: str = ""  # label of the machine
    draining: bool = False
    num_running: int = 0
    num_waiting: int = 0
    queued_prefill_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    prefill_tokens_per_s: float = 0.0  # 0.0 before the first measurement
    decode_step_s: float = 0.0
    metrics_address: str = ""  # "ip:port" of its /metrics; "" is none


RecordT = TypeVar("RecordT", ArenaRecord, NodeRecord)
T = TypeVar("T")


def parse_record(cls: type[RecordT], text: bytes | str | None) -> RecordT | None:
    """A record from its JSON; None if a field is missing, has another type, or an unusable value.

    Unknown fields are ignored.
    """
    return parse_signed(cls, text)[0]


def parse_signed(cls: type[RecordT], text: bytes | str | None) -> tuple[RecordT | None, object]:
    """The same, with its writer's probe; None if it has none."""
    data = _object(text)
    return build(cls, data), data.get("probe")


def sign(record: ArenaRecord | NodeRecord, probe: str) -> str:
    """The record's JSON, with its writer's probe."""
    return json.dumps(asdict(record) | {"probe": probe})


def _object(text: bytes | str | None) -> dict[str, Any]:
    """Empty if the text is not a JSON object."""
    try:
        data = json.loads(text or b"null")
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


_types_of: dict[type, dict[str, Any]] = {}  # cached, as evaluating annotations is most of the cost of a record


def _types(cls: type) -> dict[str, Any]:
    if cls not in _types_of:
        _types_of[cls] = typing.get_type_hints(cls)
    return _types_of[cls]


def build(cls: type[T], data: Mapping[str, Any]) -> T | None:
    """A dataclass of numbers, strings and booleans from a JSON object, by the rules of `parse_record`."""
    values: dict[str, Any] = {}
    for name, expected in _types(cls).items():
        if name in data:
            value = data[name]
            if not _is_usable(value):
                return None
            if expected is float and type(value) is int:
                value = float(value)
            if type(value) is not expected:
                return None
            values[name] = value
    try:
        return cls(**values)
    except TypeError:  # a field without a default is missing
        return None


def _is_usable(value: object) -> bool:
    """Excludes values that JSON allows but that fail later: NaN equals nothing, a lone surrogate has no bytes."""
    if isinstance(value, int | float):
        return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
    return not isinstance(value, str) or value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)
