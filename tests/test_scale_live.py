"""`baton scale` from another terminal while requests flow: no request is lost, none notices, and no process stays."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from conftest import eventually
from node_harness import prompt_of
from test_deploy_serve import KEY, Serve, left_of

from batonpb import common_pb2, inference_pb2, inference_pb2_grpc
from deploy import oracle
from deploy.processes import CLUSTER_VARIABLE, command, is_running, processes_of

pytestmark = pytest.mark.ray

SIZES = ["--prefill", "1", "--decode", "1", "--kv-memory", "16M", "--store-memory", "32M", "--num-threads", "1"]
SHORT, LONG = 24, 700  # tokens of an answer
NUM_PROMPTS = 24


class Client:
    """Asks for prompts by their numbers, and keeps each answer's tokens and timeline."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self.answers: list[tuple[int, list[int], inference_pb2.Timeline]] = []

    async def ask(self, prompt: int, begun: asyncio.Event | None = None) -> inference_pb2.Timeline:
        sampling = common_pb2.SamplingParams(**sampling_of(prompt))
        request = inference_pb2.GenerateRequest(sampling=sampling)
        request.tokens.token_ids.extend(prompt_of(100 + prompt, seed=prompt))
        tokens: list[int] = []
        metadata = [("authorization", f"Bearer {KEY}")]
        async for message in self._stub.Generate(request, timeout=120, metadata=metadata):
            tokens += [token.token_id for token in message.tokens]
            if begun is not None:
                begun.set()
        self.answers.append((prompt, tokens, message.timeline))
        return message.timeline

    @asynccontextmanager
    async def traffic(self, num_at_a_time: int = 3) -> AsyncIterator[None]:
        """Requests one behind the other, all the time; one that fails fails the test."""
        numbers, is_over = itertools.cycle(range(NUM_PROMPTS)), False

        async def one_behind_the_other() -> None:
            while not is_over:
                await self.ask(next(numbers))

        tasks = [asyncio.create_task(one_behind_the_other()) for _ in range(num_at_a_time)]
        try:
            yield
        finally:
            is_over = True
            await asyncio.gather(*tasks)

    async def close(self) -> None:
        await self._channel.close()


def sampling_of(prompt: int) -> dict[str, float]:
    """Prompts behind the short ones are of long answers."""
    return {"temperature": 0.0, "ignore_eos": True, "max_tokens": SHORT if prompt < NUM_PROMPTS else LONG}


def servers(cluster_id: str) -> set[int]:
    """Pids of Baton's own, each in an actor."""
    return {pid for pid in processes_of(CLUSTER_VARIABLE, cluster_id) if command(pid).startswith("ray::ServerA")}


@pytest.fixture
def serve(tiny_model_dir: Path, tmp_path: Path) -> Iterator[Serve]:
    serve = Serve(tiny_model_dir, tmp_path / "state", SIZES)
    yield serve
    if serve.process.poll() is None:
        serve.process.terminate()
    serve.process.communicate(timeout=60)


async def scale(serve: Serve, *counts: str) -> list[str]:
    """What it says; while it works, requests flow."""
    done = await asyncio.to_thread(serve.baton, "scale", *counts)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


async def test_nodes_come_and_go_under_load(serve: Serve, tiny_model_dir: Path) -> None:
    await asyncio.to_thread(serve.ready_line)
    state = json.loads((serve.state_dir / "serve.json").read_text())
    client, at_first = Client(state["routers"][0]), servers(serve.cluster_id)
    assert len(at_first) == 4, "a store, two nodes, a router"
    async with client.traffic():
        # 1. Up, by both roles, and the new nodes are used.
        lines = await scale(serve, "--prefill", "2", "--decode", "2")
        assert lines == ["decode-1 is up on 127.0.0.1", "prefill-1 is up on 127.0.0.1"]
        new = servers(serve.cluster_id) - at_first
        assert len(new) == 2
        await eventually(lambda: {"decode-1", "prefill-1"} <= names(client.answers), 30, "the new nodes are used")
        # 2. Down while long answers come from them: these end where they are, and nothing moves.
        begun = [asyncio.Event() for _ in range(6)]
        long = [asyncio.create_task(client.ask(NUM_PROMPTS + n, event)) for n, event in enumerate(begun)]
        await asyncio.gather(*(event.wait() for event in begun))
        lines = await scale(serve, "--prefill", "1", "--decode", "1")
        assert lines == ["decode-1 is drained and gone", "prefill-1 is drained and gone"]
        await eventually(lambda: not any(map(is_running, new)), 20, "their processes end")
        timelines = await asyncio.gather(*long)
        assert "decode-1" in {timeline.decode_node for timeline in timelines}
        assert [timeline.migrations for timeline in timelines] == [0] * len(timelines)
        refused = await asyncio.to_thread(serve.baton, "scale", "--decode", "0")
        assert refused.returncode == 1 and "--decode must be 1 or more" in refused.stderr
    await client.close()
    assert servers(serve.cluster_id) == at_first, "nobody was restarted, and nobody stayed"
    await assert_as_alone(client.answers, tiny_model_dir)

    def is_quiet() -> bool:
        nodes = json.loads(serve.baton("status", "--json").stdout)["nodes"]
        is_idle = all(node["free_blocks"] == node["total_blocks"] and not node["num_running"] for node in nodes)
        return is_idle and {node["node_id"] for node in nodes} == {"prefill-0", "decode-0"}

    await eventually(is_quiet, 20, "all blocks are free")
    cluster_id = serve.cluster_id
    assert serve.baton("down").returncode == 0
    assert serve.process.wait(5) == 0
    assert left_of(cluster_id) == []


def names(answers: Sequence[tuple[int, list[int], inference_pb2.Timeline]]) -> set[str]:
    return {name for _, _, timeline in answers for name in (timeline.prefill_node, timeline.decode_node)}


async def assert_as_alone(answers: Sequence[tuple[int, list[int], inference_pb2.Timeline]], model_dir: Path) -> None:
    asked = sorted({prompt for prompt, _, _ in answers})
    questions = [oracle.Question(prompt_of(100 + prompt, seed=prompt), sampling_of(prompt)) for prompt in asked]
    expected = dict(zip(asked, await asyncio.to_thread(oracle.ask, model_dir, questions), strict=True))
    assert len(answers) > 30
    assert all(tokens == expected[prompt] for prompt, tokens, _ in answers)
