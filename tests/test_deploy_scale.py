"""`baton scale` and the serving process, over the two files between them."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import POCKET

from deploy import scale
from deploy.config import ClusterConfig, ConfigError, DeployError
from deploy.scale import Mailbox, Request


@contextmanager
def serving(folder: Path, do: Callable[[Request], list[str]]) -> Iterator[Mailbox]:
    over, mailbox = threading.Event(), Mailbox(folder)

    def run() -> None:
        while not over.wait(0.01):
            mailbox.serve(do)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield Mailbox(folder)
    finally:
        over.set()
        thread.join()


def test_what_was_done_comes_back_and_no_file_stays(tmp_path: Path) -> None:
    asked: list[Request] = []

    def do(request: Request) -> list[str]:
        asked.append(request)
        return ["decode-1 is up"]

    with serving(tmp_path, do) as mailbox:
        assert mailbox.ask(Request("a", decode=2), lambda: True) == ["decode-1 is up"]
    assert asked == [Request("a", decode=2)]
    assert list(tmp_path.iterdir()) == []


def test_of_two_at_the_same_time_each_gets_its_answer(tmp_path: Path) -> None:
    """And what one of them asks for is not taken away by the other, who is done."""
    asked: list[str] = []

    def do(request: Request) -> list[str]:
        time.sleep(0.1)
        asked.append(request.request_id)
        return [request.request_id]

    names = [f"{n}" for n in range(6)]
    with serving(tmp_path, do) as mailbox, ThreadPoolExecutor(len(names)) as threads:
        answers = threads.map(lambda name: mailbox.ask(Request(name, decode=2), lambda: True), names, timeout=30)
        assert list(answers) == [[name] for name in names]
    assert sorted(asked) == names
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_done_is_an_error(tmp_path: Path) -> None:
    def refuse(request: Request) -> list[str]:
        request.apply(ClusterConfig(POCKET))
        return []

    with serving(tmp_path, refuse) as mailbox, pytest.raises(DeployError, match="--decode must be 1 or more"):
        mailbox.ask(Request("a", decode=0), lambda: True)


def test_nobody_waits_for_a_cluster_that_is_down(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="went down"):
        Mailbox(tmp_path).ask(Request("a", decode=2), lambda: False)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_finds_the_disk_full_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was asked for is done once, and the cluster goes on meanwhile."""
    original, num_full, asked = scale._put, 3, []

    def put(file: Path, fields: dict[str, object]) -> None:
        nonlocal num_full
        if file.name == "scaled.json" and num_full:
            num_full -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, fields)

    def do(request: Request) -> list[str]:
        asked.append(request.request_id)
        return ["decode-1 is up"]

    monkeypatch.setattr(scale, "_put", put)
    with serving(tmp_path, do) as mailbox:
        assert mailbox.ask(Request("a", decode=2), lambda: True) == ["decode-1 is up"]
        assert mailbox.ask(Request("b", decode=2), lambda: True) == ["decode-1 is up"]
    assert asked == ["a", "b"]
    assert caplog.text.count("event=scale_unanswered") == 1


def test_who_finds_the_disk_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(file: Path, fields: dict[str, object]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scale, "_put", put)
    with pytest.raises(DeployError, match=r"--state-dir .*: cannot be written to: No space left on device"):
        Mailbox(tmp_path).ask(Request("a", decode=2), lambda: True)


def test_what_a_killed_asker_left_can_be_cleared(tmp_path: Path) -> None:
    (tmp_path / "scale.json").write_text('{"request_id": "a", "decode": 2}')
    Mailbox(tmp_path).clear()
    Mailbox(tmp_path).serve(lambda request: pytest.fail("it was done"))
    assert list(tmp_path.iterdir()) == []


def test_a_role_that_is_not_named_stays_as_it_is() -> None:
    config = ClusterConfig(POCKET, prefill=3, decode=2)
    scaled = Request("a", decode=5).apply(config)
    assert (scaled.prefill, scaled.decode) == (3, 5)
    with pytest.raises(ConfigError, match="between 1 and 256"):
        Request("a", decode=1000).apply(config)
