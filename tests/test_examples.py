"""The examples do what they say: each is run against a real router in front of fake nodes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from conftest import REPOSITORY
from google.protobuf import json_format
from grpc_health.v1 import health_pb2
from router_fakes import FakeCluster, running, saying
from tools_support import model_folder

from batonpb import inference_pb2

EXAMPLES = REPOSITORY / "examples"
SPOKEN = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "Etc/UTC"}}\n</tool_call>'


def obliging(prompt_ids: list[int], output_ids: list[int], seed: int) -> int:
    """Calls the tool where there is one that has not answered yet."""
    prompt = bytes(token_id for token_id in prompt_ids if token_id < 256).decode()
    wants = "get_time" in prompt and "(get_time, call_" not in prompt
    return saying(SPOKEN if wants else "It is late.")(prompt_ids, output_ids, seed)


@pytest.fixture
async def cluster(redis_url: str, tmp_path: Path) -> AsyncIterator[FakeCluster]:
    async with running(FakeCluster(redis_url)) as cluster:
        await cluster.add("both0", obliging, vocab_size=258)
        await cluster.open(model_folder(tmp_path / "pocket"))
        yield cluster


async def run(*command: str, said: str = "", **variables: str) -> tuple[int, str, str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "proto")} | variables
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
    out, err = await asyncio.wait_for(process.communicate(said.encode()), 60)
    return process.returncode or 0, out.decode(), err.decode()


async def test_generate(cluster: FakeCluster) -> None:
    script = str(EXAMPLES / "grpc_generate.py")
    code, out, err = await run(sys.executable, script, cluster.address, "Hello", "--max-tokens", "7", "--seed", "1")
    assert (code, err) == (0, "")
    assert out.startswith("It is l\n[0: length; 6 + 7 tokens, 0 cached; first token after 0.")
    code, out, err = await run(sys.executable, script, cluster.address, "Hello", "--n", "3")
    assert (code, err) == (0, "") and out.count("It is late.\n[") == 3
    code, out, err = await run(sys.executable, script, cluster.address, "Hello", "--temperature", "3")
    assert (code, out) == (1, "") and err == "INVALID_ARGUMENT: sampling.temperature: must be in [0, 2], got 3\n"


async def test_chat(cluster: FakeCluster) -> None:
    script = str(EXAMPLES / "grpc_chat.py")
    code, out, err = await run(sys.executable, script, cluster.address, said="What time is it?\nThanks!\n")
    assert (code, err) == (0, "")
    assert re.fullmatch(r'\n\(get_time\{"zone": "Etc/UTC"\} = \d{4}-.*\+00:00\)\nIt is late\.\nIt is late\.\n', out), (
        out
    )
    code, out, err = await run(sys.executable, script, cluster.address, "--no-tools", said="Hi\n\nnever\n")
    assert (code, out, err) == (0, "It is late.\n", "")


def commands() -> list[list[str]]:
    text = (EXAMPLES / "grpcurl.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


CALLS = [command for command in commands() if "-d" in command]
CODECS = {method.name: method for method in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods}


async def test_the_calls_of_grpcurl(cluster: FakeCluster) -> None:
    """What grpcurl would send; each method is there once at least."""
    seen = set()
    for command in CALLS:
        service, _, name = command[-1].partition("/")
        seen.add(name)
        if name == "Check":
            json_format.Parse(command[command.index("-d") + 1], health_pb2.HealthCheckRequest())
            continue
        assert service == "baton.v1.Inference"
        request = getattr(inference_pb2, CODECS[name].input_type.name)()
        json_format.Parse(command[command.index("-d") + 1], request)
        answer = getattr(cluster.stub, name)(request, timeout=20.0)
        if name == "Generate":
            assert [response async for response in answer][-1].finish_reason
        else:
            await answer
    assert seen == {*CODECS, "Check"}


@pytest.mark.skipif(shutil.which("grpcurl") is None, reason="there is no grpcurl")
async def test_grpcurl_itself(cluster: FakeCluster) -> None:
    for command in commands():
        filled = [word.replace("$ROUTER", cluster.address) for word in command]
        code, out, err = await run(*filled)
        assert code == 0 and out, err


def test_every_field_and_status_is_in_the_docs() -> None:
    page = (REPOSITORY / "docs" / "grpc.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([A-Za-z_0-9]+)`", page))
    for method in CODECS:
        assert f"## {method}" in page
    for message in inference_pb2.DESCRIPTOR.message_types_by_name.values():
        missing = {field.name for field in message.fields} - words
        assert not missing, f"{message.name}: {missing}"
    from router.grpc_door import STATUSES

    assert {code.name for code in STATUSES.values()} | {grpc.StatusCode.INTERNAL.name} <= words


def test_the_docs_own_json_is_json() -> None:
    page = (REPOSITORY / "docs" / "grpc.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json (\w+)\n(.*?)```", page, re.DOTALL)
    assert {name for name, _ in blocks} >= {"GenerateRequest", "GenerateResponse", "TokenizeRequest"}
    for name, text in blocks:
        for line in text.strip().split("\n\n"):
            json_format.ParseDict(json.loads(line), getattr(inference_pb2, name)())
