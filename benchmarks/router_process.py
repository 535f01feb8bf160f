"""Router processes for benchmarks, and how much processor time they took."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kvstore.directory import Directory
from loadtest.grpc_client import GrpcClient

MODEL = Path(__file__).resolve().parent.parent / "models" / "pocket"


@dataclass(frozen=True)
class RouterProcess:
    address: str
    pid: int

    def cpu_s(self) -> float:
        """Of all its threads, since it started."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def router(redis_url: str, cluster: str) -> AsyncIterator[RouterProcess]:
    """A real router in a process of its own."""
    config = json.dumps({"model_dir": str(MODEL), "redis_url": redis_url, "cluster": cluster})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "deploy.process", "router", config, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = b""
        while not line.startswith(b"READY "):
            line = await asyncio.wait_for(process.stdout.readline(), 60)
            if not line:
                raise RuntimeError(f"the router ended with {await process.wait()} before it was ready")
        yield RouterProcess(str(json.loads(line[len(b"READY ") :])["address"]), process.pid)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def wait_for_nodes(client: GrpcClient, redis_url: str, cluster: str, count: int) -> None:
    """Returns when the router behind `client` knows `count` nodes."""
    directory = Directory(redis_url, cluster)
    while len(await directory.nodes()) < count:
        await asyncio.sleep(0.05)
    await directory.close()
    await client.get_model()
    await asyncio.sleep(1.0)  # the router polls the registry
