"""A server by hand: a signal ends it at once, whatever it is doing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from conftest import REPOSITORY, eventually


async def test_a_signal_ends_a_node_that_loads(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Here from a file that never comes; a model of hundreds of gigabytes takes minutes."""
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    file = model / "config.json"
    file.unlink()
    os.mkfifo(file)
    config = {"node_id": "n", "model_dir": str(model), "model": "tiny", "redis_url": "redis://127.0.0.1:1"}
    command = [sys.executable, "-m", "deploy.process", "node", json.dumps(config)]
    process = await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY)
    writing: list[int] = []

    def is_read() -> bool:
        """A pipe can be opened so only once it is read from."""
        assert process.returncode is None
        try:
            writing.append(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    try:
        await eventually(is_read, 90, "the model is loaded")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for descriptor in writing:
            os.close(descriptor)
