"""The serving process beside its cluster: what it tells of nodes and Redis, also while it drains, and its signals."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import POCKET, RedisProcess, eventually
from test_deploy_metrics_targets import node

from deploy import serve
from deploy.cli import main
from deploy.metrics_targets import TargetsFile
from kvstore.directory import Directory

NO_FILE = TargetsFile(None, "c")
DECODE = node("decode-0", "decode", "10.0.0.2:1")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(serve, "say", lines.append)
    monkeypatch.setattr(serve, "WATCH_S", 0.05)
    return lines


async def test_nodes_are_watched_while_others_drain(redis_url: str, said: list[str], tmp_path: Path) -> None:
    """One that dies meanwhile and comes back is told of before the drain is over, and so is Prometheus."""
    directory, file = Directory(redis_url, "c"), tmp_path / "targets.json"
    interrupt, drains, may_end = threading.Event(), threading.Event(), threading.Event()

    def drain() -> None:
        drains.set()
        may_end.wait(60)

    watching = asyncio.create_task(serve._watch(redis_url, "c", interrupt, TargetsFile(file, "c"), drain))
    try:
        await eventually(drains.is_set)
        await directory.heartbeat_node(DECODE, ttl_s=60.0)
        await eventually(lambda: file.exists() and len(json.loads(file.read_text())) == 1, what="a target")
        await directory.remove_node("decode-0")
        await eventually(lambda: said == ["decode-0 is gone"])
        await directory.heartbeat_node(dataclasses.replace(DECODE, incarnation="another"), ttl_s=60.0)
        await eventually(lambda: said == ["decode-0 is gone", "decode-0 is back"])
        interrupt.set()
        await asyncio.sleep(0.5)
        assert not watching.done(), "nothing is stopped while a drain is under way: it ends by itself soon"
    finally:
        interrupt.set()
        may_end.set()
        await watching
        await directory.close()


async def test_work_that_fails_ends_the_watch(redis_url: str, said: list[str]) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    watching = serve._watch(redis_url, "c", threading.Event(), NO_FILE, fail)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(watching, 30)


async def test_a_redis_that_goes_away_is_told_of_once(redis_process: RedisProcess, said: list[str]) -> None:
    interrupt = threading.Event()
    watching = asyncio.create_task(serve._watch(redis_process.url, "c", interrupt, NO_FILE, lambda: None))
    try:
        redis_process.kill()
        await eventually(lambda: said, what="Redis is gone")
        await asyncio.sleep(0.5)
        redis_process.start()
        await eventually(lambda: len(said) > 1, what="Redis is back")
        assert [line.split(":")[0] for line in said] == ["Redis does not answer", "Redis answers again"]
    finally:
        interrupt.set()
        await watching


@pytest.fixture
def signals() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("is_ignored", [True, False])
def test_nohup_outlives_the_terminal(
    signals: None, is_ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    monkeypatch.setattr(serve, "_serve", lambda *_: 0)
    assert main(["serve", str(POCKET), "--state-dir", str(tmp_path)]) == 0
    assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) is is_ignored
    assert callable(signal.getsignal(signal.SIGTERM))
