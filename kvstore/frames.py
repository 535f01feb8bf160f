"""The wire format: the messages between stores and their clients, as bytes. Pure; knows no socket.

Each message is one frame: a header (magic, version, kind, status, count, request id), fixed fields of its kind, then
`count` items of fixed size. The answer to `Get` is followed by one frame of raw bytes for each block that it names,
the answer to an operator's `Ask` by one frame of JSON (see `kvstore.told`). Everything read is checked: a message that
breaks the format, or a limit, is a `BadFrame` and nothing else.

A reader that wants more than `part_blocks` asks several times and need not wait in between: while one part is on its
way, the one before it can be verified.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from kvstore.arena import Fill, Reservation, Written
from kvstore.blocks import HASH_BYTES, BlockHash
from kvstore.errors import BadFrame
from kvstore.quotas import NO_TENANT, SHARED, Owner

MAGIC = b"BATN"
VERSION = 4
MAX_BLOCKS = 4096  # in one message
MAX_QUESTIONS = 32  # of one reader that a store must answer at a time; it may drop those beyond
_PART_BLOCKS = 256  # frames of one answer
_PART_BYTES = 1 << 21
_LATER_PARTS = 4  # later parts of a streamed answer are this many times as long as the first
_HEADER = struct.Struct("<4sBBHIQ")  # magic, version, kind, status, count, request id
_IDS = struct.Struct("<16s16s")  # arena and writer; 32 hex digits each everywhere else
_IDS_AND_OWNER = struct.Struct("<16s16s16sI")  # arena, writer, tenant, quota in blocks
_IDS_AND_WISH = struct.Struct("<16s16s16sI")  # arena, writer, tenant, slots wanted
_NO_SLOT = 0xFFFFFFFF
_NO_QUOTA = 0xFFFFFFFF

MAX_FRAME_BYTES = _HEADER.size + _IDS_AND_OWNER.size + MAX_BLOCKS * 36  # of every frame but the payloads
MAX_TOLD_BYTES = 1 << 16  # of the JSON behind a `Told`
MAX_ROWS = 200  # blocks in one answer to an operator


def part_blocks(slot_bytes: int) -> int:
    """The most blocks in one answer; 1 if they are large."""
    return max(1, min(_PART_BLOCKS, _PART_BYTES // slot_bytes))


def stream_parts(num_blocks: int, slot_bytes: int) -> Iterator[range]:
    """How an answer on a stream is divided: a short part first, so that sending starts soon, then a few long ones."""
    first, step = 0, part_blocks(slot_bytes)
    while first < num_blocks:
        yield range(first, min(first + step, num_blocks))
        first, step = first + step, _LATER_PARTS * part_blocks(slot_bytes)


class Status(enum.IntEnum):
    OK = 0
    STALE = 1  # the message is for an arena that no longer exists
    FULL = 2
    DRAINING = 3  # the store takes no new blocks; what it holds can be read


class Verb(enum.IntEnum):
    """What an operator asks of a store."""

    STATS = 1
    LIST = 2
    INSPECT = 3
    EVICT = 4  # the given blocks
    EVICT_ALL = 5
    DRAIN = 6
    UNDRAIN = 7


@dataclass(frozen=True)
class Message:
    """What all messages share; `request_id` matches an answer to its question."""

    request_id: int

    kind: ClassVar[int]
    fixed: ClassVar[struct.Struct] = struct.Struct("")
    item: ClassVar[struct.Struct]

    def encode(self) -> bytes:
        """The message's frame. Raises ValueError when it exceeds a limit."""
        items = list(self._items())
        if len(items) > MAX_BLOCKS:
            raise ValueError(f"{len(items)} blocks in one message; at most {MAX_BLOCKS}")
        head = _HEADER.pack(MAGIC, VERSION, self.kind, self._status(), len(items), self.request_id)
        return b"".join([head, self.fixed.pack(*self._fixed()), *(self.item.pack(*item) for item in items)])

    def _status(self) -> Status:
        return Status.OK

    def _fixed(self) -> tuple[Any, ...]:
        return ()

    def _items(self) -> Iterable[tuple[Any, ...]]:
        raise NotImplementedError

    @classmethod
    def _build(cls, request_id: int, status: Status, fixed: tuple[Any, ...], items: Iterator[tuple[Any, ...]]) -> Self:
        raise NotImplementedError


@dataclass(frozen=True)
class Reserve(Message):
    """Writer to store: asks for slots for these blocks, all of one owner."""

    arena_id: str
    writer_id: str
    hashes: Sequence[BlockHash]
    owner: Owner = SHARED

    kind = 1
    fixed = _IDS_AND_OWNER
    item = struct.Struct("<16s")

    def _fixed(self) -> tuple[Any, ...]:
        quota = _NO_QUOTA if self.owner.quota_blocks is None else min(self.owner.quota_blocks, _NO_QUOTA - 1)
        return bytes.fromhex(self.arena_id), bytes.fromhex(self.writer_id), self.owner.tenant, quota

    def _items(self) -> Iterable[tuple[Any, ...]]:
        return ((block_hash,) for block_hash in self.hashes)

    @classmethod
    def _build(cls, request_id: int, status: Status, fixed: tuple[Any, ...], items: Iterator[tuple[Any, ...]]) -> Self:
        arena_id, writer_id, tenant, quota = fixed
        owner = Owner(tenant, None if quota == _NO_QUOTA else quota)
        return cls(request_id, arena_id.hex(), writer_id.hex(), [BlockHash(item[0]) for item in items], owner)


@dataclass(frozen=True)
class Reserved(Message):
    """Store to writer: for each block its slot, or None if it need not be written."""

    status: Status
    reservations: Sequence[Reservation | None] = ()

    kind = 2
    item = struct.Struct("<IQ")

    def _status(self) -> Status:
        return self.status

    def _items(self) -> Iterable[tuple[Any, ...]]:
        return ((_NO_SLOT, 0) if item is None else (item.slot, item.generation) for item in self.reservations)

    @classmethod
    def _build(cls, request_id: int, status: Status, fixed: tuple[Any, ...], items: Iterator[tuple[Any, ...]]) -> Self:
        return cls(request_id, status, [None if item[0] == _NO_SLOT else Reservation(*item) for item in items])


@dataclass(frozen=True)
class Commit(Message):
    """Writer to store: these slots are filled."""

    arena_id: str
    writer_id: str
    written: Sequence[Written]

    kind = 3
    fixed = _IDS
    item = struct.Struct("<IQQ")

    def _fixed(self) -> tuple[Any, ...]:
        return bytes.fromhex(self.arena_id), bytes.fromhex(self.writer_id)

    def _items(self) -> Iterable[tuple[Any, ...]]:
        return ((item.slot, item.generation, item.checksum) for item in self.written)

    @classmethod
    def _build(cls, request_id: int, status: Status, fixed: tuple[Any, ...], items: Iterator[tuple[Any, ...]]) -> Self:
        return cls(request_id, fixed[0].hex(), fixed[1].hex(), [Written(*item) for item in items])


@dataclass(frozen=True)
class Committed(Message):
    """Store to writer: how many of the blocks are now ready."""

    status: Status
    num_blocks: int = 0

    kind = 4
    fixed = struct.Struct("<I")
    item = struct.Struct("")

    def _status(self) -> Status:
        return self.status

    def _fixed(self) -> tuple[Any, ...]:
        return (self.num_blocks,)

    def _items(self) -> Iterable[tuple[Any, ...]]:
        return ()

    @classmethod
    def _build(cls, request_id: int, status: Status, fixed: tuple[Any, ...], items: Iterator[tuple[Any, ...]]) -> Self:
        return cls(request_id, status, *fixed)


@dataclass(frozen=True)
class Get(Message):
    """Reader to store: send the leading run of these blocks that you have, at most `part_blocks`."""

    hashes: Sequence[BlockHash]

    kind = 5
    item = struct.Struct("<16s")

    def _items(self) -> Iterable[tuple[Any, ...]]:
        return ((block_hash,) for block_hash in self.hashes)

    @classmethod
    def _build(cls, request_id: int, status: Status, fixed: tuple[Any, ...], items: Iterator[tuple[Any, ...]]) -> Self:
        return cls(request_id, [BlockHash(item[0]) for item in items])


@dataclass(frozen=True)
class BlockInfo:
    """What a payload frame must match."""

    key: BlockHash
    length: int  # bytes
    checksum: int  # xxh3_64


@dataclass(frozen=True)
class Got(Message):
    """Store to reader: what each block's frame holds; the frames follow."""

    blocks: Sequence[BlockInfo]

    kind = 6
    item = struct.Struct("<16sIQ")

    def _items(self) -> Iterable[tuple[Any, ...]]:
        return ((item.key, item.length, item.checksum) for item in self.blocks)

    @classmethod
    def _build(cls, request_id: int, status: Status, fixed: tuple[Any, ...], items: Iterator[tuple[Any, ...]]) -> Self:
        return cls(request_id, [BlockInfo(BlockHash(item[0]), *item[1:]) for item in items])


@dataclass(frozen=True)
class Ask(Message):
    """Operator to store. `prefix`, `offset` and `limit` select a page of LIST; `hashes` are for INSPECT and EVICT."""

    verb: Verb
    hashes: Sequence[BlockHash] = ()
    prefix: str = ""  # hex digits that names begin with
    offset: int = 0  # blocks before the page
    limit: int = MAX_ROWS  # blocks on it; a store gives no more than MAX_ROWS

    kind = 7
    fixed = struct.Struct("<BBII16s")  # verb, digits of the prefix, offset, limit, the prefix and zeros
    item = struct.Struct("<16s")

    def _fixed(self) -> tuple[Any, ...]:
        prefix = bytes.fromhex(self.prefix.ljust(2 * HASH_BYTES, "0"))
        return self.verb, len(self.prefix), self.offset, self.limit, prefix

    def _items(self) -> Iterable[tuple[Any, ...]]:
        return ((block_hash,) for block_hash in self.hashes)

    @classmethod
    def _build(cls, request_id: int, status: Status, fixed: tuple[Any, ...], items: Iterator[tuple[Any, ...]]) -> Self:
        verb, num_digits, offset, limit, prefix = fixed
        if verb not in _VERBS or num_digits > 2 * HASH_BYTES:
            raise BadFrame(f"verb {verb}, prefix of {num_digits} digits")
        hashes = [BlockHash(item[0]) for item in items]
        return cls(request_id, Verb(verb), hashes, prefix.hex()[:num_digits], offset, limit)


@dataclass(frozen=True)
class Told(Message):
    """Store to operator. One frame of `num_bytes` of JSON follows."""

    num_bytes: int

    kind = 8
    fixed = struct.Struct("<I")
    item = struct.Struct("")

    def _fixed(self) -> tuple[Any, ...]:
        return (self.num_bytes,)

    def _items(self) -> Iterable[tuple[Any, ...]]:
        return ()

    @classmethod
    def _build(cls, request_id: int, status: Status, fixed: tuple[Any, ...], items: Iterator[tuple[Any, ...]]) -> Self:
        return cls(request_id, *fixed)


@dataclass(frozen=True)
class Filled(Message):
    """Writer to store: how lent slots were used, all by one owner without a quota, and how many more to lend.

    The answer is a `Reserved` with the newly lent slots.
    """

    arena_id: str
    writer_id: str
    fills: Sequence[Fill] = ()
    num_wanted: int = 0
    tenant: bytes = NO_TENANT

    kind = 9
    fixed = _IDS_AND_WISH
    item = struct.Struct("<16sIQQ")

    def _fixed(self) -> tuple[Any, ...]:
        return bytes.fromhex(self.arena_id), bytes.fromhex(self.writer_id), self.tenant, self.num_wanted

    def _items(self) -> Iterable[tuple[Any, ...]]:
        for fill in self.fills:
            written = fill.written
            if written is None:
                yield fill.block_hash, _NO_SLOT, 0, 0
            else:
                yield fill.block_hash, written.slot, written.generation, written.checksum

    @classmethod
    def _build(cls, request_id: int, status: Status, fixed: tuple[Any, ...], items: Iterator[tuple[Any, ...]]) -> Self:
        arena_id, writer_id, tenant, num_wanted = fixed
        fills = [Fill(BlockHash(key), None if rest[0] == _NO_SLOT else Written(*rest)) for key, *rest in items]
        return cls(request_id, arena_id.hex(), writer_id.hex(), fills, num_wanted, tenant)


_KINDS: dict[int, type[Message]] = {
    cls.kind: cls for cls in (Reserve, Reserved, Commit, Committed, Get, Got, Ask, Told, Filled)
}


def decode(frame: bytes | memoryview) -> Message:
    """The message in a frame of untrusted origin. Raises `BadFrame` unless it is exactly one message."""
    if not _HEADER.size <= len(frame) <= MAX_FRAME_BYTES:
        raise BadFrame(f"frame of {len(frame)} bytes")
    magic, version, kind, status, count, request_id = _HEADER.unpack_from(frame)
    if magic != MAGIC or version != VERSION:
        raise BadFrame(f"magic {magic!r}, version {version}")
    cls = _KINDS.get(kind)
    if cls is None or status not in _STATUSES or count > MAX_BLOCKS:
        raise BadFrame(f"kind {kind}, status {status}, count {count}")
    items_at = _HEADER.size + cls.fixed.size
    if len(frame) != items_at + count * cls.item.size:
        raise BadFrame(f"{cls.__name__} of {count} items in {len(frame)} bytes")
    items = cls.item.iter_unpack(frame[items_at:]) if cls.item.size else iter(())
    return cls._build(request_id, Status(status), cls.fixed.unpack_from(frame, _HEADER.size), items)


_STATUSES = frozenset(Status)
_VERBS = frozenset(Verb)
