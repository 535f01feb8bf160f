"""Mooncake Store's side of benchmarks/kvstore.py, run by the Python of its own environment.

Each option is a store of its own, with a master: `process` has its segment in the client's process, `shm` in a real
client's on this machine, reached through shared memory, `tcp` in an owner's process, reached over loopback. What is
published while it is measured is removed again by and by, while no clock runs: its eviction is no part of the figures.
"""

from __future__ import annotations

import collections
import ctypes
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mooncake
import numpy as np
from mooncake.store import MooncakeDistributedStore

from benchmarks.kvstore_worker import Memory, Setting, run
from benchmarks.worker_process import REPOSITORY

HOST = "127.0.0.1"
PACKAGE = Path(mooncake.__file__).parent
LOCAL_BUFFER_BYTES = 64 << 20
START_LIMIT_S = 30.0


class PoolMemory(Memory):
    """The client's own memory in the pool that a dummy client shares with the real one."""

    def __init__(self, store: Any, num_positions: int, block_bytes: int) -> None:
        num_bytes = num_positions * block_bytes
        address = store.alloc_from_mem_pool(num_bytes)
        if not address:
            raise RuntimeError("the memory pool is too small")
        pool: Any = (ctypes.c_uint8 * num_bytes).from_address(address)
        self.rows = np.frombuffer(pool, np.uint8).reshape(num_positions, block_bytes)
        self.rows.fill(0)


class MooncakeClient:
    """Gets into, and puts from, registered memory, many blocks a call."""

    def __init__(self, setting: Setting, shared: dict[str, Any], services: ExitStack) -> None:
        self.version = importlib.metadata.version("mooncake-transfer-engine-non-cuda")
        self.shared = {} if setting.option == "process" else shared  # there, each client is a store of its own
        self._services = services
        self._block_bytes = setting.block_bytes
        self._num_published = setting.num_published
        self._num_blocks = setting.num_blocks
        self._meanwhile: collections.deque[str] = collections.deque()
        self._store = MooncakeDistributedStore()
        own_bytes = setting.num_positions * setting.block_bytes
        if setting.option == "shm":
            done(self._store.setup_dummy(own_bytes + LOCAL_BUFFER_BYTES, LOCAL_BUFFER_BYTES, shared["real_client"]))
            self._memory: Memory = PoolMemory(self._store, setting.num_positions, setting.block_bytes)
        else:
            segment_bytes = segment(setting) if setting.option == "process" else 0
            done(set_up(self._store, shared, segment_bytes))
            self._memory = Memory(setting.num_positions, setting.block_bytes)
        done(self._store.register_buffer(self._memory.address(), own_bytes))
        self.put, self.get = self._memory.put, self._memory.get
        fetches = {"receive": self._fetch, "copy": self._fetch} if setting.option == "tcp" else {"fetch": self._fetch}
        self.operations = fetches | {"publish": self._publish, "exist": self._exist}

    async def close(self) -> None:
        self._store.close()
        self._services.close()

    async def _fetch(self, names: Sequence[int], positions: Sequence[int]) -> float:
        keys, addresses, sizes = self._arguments(names, positions)
        began_s = time.perf_counter()
        found = self._store.batch_get_into(keys, addresses, sizes)
        took_s = time.perf_counter() - began_s
        if list(found) != sizes:
            raise RuntimeError(f"not all of {len(names)} blocks came: {found}")
        return took_s

    async def _publish(self, names: Sequence[int], positions: Sequence[int]) -> float:
        keys, addresses, sizes = self._arguments(names, positions)
        began_s = time.perf_counter()
        status = self._store.batch_put_from(keys, addresses, sizes)
        took_s = time.perf_counter() - began_s
        if any(status):
            raise RuntimeError(f"not all of {len(names)} blocks were put: {status}")
        if names[0] >= self._num_blocks:  # not one of those that stay
            self._meanwhile.extend(keys)
            gone = [self._meanwhile.popleft() for _ in range(len(self._meanwhile) - self._num_published)]
            if gone and any(self._store.batch_remove(gone, True)):
                raise RuntimeError("what was published could not be removed again")
        return took_s

    async def _exist(self, names: Sequence[int], positions: Sequence[int]) -> float:
        keys = [str(name) for name in names]
        began_s = time.perf_counter()
        found = self._store.batch_is_exist(keys)
        took_s = time.perf_counter() - began_s
        if list(found) != [1] * len(names):
            raise RuntimeError("not all blocks are there")
        return took_s

    def _arguments(self, names: Sequence[int], positions: Sequence[int]) -> tuple[list[str], list[int], list[int]]:
        addresses = [self._memory.address(position) for position in positions]
        return [str(name) for name in names], addresses, [self._block_bytes] * len(names)


def segment(setting: Setting) -> int:
    """Bytes of the segment: room for all at less than the fill at which Mooncake begins to evict."""
    return 2 * setting.num_blocks * setting.block_bytes + (64 << 20)


def set_up(store: Any, shared: dict[str, Any], segment_bytes: int) -> int:
    buffer_bytes = LOCAL_BUFFER_BYTES
    code: int = store.setup(HOST, shared["metadata"], segment_bytes, buffer_bytes, "tcp", "", shared["master"])
    return code


def done(status: int) -> None:
    if status:
        raise RuntimeError(f"Mooncake answers {status}")


async def start(setting: Setting) -> MooncakeClient:
    with ExitStack() as stack:
        shared = setting.shared
        if shared is None:
            shared = stack.enter_context(master())
            if setting.option == "tcp":
                command = [sys.executable, "-m", "benchmarks.kvstore_mooncake", "own", str(segment(setting))]
                stack.enter_context(service([*command, shared["metadata"], shared["master"]]))
            elif setting.option == "shm":
                port = free_port()
                stack.enter_context(real_client(setting, shared, port))
                shared["real_client"] = f"{HOST}:{port}"
        client = MooncakeClient(setting, shared, ExitStack())
        client._services = stack.pop_all()
        return client


@contextmanager
def master() -> Iterator[dict[str, Any]]:
    rpc, http, metrics = free_port(), free_port(), free_port()
    command = [str(PACKAGE / "mooncake_master"), f"-rpc_port={rpc}", f"-metrics_port={metrics}"]
    command += ["-enable_http_metadata_server=true", f"-http_metadata_server_port={http}"]
    command += ["-rpc_address=" + HOST, "-http_metadata_server_host=" + HOST]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        wait_for(process, rpc)
        wait_for(process, http)
        yield {"metadata": f"http://{HOST}:{http}/metadata", "master": f"{HOST}:{rpc}"}
    finally:
        end(process)


@contextmanager
def real_client(setting: Setting, shared: dict[str, Any], port: int) -> Iterator[None]:
    command = [str(PACKAGE / "mooncake_client"), f"-host={HOST}", f"-port={port}", "-protocol=tcp"]
    command += [f"-metadata_server={shared['metadata']}", f"-master_server_address={shared['master']}"]
    command += [f"-global_segment_size={segment(setting)}", "-threads=2"]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        wait_for(process, port)
        yield
    finally:
        end(process)


@contextmanager
def service(command: Sequence[str]) -> Iterator[None]:
    """A process that says one line when it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("the owner did not start")
        yield
    finally:
        end(process)


def own(segment_bytes: int, metadata: str, master_address: str) -> None:
    """The owner's process."""
    ready = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    store = MooncakeDistributedStore()
    done(set_up(store, {"metadata": metadata, "master": master_address}, segment_bytes))
    print("ready", file=ready, flush=True)
    signal.sigwait({signal.SIGTERM})
    store.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    """Until something listens there."""
    end_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end_s and process.poll() is None:
        try:
            socket.create_connection((HOST, port), 1.0).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not listen on {port}")


def end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "own":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before any thread: `sigwait` is to get it
        own(int(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        run(start)
