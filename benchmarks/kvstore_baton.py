"""Baton's side of benchmarks/kvstore.py: a node's client, an engine's memory, a real store process, a real Redis."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kvstore_worker import Setting, run
from deploy.process import SECRETS
from deploy.redis import EmbeddedRedis
from engine.kv_cache import KVCache
from kvstore.arena_map import arena_bytes
from kvstore.blocks import BlockHash, KVLayout, Payload
from kvstore.client import KVClient, Match
from kvstore.curve import new_wire_key
from kvstore.directory import Directory
from kvstore.zmq_wire import ZmqWire

START_LIMIT_S = 60.0
LAYER_BYTES = 4096  # of the layout below, so a block has any multiple of this


def layout(block_bytes: int) -> KVLayout:
    """Some layout whose blocks have so many bytes."""
    return KVLayout("bench", "bfloat16", 16, block_bytes // LAYER_BYTES, 1, 64)


def block_hash(name: int) -> BlockHash:
    return BlockHash(hashlib.sha256(name.to_bytes(8, "little")).digest()[:16])


class Store:
    """Redis and a store, each in a process of its own, as on a machine in production."""

    def __init__(self, setting: Setting) -> None:
        folder = Path(setting.folder)
        self._redis = EmbeddedRedis(folder / "redis")
        wire_key = new_wire_key() if setting.option == "encrypted" else ""
        self.shared: dict[str, Any] = {"dir": str(folder / "store"), "wire_key": wire_key}
        self._config = {
            "dir": self.shared["dir"],
            "slot_bytes": setting.block_bytes,
            "memory_bytes": arena_bytes(setting.num_slots, setting.block_bytes),
        }

    async def start(self) -> None:
        self._redis.start()
        self.shared["redis_url"] = self._config["redis_url"] = self._redis.url
        command = [sys.executable, "-m", "deploy.process", "store", json.dumps(self._config)]
        environment = os.environ | {SECRETS["wire_key"]: self.shared["wire_key"]}
        self._process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_LIMIT_S)
        if not line.startswith(b"READY "):
            raise RuntimeError(f"the store ended with {await self._process.wait()} before it was ready")

    async def stop(self) -> None:
        self._process.terminate()
        await self._process.wait()
        self._redis.stop()


class BatonClient:
    """Both ways into a store: mapped, as on its own machine, and over the wire alone, as from another one."""

    def __init__(self, setting: Setting, shared: dict[str, Any], store: Store | None) -> None:
        self.version = f"torch {torch.__version__}, Python {platform.python_version()}"
        self.shared = shared
        self._store = store
        self._directory = Directory(shared["redis_url"])
        self._here = KVClient(self._directory, setting.block_bytes, Path(shared["dir"]))
        # Over plain TCP where the store is not encrypted, unless the option says ZeroMQ.
        wire = ZmqWire(setting.block_bytes) if setting.option == "zeromq" else None
        self._wire = KVClient(self._directory, setting.block_bytes, None, wire_key=shared["wire_key"], wire=wire)
        self._cache = KVCache(layout(setting.block_bytes), setting.num_positions, torch.device("cpu"))
        self.operations = {
            "fetch": self._fetch,
            "publish": self._publish,
            "receive": self._receive,
            "copy": self._copy,
            "locate": self._locate,
            "count": self._count,
            "match": self._match,
        }

    @classmethod
    async def start(cls, setting: Setting) -> BatonClient:
        store = None
        if setting.shared is None:
            store = Store(setting)
            await store.start()
        shared = setting.shared or (store.shared if store else {})
        client = cls(setting, shared, store)
        await client._here.open()
        return client

    def put(self, position: int, data: bytes) -> None:
        self._cache.write(position, memoryview(data))

    def get(self, position: int) -> bytes:
        data = bytearray(self._cache.piece_bytes)
        self._cache.read([position], [memoryview(data)])
        return bytes(data)

    async def close(self) -> None:
        await self._here.close()
        await self._wire.close()
        await self._directory.close()
        if self._store is not None:
            await self._store.stop()

    async def _fetch(self, names: Sequence[int], positions: Sequence[int]) -> float:
        """Of mapped blocks the copy is the transfer."""
        match = whole(self._here.match_local([block_hash(name) for name in names]), len(names))
        began_s = time.perf_counter()
        self._take(await self._here.fetch(match), positions)
        return time.perf_counter() - began_s

    async def _publish(self, names: Sequence[int], positions: Sequence[int]) -> float:
        hashes = [block_hash(name) for name in names]

        def write(indices: Sequence[int], views: Sequence[memoryview]) -> Any:
            return self._cache.read([positions[index] for index in indices], views)

        began_s = time.perf_counter()
        num_committed = await self._here.publish(hashes, write)
        took_s = time.perf_counter() - began_s
        if num_committed != len(names):
            raise RuntimeError(f"{num_committed} of {len(names)} blocks were published")
        return took_s

    async def _receive(self, names: Sequence[int], positions: Sequence[int]) -> float:
        match = whole(await self._wire.match([block_hash(name) for name in names]), len(names))
        began_s = time.perf_counter()
        payloads = await self._wire.fetch(match)
        took_s = time.perf_counter() - began_s
        if len(payloads) != len(names):
            raise RuntimeError(f"{len(payloads)} of {len(names)} blocks came")
        return took_s

    async def _copy(self, names: Sequence[int], positions: Sequence[int]) -> float:
        match = whole(await self._wire.match([block_hash(name) for name in names]), len(names))
        began_s = time.perf_counter()
        self._take(await self._wire.fetch(match, into=self._cache.views(positions)), positions)
        return time.perf_counter() - began_s

    async def _locate(self, names: Sequence[int], positions: Sequence[int]) -> float:
        hashes = [block_hash(name) for name in names]
        began_s = time.perf_counter()
        runs = await self._directory.locate(hashes)
        took_s = time.perf_counter() - began_s
        if [len(run) for run in runs.values()] != [len(names)]:
            raise RuntimeError("the directory does not know all blocks")
        return took_s

    async def _count(self, names: Sequence[int], positions: Sequence[int]) -> float:
        hashes = [block_hash(name) for name in names]
        began_s = time.perf_counter()
        runs = await self._directory.runs(hashes)
        took_s = time.perf_counter() - began_s
        if [run.num_blocks for run in runs.values()] != [len(names)]:
            raise RuntimeError("the directory does not know all blocks")
        return took_s

    async def _match(self, names: Sequence[int], positions: Sequence[int]) -> float:
        hashes = [block_hash(name) for name in names]
        began_s = time.perf_counter()
        match = self._here.match_local(hashes)
        took_s = time.perf_counter() - began_s
        whole(match, len(names))
        return took_s

    def _take(self, payloads: Sequence[Payload], positions: Sequence[int]) -> None:
        """As the engine takes a fetched run in."""
        num_taken = 0
        for position, payload in zip(positions, payloads, strict=False):
            num_taken += self._cache.write(position, payload.view) and payload.is_valid()
        if num_taken != len(positions):
            raise RuntimeError(f"{num_taken} of {len(positions)} blocks came")


def whole(match: Match, num_blocks: int) -> Match:
    if match.num_blocks != num_blocks:
        raise RuntimeError(f"{match.num_blocks} of {num_blocks} blocks are in the store")
    return match


if __name__ == "__main__":
    run(BatonClient.start)
