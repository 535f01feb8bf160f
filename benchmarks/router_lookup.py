"""What finding a prompt's prefix costs a router, part by part: 100 blocks among 8 arenas of 100,000 blocks each, in a
real Redis. A part of `benchmarks.router`. Beside it Dynamo's index, which lives in its router's own process.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis

from benchmarks.rows import Row
from kvstore.blocks import BlockHash, hash_blocks
from kvstore.directory import ArenaRecord, Directory
from router.tokenizer import Tokenizer

NUM_ARENAS, ARENA_BLOCKS, NUM_BLOCKS, BLOCK_TOKENS = 8, 100_000, 100, 16
BATCH = 200  # look-ups for each repeat
TTL_S = 600.0
ROOT = BlockHash(bytes(16))


async def look_ups(redis_url: str, repeats: int, tokenizer: Tokenizer, arena_blocks: int = ARENA_BLOCKS) -> list[Row]:
    """Fills the directory, then the rows."""
    directory = Directory(redis_url, "lookup")
    generator = random.Random(0)
    chains = [
        hash_blocks(ROOT, generator.choices(range(1 << 17), k=NUM_BLOCKS * BLOCK_TOKENS), BLOCK_TOKENS)
        for _ in range(BATCH)
    ]
    for arena in range(NUM_ARENAS):
        arena_id = f"{arena:032x}"
        await directory.heartbeat_arena(
            ArenaRecord(arena_id=arena_id, address="tcp://127.0.0.1:1", host="h", slot_bytes=1, num_slots=arena_blocks),
            TTL_S,
        )
        # Each arena holds a leading run of each chain, of another length; the rest is filled up with strangers.
        blocks = [block for chain in chains for block in chain[: NUM_BLOCKS * (arena + 1) // NUM_ARENAS]]
        blocks += [BlockHash(generator.randbytes(16)) for _ in range(arena_blocks - len(blocks))]
        await directory.announce_all(arena_id, list(zip(blocks, range(arena_blocks), strict=False)), TTL_S)
    text = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz ", k=NUM_BLOCKS * BLOCK_TOKENS))
    tokens = tokenizer.encode(text)
    counted = await _timed(directory.runs, chains, redis_url, repeats)
    located = await _timed(directory.locate, chains, redis_url, repeats)
    rows = [
        Row("prefix look-up, 100 blocks, 8 arenas x 100k", "us", tuple(took_us for took_us, _ in counted)),
        Row("- of it, Redis at its script", "us", tuple(script_us for _, script_us in counted)),
        Row(
            "- of it, waiting for an empty answer of Redis",
            "us",
            tuple([await _timed_ping(directory) for _ in range(repeats)]),
        ),
        Row("all slots of these blocks, as a reader asks", "us", tuple(took_us for took_us, _ in located)),
        Row("- of that, Redis at its script", "us", tuple(script_us for _, script_us in located)),
        Row(
            "naming the 100 blocks (SHA-256)", "us", _repeated(repeats, lambda: hash_blocks(ROOT, tokens, BLOCK_TOKENS))
        ),
        Row("making 1,600 tokens of their text", "us", _repeated(repeats, lambda: tokenizer.encode(text))),
    ]
    await directory.close()
    return rows


async def _timed(
    look_up: Callable[[Sequence[BlockHash]], Awaitable[dict[str, Any]]],
    chains: Sequence[Sequence[BlockHash]],
    redis_url: str,
    repeats: int,
) -> list[tuple[float, float]]:
    """Microseconds of a look-up, the mean of a batch one behind the other; and what Redis counts of them as its own."""
    found: list[tuple[float, float]] = []
    with redis.Redis.from_url(redis_url) as client:
        for repeat in range(1 + repeats):
            client.config_resetstat()
            begin_s = time.perf_counter()
            for chain in chains:
                runs = await look_up(chain)
                if len(runs) != NUM_ARENAS:
                    raise RuntimeError(f"{len(runs)} of {NUM_ARENAS} arenas answered")
            took_us = 1e6 * (time.perf_counter() - begin_s) / len(chains)
            script: dict[str, float] = client.info("commandstats")["cmdstat_evalsha"]
            found += [(took_us, float(script["usec_per_call"]))] if repeat else []  # the first one warms up
    return found


async def _timed_ping(directory: Directory) -> float:
    begin_s = time.perf_counter()
    for _ in range(BATCH):
        await directory.ping()
    return 1e6 * (time.perf_counter() - begin_s) / BATCH


def _repeated(repeats: int, work: Callable[[], object]) -> tuple[float, ...]:
    def once() -> float:
        begin_s = time.perf_counter()
        for _ in range(BATCH):
            work()
        return 1e6 * (time.perf_counter() - begin_s) / BATCH

    return tuple(once() for _ in range(repeats))
