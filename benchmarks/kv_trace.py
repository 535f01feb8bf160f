"""What an arena of a given size would hit on a real trace: LRU and S3-FIFO as shipped, beside Belady's optimum.

Repeat it with `python -m benchmarks.kv_trace TRACE`; `TRACE` is conversation_trace.jsonl of the Mooncake project's
FAST'25 release (12,031 requests in an hour), which is not shipped here: one JSON object a line, whose `hash_ids` name
the prompt's blocks of 512 tokens. The partly filled last block counts, as in that project's own figures, although
Baton shares only full ones. Nothing is random and no clock is read, so one run says it all.

A request hits the leading run of its blocks that is held. Then the rest comes in, each block for a victim that the
policy names, tail first; blocks of the request itself stay. Last, the decode node reads every block and publishes it
again, which a policy must not take for a second use. Rows "without hand-off" leave that out, as nodes for both legs do.

Belady's optimum knows the future: the block that is needed again last, or never, goes first, and of one request's
blocks the tail. It holds no block that it would drop before its next use. It is printed as a peer: a ratio of 0.5 says
that half of what any policy could hit was hit.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.rows import Peer, Row, print_beside
from kvstore.eviction import ADMISSIONS, LRU, POLICIES, Admission, Eviction

CAPACITIES = (1_000, 3_000, 5_860, 10_000, 30_000)  # blocks; 5,860 are 3 million tokens, a terabyte for a 70B model
DISK_FACTOR = 10  # disk over arena

Trace = Sequence[Sequence[int]]  # the names of each request's blocks


def read_trace(path: Path) -> Trace:
    """Requests in the order of their arrival."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["hash_ids"] for line in file]


@dataclass
class Disk:
    """The tier behind an arena: `capacity` blocks, least lately used first out, and what it was asked to do."""

    capacity: int
    admission: Admission[int]  # says which of those that are evicted it gets
    held: LRU[int] = field(default_factory=LRU)
    num_writes: int = 0
    num_hits: int = 0

    def demote(self, block: int) -> None:
        if block in self.held:
            self.held.touch(block)
        elif self.admission.admits(block):
            if len(self.held) == self.capacity:
                self.held.victim()
            self.held.insert(block)
            self.num_writes += 1


class Cache:
    """An arena's books without an arena: the same calls of the same policy in the same order."""

    def __init__(
        self, capacity: int, policy: Eviction[int], disk: Disk | None = None, has_hand_off: bool = True
    ) -> None:
        self.num_hits = self.num_evicted = 0
        self._capacity = capacity
        self._policy = policy
        self._disk = disk
        self._has_hand_off = has_hand_off
        self._held: set[int] = set()
        self._read: set[int] = set()  # since the policy last looked, from a mapping

    def serve(self, blocks: Sequence[int]) -> None:
        """One request, from its look-up to the last block that it publishes."""
        self._read_run(blocks)
        self._publish(blocks)
        if self._has_hand_off:
            self._read.update(block for block in blocks if block in self._held)
            self._publish(blocks)

    def _read_run(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if block in self._held:
                self.num_hits += 1
                self._read.add(block)
            elif self._disk is not None and block in self._disk.held:
                self._disk.num_hits += 1
                self._disk.held.touch(block)
            else:
                return

    def _publish(self, blocks: Sequence[int]) -> None:
        chain = set(blocks)
        for block in reversed(blocks):
            if block in self._held:
                self._policy.touch(block)
                if self._disk is not None:
                    self._disk.admission.saw(block)
        new: list[int] = []
        for block in blocks:
            if block in self._held:
                continue
            if len(self._held) + len(new) == self._capacity and not self._evict(chain):
                break
            new.append(block)
        for block in reversed(new):
            self._policy.insert(block)
        if self._disk is not None:
            self._disk.admission.came(new)
        self._held.update(new)

    def _evict(self, chain: set[int]) -> bool:
        victim = self._policy.victim(chain, self._was_read)
        if victim is None:
            return False
        self._held.discard(victim)
        self._read.discard(victim)
        self.num_evicted += 1
        if self._disk is not None:
            self._disk.demote(victim)
        return True

    def _was_read(self, block: int) -> bool:
        if block not in self._read:
            return False
        self._read.discard(block)
        return True


def replay(trace: Trace, name: str, capacity: int, disk: Disk | None = None, has_hand_off: bool = True) -> Cache:
    """The trace through the policy of that name; what came of it."""
    cache = Cache(capacity, POLICIES[name](capacity), disk, has_hand_off)
    for blocks in trace:
        cache.serve(blocks)
    return cache


def belady_hits(trace: Trace, capacity: int) -> int:
    """Hits of the best that anyone could do who knew the whole trace."""
    next_uses = _next_uses(trace)
    held: dict[int, float] = {}  # block -> request that needs it next
    heap: list[tuple[float, int, int]] = []  # (minus that request, minus depth, block): first who goes; may be stale
    num_hits = 0
    for blocks, uses in zip(trace, next_uses, strict=True):
        is_run = True
        for depth, (block, next_use) in enumerate(zip(blocks, uses, strict=True)):
            is_run = is_run and block in held
            num_hits += is_run
            held.pop(block, None)
            if next_use < math.inf:
                held[block] = next_use
                heapq.heappush(heap, (-next_use, -depth, block))
        while len(held) > capacity:
            next_use, _, block = heapq.heappop(heap)
            if held.get(block) == -next_use:
                del held[block]
    return num_hits


def _next_uses(trace: Trace) -> list[list[float]]:
    """For each block of each request, the index of the next request with that block."""
    seen: dict[int, float] = {}
    found = []
    for index in range(len(trace) - 1, -1, -1):
        found.append([seen.get(block, math.inf) for block in trace[index]])
        seen.update(dict.fromkeys(trace[index], index))
    return found[::-1]


def hit_rows(trace: Trace) -> tuple[list[Row], list[Sequence[float]]]:
    """Hit rates, and Belady's beside them."""
    num_blocks = sum(map(len, trace))
    endless = len({block for blocks in trace for block in blocks})
    rows: list[Row] = []
    best: list[Sequence[float]] = []
    for capacity in (*CAPACITIES, endless):
        optimum = belady_hits(trace, capacity) / num_blocks
        size = "any number of" if capacity == endless else str(capacity)
        for has_hand_off in (True, False):
            for name in POLICIES:
                what = f"hit rate, {name}, {size} blocks" + ("" if has_hand_off else ", without hand-off")
                num_hits = replay(trace, name, capacity, has_hand_off=has_hand_off).num_hits
                rows.append(Row(what, "of blocks", (num_hits / num_blocks,)))
                best.append((optimum,))
    return rows, best


def disk_rows(trace: Trace, name: str = "s3fifo") -> list[Row]:
    """What a disk behind the arena adds, and what it has to write for that."""
    num_blocks = sum(map(len, trace))
    rows: list[Row] = []
    for capacity in CAPACITIES:
        for admission, make in ADMISSIONS.items():
            disk = Disk(DISK_FACTOR * capacity, make(capacity))
            cache = replay(trace, name, capacity, disk)
            what = f"{DISK_FACTOR * capacity} blocks of disk behind {capacity}, " + (
                "all that is evicted" if admission == "all" else "second touch"
            )
            rows += [
                Row(f"{what}: hit rate of the arena", "of blocks", (cache.num_hits / num_blocks,)),
                Row(f"{what}: hit rate of the disk", "of blocks", (disk.num_hits / num_blocks,)),
                Row(f"{what}: written", "of evicted", (disk.num_writes / max(1, cache.num_evicted),)),
                Row(f"{what}: written", "blocks", (float(disk.num_writes),)),
            ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE", help="conversation_trace.jsonl")
    trace = read_trace(parser.parse_args().trace)
    rows, best = hit_rows(trace)
    disk = disk_rows(trace)
    print_beside("kv_trace", [*rows, *disk], [Peer("belady", [*best, *([()] * len(disk))])])


if __name__ == "__main__":
    main()
