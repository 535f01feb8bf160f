"""The directory: which arena holds which block, and who is alive. A thin shell over Redis, and a hint, never the truth.

Each arena's inventory is one hash with a time to live that its heartbeat refreshes, so what a dead arena held is
forgotten with it. The hash carries a marker while it is complete: a Redis that was emptied has lost the marker, and
the arena announces everything again. Every failure is a `DirectoryUnavailable` within the time-out.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvstore.blocks import BlockHash
from kvstore.errors import DirectoryUnavailable

logger = logging.getLogger(__name__)

_MARKER = b"complete"  # no block has a name of eight bytes
_CHUNK = 256  # arguments of one call inside a script; Lua's stack holds some thousands
_PAUSE_S = 0.5  # after a time-out, look-ups fail at once for so long

# ARGV: prefix, "1" for leading runs alone, number of arena ids or -1 for all, arena ids, block hashes.
# Answers id, record, "slot,slot,,slot" for each living arena. Stops where no arena holds the next block.
_LOCATE = """
local prefix, leading, count = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3])
local ids = {}
if count < 0 then
  ids, count = redis.call('SMEMBERS', prefix .. 'arenas'), 0
else
  for i = 1, count do ids[i] = ARGV[3 + i] end
end
local arenas, answer = {}, {}
for _, id in ipairs(ids) do
  local record = redis.call('GET', prefix .. 'arena:' .. id)
  if record then
    arenas[#arenas + 1] = {id = id, record = record, key = prefix .. 'arena:' .. id .. ':blocks', run = {}, open = true}
  end
end
local first, goes_on = 4 + count, true
while goes_on and first <= #ARGV do
  local last, covered = math.min(first + 255, #ARGV), {}
  for _, arena in ipairs(arenas) do
    if arena.open then
      for i, slot in ipairs(redis.call('HMGET', arena.key, unpack(ARGV, first, last))) do
        if slot then covered[i] = true end
        if leading and not slot then arena.open = false break end
        arena.run[#arena.run + 1] = slot or ''
      end
    end
  end
  for i = 1, last - first + 1 do goes_on = goes_on and covered[i] end
  first = last + 1
end
for _, arena in ipairs(arenas) do
  answer[#answer + 1], answer[#answer + 2] = arena.id, arena.record
  answer[#answer + 1] = table.concat(arena.run, ',')
end
return answer
"""

# KEYS: record, inventory, set of ids. ARGV: id, record, time to live in ms, marker.
_BEAT = """
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', KEYS[3], ARGV[1])
if redis.call('HEXISTS', KEYS[2], ARGV[4]) == 0 then return 0 end
return redis.call('PEXPIRE', KEYS[2], ARGV[3])
"""

# KEYS: inventory. ARGV: marker, number of hashes to drop, these, then hash and slot of each block to add.
_UPDATE = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
local drops = tonumber(ARGV[2])
for i = 3, 2 + drops do redis.call('HDEL', KEYS[1], ARGV[i]) end
for i = 3 + drops, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
"""


@dataclass(frozen=True, kw_only=True)
class ArenaRecord:
    """One arena, as its heartbeat describes it. A store that starts again is another arena."""

    arena_id: str  # 32 hex digits, new at each start
    address: str  # "tcp://ip:port" that blocks are read from
    host: str  # label of the machine; nodes with the same label map the arena
    slot_bytes: int
    num_slots: int
    free_slots: int = 0


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
    block_bytes: int
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


@dataclass(frozen=True)
class Cover:
    """The leading run of blocks that all arenas hold together: for each block, one arena and the slot there."""

    places: tuple[tuple[str, int], ...] = ()  # (arena id, slot)
    arenas: Mapping[str, ArenaRecord] | None = None  # those that occur in places


class Directory:
    """A client of the directory. Safe to share by the tasks of one event loop.

    `url` is redis://host:port or unix:///path. All methods but `close` raise `DirectoryUnavailable` when Redis does
    not answer within `timeout_s`.
    """

    def __init__(self, url: str, cluster: str = "default", timeout_s: float = 1.0) -> None: ...

    async def locate(
        self, hashes: Sequence[BlockHash], arena_ids: Sequence[str] | None = None
    ) -> dict[str, list[int]]:
        """The slots of each living arena's leading run of `hashes`, in one round trip; arenas with none are left out."""
        raise NotImplementedError

    async def cover(
        self, hashes: Sequence[BlockHash], prefer: str = "", avoid: Collection[str] = ()
    ) -> Cover:
        """The longest leading run that can be put together from all living arenas but those of `avoid`."""
        raise NotImplementedError

    async def announce(
        self, arena_id: str, blocks: Sequence[tuple[BlockHash, int]], gone: Sequence[BlockHash] = ()
    ) -> bool:
        """Adds (hash, slot) pairs to an inventory and drops `gone`. False: the inventory is lost, announce all."""
        raise NotImplementedError

    async def announce_all(self, arena_id: str, blocks: Sequence[tuple[BlockHash, int]], ttl_s: float) -> None:
        """Replaces an arena's whole inventory."""
        raise NotImplementedError

    async def heartbeat_arena(self, record: ArenaRecord, ttl_s: float) -> bool:
        """Keeps an arena alive for `ttl_s`. False: the inventory is lost, announce all."""
        raise NotImplementedError

    async def heartbeat_node(self, record: NodeRecord, ttl_s: float) -> None:
        """Keeps a node alive for `ttl_s`."""
        raise NotImplementedError

    async def remove_node(self, node_id: str, incarnation: str = "") -> None:
        """Forgets a node; with an incarnation, only if it is that one."""
        raise NotImplementedError

    async def remove_arena(self, arena_id: str) -> None:
        """Forgets an arena and what it held."""
        raise NotImplementedError

    async def nodes(self) -> list[NodeRecord]:
        """All living nodes. A record that cannot be read is left out."""
        raise NotImplementedError

    async def arenas(self) -> list[ArenaRecord]:
        """All living arenas."""
        raise NotImplementedError

    async def ping(self) -> None:
        """Returns when Redis answers."""
        raise NotImplementedError

    async def close(self) -> None:
        """Closes the connections. Never raises."""
