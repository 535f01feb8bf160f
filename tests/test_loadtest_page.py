"""`docs/loadtest.md` names all flags of `baton bench`; its examples are understood; recipes work where tools are."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from conftest import REPOSITORY
from openai_server import OpenAiServer

from loadtest import compare, flags
from loadtest.config import BACKENDS, DATASETS, BenchConfig

PAGE = (REPOSITORY / "docs" / "loadtest.md").read_text()
OURS, OTHERS = PAGE.split("## Other tools")
EXAMPLES = re.findall(r"^baton bench .*", OURS, re.MULTILINE)


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    thread = OpenAiServer()
    yield thread
    thread.close()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(add_help=False)
    flags.add_arguments(found)
    return found


def test_the_page_names_all_flags_and_no_others() -> None:
    there_are = {name for action in parser()._actions for name in action.option_strings}
    named = set(re.findall(r"(--[a-z-]+)", OURS))
    vllms, the_reports = {"--enable-prompt-tokens-details"}, {"--out"}
    assert named - vllms - the_reports <= there_are
    assert there_are - named == {"--ignore-eos"}  # on by default; the page has --no-ignore-eos


def test_the_page_shows_all_kinds() -> None:
    for name in (*BACKENDS[1:], *DATASETS):
        assert any(f"{name} " in line for line in EXAMPLES), name


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_examples_are_understood(line: str) -> None:
    arguments = shlex.split(line, comments=True)[2:]
    if arguments[0] == "report":
        reports = argparse.ArgumentParser()
        compare.add_arguments(reports)
        reports.parse_args(arguments[1:])
        return
    args = parser().parse_args(arguments)
    args.address = args.address or "127.0.0.1:1"
    BenchConfig.from_args(args)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_page_is_found(page: str) -> None:
    assert "loadtest.md" in (REPOSITORY / page).read_text()


@pytest.mark.skipif(shutil.which("locust") is None, reason="Locust is not installed")
def test_locust_agrees(server: OpenAiServer) -> None:
    command = ["locust", "-f", "docs/recipes/locustfile.py", "--headless", "--users", "2", "--spawn-rate", "2"]
    command += ["--run-time", "3s", "--host", server.base_url, "--only-summary"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    row = re.search(r"TTFT +/v1/completions +(\d+) +0\(0.00%\)", done.stderr + done.stdout)
    assert row is not None and int(row[1]) <= len(server.bodies)


@pytest.mark.skipif(shutil.which("aiperf") is None, reason="AIPerf is not installed")
def test_aiperf_agrees(server: OpenAiServer, tmp_path: object) -> None:
    command = ["aiperf", "profile", "--model", "fake", "--url", server.base_url, "--endpoint-type", "chat"]
    command += ["--streaming", "--tokenizer", str(REPOSITORY / "models" / "pocket"), "--use-server-token-count"]
    command += ["--request-rate", "20", "--request-count", "10", "--synthetic-input-tokens-mean", "64"]
    command += ["--output-tokens-mean", "8", "--ui", "none"]
    done = subprocess.run(command, cwd=str(tmp_path), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(server.bodies) == 10


@pytest.mark.skipif(shutil.which("guidellm") is None, reason="GuideLLM is not installed")
def test_guidellm_agrees(server: OpenAiServer, tmp_path: object) -> None:
    command = ["guidellm", "run", "--backend", f"kind=openai_http,target={server.base_url}", "--disable-progress"]
    command += ["--profile", "kind=poisson,rate=10", "--constraint", "kind=max_requests,count=10"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=8"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={REPOSITORY / 'models' / 'pocket'}"]
    few = os.environ | {"GUIDELLM__MAX_WORKER_PROCESSES": "1"}  # each of which imports torch
    done = subprocess.run(command, cwd=str(tmp_path), env=few, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(server.bodies) >= 10


@pytest.mark.skipif(shutil.which("vllm") is None, reason="vLLM is not installed")
def test_vllms_client_agrees(server: OpenAiServer) -> None:
    command = ["vllm", "bench", "serve", "--backend", "openai", "--base-url", server.base_url, "--model", "fake"]
    command += ["--tokenizer", str(REPOSITORY / "models" / "pocket"), "--dataset-name", "random"]
    command += ["--random-input-len", "64", "--random-output-len", "8", "--num-prompts", "10", "--request-rate", "20"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"Successful requests: +10\b", done.stdout), done.stdout[-2000:]
