"""LMCache's side of benchmarks/kvstore.py, run by the Python of its own environment: its tier in local memory.

A block is one chunk. It has no connector for engines on the CPU, so its local tier is asked itself, without the
hashing of tokens and the engine above: what remains are its books and the copies, here torch's.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

from benchmarks.kvstore_worker import Memory, Setting, run

TOKENS = 16  # of a chunk


class LMCacheClient(Memory):
    """Both store and client: others cannot reach a local tier."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.num_positions, setting.block_bytes)
        self.version = importlib.metadata.version("lmcache")
        self.shared: dict[str, Any] = {}
        self.operations = {"fetch": self._fetch, "publish": self._publish, "exist": self._exist}
        self._rows = [torch.from_numpy(row) for row in self.rows]
        elements = setting.block_bytes // 2
        self._shape = torch.Size((2, 1, TOKENS, elements // 2 // TOKENS))
        gib = (setting.num_slots * setting.block_bytes + (64 << 20)) / 2**30
        config = LMCacheEngineConfig.from_defaults(chunk_size=TOKENS, local_cpu=True, max_local_cpu_size=gib)
        metadata = LMCacheMetadata(
            model_name="bench",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(1, 2, TOKENS, 1, elements // 2 // TOKENS),
        )
        self._tier = LocalCPUBackend(config, metadata, "cpu")

    @classmethod
    async def start(cls, setting: Setting) -> LMCacheClient:
        return cls(setting)

    async def close(self) -> None:
        self._tier.close()

    async def _fetch(self, names: Sequence[int], positions: Sequence[int]) -> float:
        keys, targets = [key_of(name) for name in names], [self._rows[position] for position in positions]
        began_s = time.perf_counter()
        for key, target in zip(keys, targets, strict=True):
            block = self._tier.get_blocking(key)
            if block is None:
                raise RuntimeError("not all blocks are there")
            target.copy_(block.tensor.view(torch.uint8).view(-1))
            block.ref_count_down()
        return time.perf_counter() - began_s

    async def _publish(self, names: Sequence[int], positions: Sequence[int]) -> float:
        keys, sources = [key_of(name) for name in names], [self._rows[position] for position in positions]
        began_s = time.perf_counter()
        blocks = []
        for source in sources:
            block = self._tier.allocate(self._shape, torch.bfloat16, MemoryFormat.KV_2LTD, busy_loop=False)
            if block is None:
                raise RuntimeError("no memory for new blocks")
            block.tensor.view(torch.uint8).view(-1).copy_(source)
            blocks.append(block)
        self._tier.batched_submit_put_task(keys, blocks)
        for block in blocks:
            block.ref_count_down()
        return time.perf_counter() - began_s

    async def _exist(self, names: Sequence[int], positions: Sequence[int]) -> float:
        keys = [key_of(name) for name in names]
        began_s = time.perf_counter()
        found = await self._tier.batched_async_contains("", keys)
        took_s = time.perf_counter() - began_s
        if found != len(keys):
            raise RuntimeError("not all blocks are there")
        return took_s


def key_of(name: int) -> CacheEngineKey:
    return CacheEngineKey("bench", 1, 0, name, torch.bfloat16)


if __name__ == "__main__":
    run(LMCacheClient.start)
