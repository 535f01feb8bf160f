"""docs/http.md does what it says: each of its commands is run against a real router in front of fake nodes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from http_support import get, post, talking
from router_fakes import FakeCluster, saying
from tools_support import model_folder

PAGE = (REPOSITORY / "docs" / "http.md").read_text(encoding="utf-8")
CURL = re.compile(r"""curl -s \$BATON(\S+)(?: -H '([^']*)')?(?:[\s\\]+-d '([^']*)')?""")


@pytest.fixture
async def cluster(redis_url: str, tmp_path: Path) -> AsyncIterator[FakeCluster]:
    model = model_folder(tmp_path / "pocket")  # one example has a tool
    async with talking(redis_url, saying('{"city": "Paris"}'), metrics=True, model=model) as cluster:
        yield cluster


async def test_each_curl_command(cluster: FakeCluster) -> None:
    commands = CURL.findall(PAGE)
    assert len(commands) == PAGE.count("curl -s") == 12
    for path, header, body in commands:
        if not body:
            assert (await get(cluster.http_url + path))[0] == 200, path
            continue
        assert header == "Content-Type: application/json"
        status, _, answer = await post(cluster.http_url + path, body.encode())
        assert status == 200, answer


async def test_each_python_example(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(examples) == 6
    await asyncio.to_thread(exec, "\n".join(examples), {"url": cluster.http_url})
    said = capsys.readouterr().out
    assert said.startswith('{"city": "Paris"}') and "A generator is" in said and "['pocket']" in said
