"""What benchmarks/kvstore.py holds Baton's copies against: plain copies of the same blocks in the same mapped arena.

Joins Baton's store; the copies are numpy's, one thread, so the C library's memcpy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kvstore_baton import block_hash, whole
from benchmarks.kvstore_worker import Memory, Setting, run
from kvstore.client import KVClient
from kvstore.directory import Directory


class Copier(Memory):
    """Reads an arena and asks nobody."""

    def __init__(self, setting: Setting, shared: dict[str, Any]) -> None:
        super().__init__(setting.num_positions, setting.block_bytes)
        self.version = f"numpy {np.__version__}"
        self.shared = shared
        self.operations = {"fetch": self._fetch}
        self._directory = Directory(shared["redis_url"])
        self._client = KVClient(self._directory, setting.block_bytes, Path(shared["dir"]))

    @classmethod
    async def start(cls, setting: Setting) -> Copier:
        assert setting.shared is not None, "joins Baton's store"
        copier = cls(setting, setting.shared)
        await copier._client.open()
        return copier

    async def close(self) -> None:
        await self._client.close()
        await self._directory.close()

    async def _fetch(self, names: Sequence[int], positions: Sequence[int]) -> float:
        match = whole(self._client.match_local([block_hash(name) for name in names]), len(names))
        sources = [np.frombuffer(payload.view, np.uint8) for payload in await self._client.fetch(match)]
        targets = [self.rows[position] for position in positions]
        began_s = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            np.copyto(target, source)
        return time.perf_counter() - began_s


if __name__ == "__main__":
    run(Copier.start)
