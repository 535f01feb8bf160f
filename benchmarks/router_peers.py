"""The peers of `benchmarks.router`: sglang-router (Rust, HTTP) before a constant HTTP worker, and Dynamo's radix tree.

Each runs with the interpreter of its own environment (`benchmarks/install_peers.sh FOLDER sglang-router dynamo`).
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from benchmarks.router_load import ALPHABET, IN_FLIGHT, NUM_PROMPTS
from loadtest.report import percentile

ANSWER = {"text": "a", "meta_info": {"id": "1", "prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}}
READY_S = 60.0

RADIX = """
import json, random, sys, time
from dynamo._core import RadixTree
arenas, size, num_blocks, batch, repeats = json.loads(sys.argv[1])
tree, rng = RadixTree(), random.Random(0)
chains = [[rng.getrandbits(63) for _ in range(num_blocks)] for _ in range(batch)]
def store(worker, number, blocks):
    data = {"stored": {"parent_hash": None, "blocks": [{"block_hash": b, "tokens_hash": b} for b in blocks]}}
    tree.apply_event(worker, json.dumps({"event_id": number, "data": data}).encode())
for worker in range(arenas):
    number, held = 0, 0
    for chain in chains:
        part = chain[: num_blocks * (worker + 1) // arenas]
        store(worker, number, part); number += 1; held += len(part)
    while held < size:
        part = [rng.getrandbits(63) for _ in range(min(100, size - held))]
        store(worker, number, part); number += 1; held += len(part)
def once():
    begin = time.perf_counter()
    for chain in chains:
        scores = tree.find_matches(chain).scores
        assert len(scores) == arenas, len(scores)
    return 1e6 * (time.perf_counter() - begin) / batch
once()
print(json.dumps([once() for _ in range(repeats)]))
"""


def radix_look_ups(python: Path, shape: Sequence[int], repeats: int) -> tuple[float, ...]:
    """Microseconds a look-up; `shape` is arenas, blocks of each, blocks of a chain, look-ups for each repeat."""
    done = subprocess.run(
        [str(python), "-c", RADIX, json.dumps([*shape, repeats])], check=True, capture_output=True, text=True
    )
    return tuple(json.loads(done.stdout))


async def sglang_requests(python: Path, num_requests: int, repeats: int) -> dict[str, tuple[float, ...]]:
    """Requests/s and milliseconds through sglang-router, its policy cache_aware, and alone what a request takes."""
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(_worker())
        address = await stack.enter_async_context(_sglang_router(python, worker))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        generator = random.Random(0)
        texts = ["".join(generator.choices(ALPHABET, k=2000)) for _ in range(NUM_PROMPTS)]
        url = f"{address}/generate"
        await _post_all(session, url, texts, 10 * IN_FLIGHT, IN_FLIGHT)
        runs = [await _post_all(session, url, texts, num_requests, IN_FLIGHT) for _ in range(repeats)]
        routed = [await _post_all(session, url, texts, num_requests // 10, 1) for _ in range(repeats)]
        direct = [await _post_all(session, f"{worker}/generate", texts, num_requests // 10, 1) for _ in range(repeats)]
    p50s = [1e3 * (percentile(a[1], 50) - percentile(b[1], 50)) for a, b in zip(routed, direct, strict=True)]
    return {
        "requests/s": tuple(len(times) / wall_s for wall_s, times in runs),
        "p50 ms": tuple(1e3 * percentile(times, 50) for _, times in runs),
        "added ms": tuple(p50s),
    }


async def _post_all(
    session: aiohttp.ClientSession, url: str, texts: Sequence[str], count: int, in_flight: int
) -> tuple[float, list[float]]:
    left, times = iter(range(count)), list[float]()

    async def client() -> None:
        for index in left:
            begin_s = time.perf_counter()
            body = {"text": texts[index % len(texts)], "sampling_params": {"max_new_tokens": 1}}
            async with session.post(url, json=body) as answer:
                await answer.read()
                answer.raise_for_status()
            times.append(time.perf_counter() - begin_s)

    begin_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(in_flight)))
    return time.perf_counter() - begin_s, times


@asynccontextmanager
async def _worker() -> AsyncIterator[str]:
    """A constant worker in a process of its own, as Baton's fake node is."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.router_peers", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.stdin.close()
        await process.wait()


@asynccontextmanager
async def _sglang_router(python: Path, worker: str) -> AsyncIterator[str]:
    port = _free_port()
    command = ["-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", worker, "--policy", "cache_aware", "--log-level", "warn"]
    command += ["--prometheus-port", str(_free_port())]
    process = await asyncio.create_subprocess_exec(
        str(python), *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        await _wait_for(f"{address}/generate", process)
        yield address
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _wait_for(url: str, process: asyncio.subprocess.Process) -> None:
    deadline_s = time.monotonic() + READY_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline_s and process.returncode is None:
            try:
                async with session.post(url, json={"text": "a", "sampling_params": {}}) as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
    raise RuntimeError("sglang-router did not come up")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _serve_constant() -> None:
    async def generate(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response(ANSWER)

    async def info(_: web.Request) -> web.Response:
        return web.json_response({"model_path": "fake", "status": "ready"})

    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/generate", generate)
    for path in ("/health", "/health_generate", "/get_model_info", "/get_server_info", "/server_info", "/model_info"):
        app.router.add_get(path, info)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    port = _free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print(f"http://127.0.0.1:{port}", flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, stop.set)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(_serve_constant())
