"""Logs as JSON: one object a line, with the message's fields; and no secret, in either form."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import threading
from typing import Any

import pytest
from conftest import POCKET, REPOSITORY

from deploy.logs import TEXT, JsonFormatter, JsonLines, TextFormatter, as_json, fields_of

SECRETS = (
    "connect to redis://:hunter2secret@10.0.0.1:6379/0 failed",
    "event=refused authorization=hunter2secret",
    "sent Authorization: Bearer hunter2secret",
    "event=x api_key='hunter2secret' tokens=5",
    "password: hunter2secret, wire_key=hunter2secret",
)


def record(message: str, *args: object, error: bool = False) -> logging.LogRecord:
    info = None
    if error:
        try:
            raise ValueError("Bearer hunter2secret")
        except ValueError:
            info = sys.exc_info()
    return logging.LogRecord("router.answer", logging.INFO, __file__, 1, message, args, info)


def as_object(message: str, *args: object, error: bool = False) -> dict[str, Any]:
    line = JsonFormatter().format(record(message, *args, error=error))
    assert "\n" not in line
    return json.loads(line)  # type: ignore[no-any-return]


def test_a_message_becomes_fields() -> None:
    line = as_object("request_id=%s event=finished tokens=%d ttft_s=%.4f decode=%s well done", "r 1", 5, 0.25, "d0")
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "router.answer",
        "request_id": "r",
        "event": "finished",
        "tokens": 5,
        "ttft_s": 0.25,
        "decode": "d0",
        "message": "1 well done",
    }


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("request=r7 event=blocks_late missing=3", {"request_id": "r7", "event": "blocks_late", "missing": 3}),
        ("event=no_disk error='not a = b, \"c\" d'", {"event": "no_disk", "error": 'not a = b, "c" d'}),
        ("a=1 a=2 b=", {"a": 1, "message": "a=2", "b": ""}),
        ("prefill=[n0(queue_s=0.1 x) n1] level=7", {"prefill": "[n0(queue_s=0.1 x) n1]", "level_": 7}),
        ("cores=(0, 1) n=2", {"cores": "(0, 1)", "n": 2}),
        ("x=nan y=inf z=1e3", {"x": "nan", "y": "inf", "z": 1000.0}),
        ("only words", {"message": "only words"}),
        ("", {}),
    ],
)
def test_fields(message: str, fields: dict[str, Any]) -> None:
    assert fields_of(message) == fields
    json.loads(json.dumps(fields_of(message), allow_nan=False))


def test_an_exception_is_one_field() -> None:
    assert "Traceback" in as_object("event=call_failed", error=True)["exception"]


@pytest.mark.parametrize("message", SECRETS)
def test_secrets_are_blotted_out(message: str) -> None:
    for formatter in (JsonFormatter(), TextFormatter(TEXT)):
        line = formatter.format(record(message, error=True))
        assert "hunter2secret" not in line and "***" in line
    assert "hunter2secret" not in as_json(message)


def test_counts_of_tokens_are_no_secrets() -> None:
    assert as_object("event=finished prompt_tokens=5 key_sha256=ab")["prompt_tokens"] == 5


def test_what_ray_forwards_and_what_is_said_become_objects() -> None:
    out = io.StringIO()
    lines = JsonLines(out)
    inner = JsonFormatter().format(record("event=node_up node=d0"))
    lines.write(f"\x1b[36m(decode-0 pid=12)\x1b[0m {inner}\n\x1b[36m(decode-0 pid=12, ip=10.0.0.2)\x1b[0m {inner}\n")
    lines.write("baton: 2 of 3")
    lines.write(" are up\n\n")
    first, second, third = map(json.loads, out.getvalue().splitlines())
    assert first == second and first["event"] == "node_up" and first["node"] == "d0"
    assert third["message"] == "2 of 3 are up" and third["logger"] == "baton"


def test_lines_of_two_threads_stay_apart() -> None:
    out = io.StringIO()
    lines = JsonLines(out)
    lines.write("baton: decode-0 ")
    other = threading.Thread(target=lines.write, args=("baton: decode-1 is up\n",))
    other.start()
    other.join()
    lines.write("is gone\n")
    said = [json.loads(line)["message"] for line in out.getvalue().splitlines()]
    assert said == ["decode-1 is up", "decode-0 is gone"]


async def test_a_process_writes_nothing_but_objects(redis_url: str) -> None:
    """A real router process, at its most talkative."""
    config = json.dumps({"model_dir": str(POCKET), "redis_url": redis_url, "cluster": "logs"})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.process", "router", config, "--log-level", "debug", "--log-format", "json"),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    ready = await asyncio.wait_for(process.stdout.readline(), 60)
    process.terminate()
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert ready.startswith(b"READY")
    lines = [json.loads(line) for line in errors.decode().splitlines()]
    assert any(line.get("event") == "router_up" and line["level"] == "info" for line in lines)
    assert all({"ts", "level", "logger"} <= set(line) for line in lines)
