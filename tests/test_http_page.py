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

from router import errors
from router.http_errors import failure_of
from router.http_openapi import openapi

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


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("n", "must be less"),
        errors.InvalidRequest("model", "is another one"),
        errors.Unauthenticated("no key"),
        errors.WouldBeLate("late", 1.0),
        errors.RateLimited("too many", 1.0),
        errors.ClusterBusy("full"),
        errors.ClusterUnavailable("nobody"),
        errors.DeadlinePassed("over"),
        RuntimeError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_each_error_is_in_the_table(error: Exception) -> None:
    failure = failure_of(error, {})
    (row,) = re.findall(rf"^\| {failure.status} \|.*", PAGE, re.MULTILINE)
    assert failure.type in row and (failure.code or "") in row
    assert all(name in row for name in failure.headers), failure.headers


def test_each_path_is_in_the_table() -> None:
    named = set(re.findall(r"`(?:GET |POST )?(/[^`]*)`", PAGE.partition("| endpoint |")[2].partition("\n\n")[0]))
    assert {path.replace("{model}", "{id}") for path in openapi("0")["paths"]} <= named
