"""A client of the store on one of the hosts of benchmarks/hosts.py: publishes blocks, or fetches them from elsewhere.

Each question is `{"operation": "publish" or "fetch", "num_blocks"}`, each answer the seconds that it took.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kvstore_worker import Memory, content
from benchmarks.worker_process import say, take_stdout
from deploy.process import SECRETS
from kvstore.blocks import BlockHash, hash_blocks
from kvstore.client import KVClient
from kvstore.copies import copy_and_sum
from kvstore.directory import Directory


class Worker:
    """`store_dir` is the folder of the host's store; "" where it only reads those of others."""

    def __init__(self, redis_url: str, cluster: str, slot_bytes: int, store_dir: str, max_blocks: int) -> None:
        self._directory = Directory(redis_url, cluster)
        wire_key = os.environ.get(SECRETS["wire_key"], "")
        self._client = KVClient(self._directory, slot_bytes, Path(store_dir) if store_dir else None, wire_key=wire_key)
        self._memory = Memory(max_blocks, slot_bytes)
        self._slot_bytes = slot_bytes
        self._hashes = hash_blocks(BlockHash(bytes(16)), range(max_blocks), 1)

    async def publish(self, num_blocks: int) -> float:
        def write(indices: Sequence[int], views: Sequence[memoryview]) -> list[int]:
            blocks = [memoryview(content(index, self._slot_bytes)) for index in indices]
            return [copy_and_sum(view, block) for view, block in zip(views, blocks, strict=True)]

        began_s = time.perf_counter()
        num_published = await self._client.publish(self._hashes[:num_blocks], write)
        if num_published != num_blocks:
            raise RuntimeError(f"{num_published} of {num_blocks} blocks were published")
        return time.perf_counter() - began_s

    async def fetch(self, num_blocks: int) -> float:
        """Into memory of its own, as an engine's; from the question to the directory on."""
        into = [memoryview(row) for row in self._memory.rows[:num_blocks]]
        began_s = time.perf_counter()
        match = await self._client.match(self._hashes[:num_blocks])
        payloads = await self._client.fetch(match, into=into)
        took_s = time.perf_counter() - began_s
        if len(payloads) != num_blocks:
            raise RuntimeError(f"{len(payloads)} of {num_blocks} blocks came, {match.num_blocks} were found")
        if bytes(payloads[-1].view) != content(num_blocks - 1, self._slot_bytes):
            raise RuntimeError("other bytes came than were published")
        return took_s

    async def close(self) -> None:
        await self._client.close()
        await self._directory.close()


async def main(setting: dict[str, Any]) -> None:
    answers = take_stdout()
    worker = Worker(**setting)
    say(answers, {})
    while line := await asyncio.to_thread(sys.stdin.readline):
        question = json.loads(line)
        operation = {"publish": worker.publish, "fetch": worker.fetch}[question["operation"]]
        say(answers, await operation(question["num_blocks"]))
    await worker.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
