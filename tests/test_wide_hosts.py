"""One node on two hosts, made of two network namespaces: half of its layers on each, and a Ray machine in each."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from hosts_harness import NETNS
from test_two_hosts import BIN, MAX_TOKENS, PROMPT, RAY_PORT, folder, hosts, model, run, start, start_ray

from benchmarks.lan import Host
from deploy import oracle
from router.tokenizer import Tokenizer

__all__ = ["folder", "hosts", "model"]

pytestmark = [*NETNS, pytest.mark.ray]


def test_stages_of_a_node_on_two_hosts(hosts: tuple[Host, Host], folder: Path, model: Path) -> None:
    first, second = hosts
    state = ("--state-dir", str(folder / "state"))
    with ExitStack() as stack:
        start_ray(first, second, stack, folder)
        cut = ["--both", "1", "--pipeline-parallel-size", "2"]
        where = ["--ray-address", f"{first.address}:{RAY_PORT}", "--num-threads", "1", "--store-memory", "64M"]
        serve = start(first, stack, folder / "serve.log", f"{BIN}/baton", "serve", str(model), *cut, *where, *state)
        assert serve.stdout is not None
        assert serve.stdout.readline().startswith("ready: "), (folder / "serve.log").read_text()
        assert all(f"both-0{rank} is up on" in (folder / "serve.log").read_text() for rank in ("", ".1"))

        token_ids = Tokenizer(model).encode(PROMPT)
        [alone] = oracle.ask(model, [oracle.Question(token_ids, {"temperature": 0.0, "max_tokens": MAX_TOKENS})])
        sampling = ["--temperature", "0", "--max-tokens", str(MAX_TOKENS)]
        before = first.received_bytes() + second.received_bytes()  # either may have the first stage
        answer = json.loads(run(first, f"{BIN}/baton", "generate", PROMPT, "--json", *sampling, *state))
        assert answer["token_ids"] == alone
        after = first.received_bytes() + second.received_bytes()
        assert after - before > len(token_ids) * 256 * 4, "activations of all tokens went over"

        run(first, f"{BIN}/baton", "down", *state)
        assert serve.wait(20) == 0
