"""No block is evicted under a reader: what a reader of another process copies and finds valid is right, to the byte."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

from kvstore_support import SLOT_BYTES, Process, chain, start_store, store_config, writer_of

from kvstore.client import KVClient
from kvstore.directory import Directory

NUM_SLOTS, NUM_CHAINS, CHAIN_BLOCKS = 12, 5, 6
READ_S = 1.5

# Copies blocks from the mapped arena as fast as it can; says how many were there, and of those valid and right.
READER = """
import asyncio, json, random, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from kvstore.client import KVClient
from kvstore.directory import Directory
from kvstore_support import SLOT_BYTES, chain, content
config = json.loads(sys.argv[1])
async def main():
    client = KVClient(Directory(config["redis_url"]), SLOT_BYTES, Path(config["dir"]))
    rng = random.Random(config["seed"])
    chains = [chain(1000 * number, config["chain_blocks"]) for number in range(config["num_chains"])]
    known = {block_hash: content(block_hash) for hashes in chains for block_hash in hashes}
    num_read = num_valid = num_right = 0
    end_s = time.monotonic() + config["read_s"]
    while time.monotonic() < end_s:
        match = client.match_local(rng.choice(chains))
        for block_hash, payload in zip(match.hashes, await client.fetch(match)):
            copied = bytes(payload.view)
            num_read += 1
            if payload.is_valid():
                num_valid += 1
                num_right += copied == known[block_hash]
        await asyncio.sleep(0)
    await client.close()
    print(json.dumps([num_read, num_valid, num_right]), flush=True)
asyncio.run(main())
"""


async def test_what_is_valid_is_right_while_others_force_evictions(redis_url: str, short_dir: Path) -> None:
    config = store_config(short_dir / "store", redis_url, NUM_SLOTS)
    store, directory = await start_store(config), Directory(redis_url)
    writer = KVClient(directory, SLOT_BYTES, Path(config.dir))
    options = {"num_chains": NUM_CHAINS, "chain_blocks": CHAIN_BLOCKS, "read_s": READ_S}
    options |= {"redis_url": redis_url, "dir": config.dir}
    readers = [asyncio.create_task(Process.start(READER, options | {"seed": seed})) for seed in range(2)]
    try:
        num_written = 0
        for number in itertools.cycle(range(NUM_CHAINS)):
            hashes = chain(1000 * number, CHAIN_BLOCKS)
            num_written += await writer.publish(hashes, writer_of(hashes))
            if all(reader.done() for reader in readers):
                break
        assert num_written > 10 * NUM_SLOTS, "slots were given to other blocks again and again"
        for reader in await asyncio.gather(*readers):
            num_read, num_valid, num_right = json.loads(reader.line)
            assert 0 < num_right == num_valid <= num_read
    finally:
        for result in await asyncio.gather(*readers, return_exceptions=True):
            if isinstance(result, Process):
                await result.kill()
        await writer.close()
        await directory.close()
        await store.kill()
