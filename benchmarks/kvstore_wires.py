"""What benchmarks/kvstore.py holds Baton's wire against: bare sockets that know nothing of blocks, and a Redis.

One request names many blocks. `tcp` is a socket whose answers are received straight into the client's own memory;
`pyzmq` a DEALER and a ROUTER, one message a block, none copied by pyzmq; `redis` one pipeline of GETs. Nothing is
checked on its way. Their owners are processes of their own.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import redis
import zmq

from benchmarks.kvstore_worker import Memory, Setting, content, run
from benchmarks.worker_process import REPOSITORY
from deploy.redis import EmbeddedRedis

HOST = "127.0.0.1"


class Wire(Memory):
    """A client whose blocks come one after the other; subclasses say how."""

    def __init__(self, setting: Setting, shared: dict[str, Any], stop: Callable[[], None] | None) -> None:
        super().__init__(setting.num_positions, setting.block_bytes)
        self.version = ""
        self.shared = shared
        self.operations = {"receive": self._receive, "copy": self._copy}
        self._stop = stop

    async def close(self) -> None:
        if self._stop is not None:
            self._stop()

    def _get(self, names: Sequence[int]) -> Sequence[memoryview | bytes]:
        raise NotImplementedError

    async def _receive(self, names: Sequence[int], positions: Sequence[int]) -> float:
        began_s = time.perf_counter()
        self._get(names)
        return time.perf_counter() - began_s

    async def _copy(self, names: Sequence[int], positions: Sequence[int]) -> float:
        began_s = time.perf_counter()
        for position, block in zip(positions, self._get(names), strict=True):
            np.copyto(self.rows[position], np.frombuffer(block, np.uint8))
        return time.perf_counter() - began_s


class ZmqWire(Wire):
    """libzmq receives large messages into memory of their own."""

    def __init__(self, setting: Setting, shared: dict[str, Any], stop: Callable[[], None] | None) -> None:
        super().__init__(setting, shared, stop)
        self.version = f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"tcp://{HOST}:{shared['port']}")

    def _get(self, names: Sequence[int]) -> Sequence[memoryview | bytes]:
        self._socket.send(question(names))
        return [frame.buffer for frame in self._socket.recv_multipart(copy=False)]


class TcpWire(Wire):
    """Both operations are one: nothing lies between the socket and the client's own memory."""

    def __init__(self, setting: Setting, shared: dict[str, Any], stop: Callable[[], None] | None) -> None:
        super().__init__(setting, shared, stop)
        self._socket = socket.create_connection((HOST, shared["port"]))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.operations = {"receive": self._copy, "copy": self._copy}

    async def _copy(self, names: Sequence[int], positions: Sequence[int]) -> float:
        targets = [memoryview(self.rows[position]) for position in positions]
        began_s = time.perf_counter()
        self._socket.sendall(question(names))
        for target in targets:
            receive_into(self._socket, target)
        return time.perf_counter() - began_s


class RedisWire(Wire):
    """redis-py, as shipped, and the server that Baton's directory runs on."""

    def __init__(self, setting: Setting, shared: dict[str, Any], stop: Callable[[], None] | None) -> None:
        super().__init__(setting, shared, stop)
        self._redis = redis.Redis.from_url(shared["url"])
        self.version = f"Redis {self._redis.info('server')['redis_version']}, redis-py {redis.__version__}"
        if setting.shared is None:
            for name in range(setting.num_blocks):
                self._redis.set(str(name), content(name, setting.block_bytes))

    def _get(self, names: Sequence[int]) -> Sequence[memoryview | bytes]:
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.get(str(name))
        return pipeline.execute()


WIRES: dict[str, type[Wire]] = {"pyzmq": ZmqWire, "tcp": TcpWire, "redis": RedisWire}


def question(names: Sequence[int]) -> bytes:
    return struct.pack(f"<I{len(names)}I", len(names), *names)


def receive_into(connection: socket.socket, target: memoryview) -> None:
    """Fills `target`; `EOFError` when the other side closed the connection."""
    while target.nbytes:
        num_bytes = connection.recv_into(target)
        if not num_bytes:
            raise EOFError
        target = target[num_bytes:]


async def start(setting: Setting) -> Wire:
    wire = WIRES[setting.option]
    if setting.shared is not None:
        return wire(setting, setting.shared, None)
    if wire is RedisWire:
        server = EmbeddedRedis(Path(setting.folder) / "redis", HOST)
        server.start()
        return wire(setting, {"url": server.url}, server.stop)
    return wire(setting, *start_owner(setting))


def start_owner(setting: Setting) -> tuple[dict[str, Any], Callable[[], None]]:
    """A process that serves all blocks; where, and how to end it."""
    arguments = ["own", setting.option, str(setting.num_blocks), str(setting.block_bytes)]
    command = [sys.executable, "-m", "benchmarks.kvstore_wires", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None

    def stop() -> None:
        process.send_signal(signal.SIGTERM)
        process.wait()

    return {"port": int(process.stdout.readline())}, stop


def own(kind: str, num_blocks: int, block_bytes: int) -> None:
    """The owner's process: says its port, then serves for ever."""
    memory = Memory(num_blocks, block_bytes)
    for name in range(num_blocks):
        memory.put(name, content(name, block_bytes))
    blocks = [row.data for row in memory.rows]
    serve = serve_zmq if kind == "pyzmq" else serve_tcp
    serve(blocks)


def serve_zmq(blocks: Sequence[memoryview]) -> None:
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    print(router.bind_to_random_port(f"tcp://{HOST}"), flush=True)
    while True:
        sender, request = router.recv_multipart()
        names = struct.unpack_from(f"<{len(request) // 4 - 1}I", request, 4)
        router.send_multipart([sender, *(blocks[name] for name in names)], copy=False)


def serve_tcp(blocks: Sequence[memoryview]) -> None:
    listener = socket.create_server((HOST, 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if os.fork() == 0:  # a process for each client, or two would wait for each other
            with suppress(EOFError, ConnectionError):
                serve_connection(connection, blocks)
            os._exit(0)
        connection.close()


def serve_connection(connection: socket.socket, blocks: Sequence[memoryview]) -> None:
    while True:
        head = bytearray(4)
        receive_into(connection, memoryview(head))
        rest = bytearray(4 * struct.unpack("<I", head)[0])
        receive_into(connection, memoryview(rest))
        for name in struct.unpack(f"<{len(rest) // 4}I", rest):
            connection.sendall(blocks[name])


if __name__ == "__main__":
    if sys.argv[1] == "own":
        own(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        run(start)
