"""A server of Baton's in a process of its own, without Ray, for as long as a benchmark wants it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from deploy.redis_url import REDIS_URL_VARIABLE

START_LIMIT_S = 120.0


@asynccontextmanager
async def server_process(
    kind: str, config: dict[str, Any], prefix: Sequence[str] = (), extra: Mapping[str, str] | None = None
) -> AsyncIterator[dict[str, Any]]:
    """A server in a process of its own, from its ready line on; what it registered.

    `prefix` are words before its command, `extra` variables of its environment.
    """
    # The URL may have a password, which is not for arguments.
    environment = os.environ | (extra or {}) | {REDIS_URL_VARIABLE: config["redis_url"]}
    config = {name: value for name, value in config.items() if name != "redis_url"}
    command = [*prefix, sys.executable, "-m", "deploy.process", kind, json.dumps(config)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    assert process.stdout is not None
    try:
        line = b""
        while not line.startswith(b"READY "):
            line = await asyncio.wait_for(process.stdout.readline(), START_LIMIT_S)
            if not line:
                raise RuntimeError(f"the {kind} ended with {await process.wait()} before it was ready")
        yield json.loads(line[len(b"READY ") :])
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
