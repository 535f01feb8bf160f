"""Grammars at the router's door: what is none is refused before a node hears of it, and an end is an end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import grpc
import pytest
from conftest import POCKET
from llguidance import LLMatcher
from router_fakes import FakeCluster, request, running, saying

from batonpb import common_pb2, inference_pb2
from grammar.compiler import Compiler
from grammar.queue import MAX_WAITING
from grammar.source import Grammar
from router.errors import ClusterBusy
from router.grammar import GrammarChecker
from router.tokenizer import Tokenizer

INVALID = grpc.StatusCode.INVALID_ARGUMENT
CHOICE = common_pb2.ChoiceGrammar(choices=["{}"])


@pytest.fixture
async def cluster(redis_url: str) -> AsyncIterator[FakeCluster]:
    async with running(FakeCluster(redis_url)) as cluster:
        for node_id in ("prefill0", "decode0", "decode1"):
            await cluster.add(node_id, saying("{}"))
        await cluster.open()
        yield cluster


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"json_schema": '{"uniqueItems": true}'}, 'sampling.grammar.json_schema: Unimplemented keys: ["uniqueItems"]'),
        ({"json_schema": "{"}, "sampling.grammar.json_schema: is no JSON"),
        ({"json_schema": '{"type": "string"}' + " " * 65_536}, "sampling.grammar.json_schema: must have 1 to 65536"),
        ({"regex": "(a"}, "sampling.grammar.regex: "),
        ({"regex": r"[^\s\S]"}, "sampling.grammar.regex: no text matches it"),
        ({"choice": common_pb2.ChoiceGrammar()}, "sampling.grammar.choice: must have 1 to 256 texts, got 0"),
        ({"json_object": False}, "sampling.grammar.json_object: must be true"),
        ({"logit_bias": {258: 1.0}}, "sampling.logit_bias: token ids must be below 258"),
    ],
    ids=range(8),
)
async def test_what_is_no_grammar_costs_no_node_anything(
    cluster: FakeCluster, fields: dict[str, object], problem: str
) -> None:
    for _ in range(2):  # a verdict is kept
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await cluster.ask("x", **fields)
        assert error.value.code() == INVALID and error.value.details().startswith(problem)
    assert not any(node.seen.admits or node.seen.prefills for node in cluster.nodes.values())


async def test_a_grammar_that_is_no_text_has_an_answer_too(cluster: FakeCluster) -> None:
    for field in ("json_schema", "regex"):
        body = request("x", **{field: "AAAA"}).SerializeToString().replace(b"AAAA", b"\xff\xfe\xff\xfe")
        with pytest.raises(grpc.aio.AioRpcError, match=f"sampling.grammar.{field}: must be valid UTF-8") as error:
            async for _ in cluster.channel.unary_stream("/baton.v1.Inference/Generate")(body):
                pass
        assert error.value.code() == INVALID


async def test_nodes_get_grammar_and_biases_as_they_are(cluster: FakeCluster) -> None:
    answer = await cluster.ask("x", choice=CHOICE, logit_bias={3: 1.5, 5: -100.0})
    assert answer.text == "{}" and answer.finish_reason == common_pb2.FINISH_REASON_STOP
    [admit] = [admit for node in cluster.nodes.values() for admit in node.seen.admits]
    assert admit.sampling.choice == CHOICE and dict(admit.sampling.logit_bias) == {3: 1.5, 5: -100.0}


@pytest.mark.parametrize("fields", [{}, {"min_tokens": 9}, {"ignore_eos": True}], ids=str)
async def test_an_end_token_behind_a_grammar_is_the_end(cluster: FakeCluster, fields: dict[str, object]) -> None:
    """Also where its node dies before it can say so, and nobody else is asked for more."""
    for name in ("decode0", "decode1"):
        cluster.nodes[name].faults["token 3"] = grpc.StatusCode.UNAVAILABLE
    answer = await cluster.ask("x", json_object=True, **fields)
    assert (answer.text, answer.token_ids[-1], answer.finish_reason) == ("{}", 257, common_pb2.FINISH_REASON_STOP)
    assert sum(len(node.seen.admits) for node in cluster.nodes.values()) == 1


async def test_a_node_that_finds_no_token_ends_the_request(cluster: FakeCluster) -> None:
    """It is the grammar's fault and not the node's, so nobody else is asked."""
    for name in ("decode0", "decode1"):
        cluster.nodes[name].faults["token 1"] = INVALID
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in cluster.stub.Generate(inference_pb2.GenerateRequest(text="x", sampling={"json_object": True})):
            pass
    assert error.value.code() == INVALID
    assert sum(len(node.seen.admits) for node in cluster.nodes.values()) == 1


async def test_a_grammar_that_was_judged_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, compiled = threading.Event(), Compiler.matcher

    def matcher(compiler: Compiler, grammar: Grammar) -> LLMatcher:
        assert grammar.kind == "json_object" or let_go.wait(30)
        return compiled(compiler, grammar)

    monkeypatch.setattr(Compiler, "matcher", matcher)
    checker = GrammarChecker(Tokenizer(POCKET))
    await checker.check(common_pb2.SamplingParams(json_object=True))
    others = [common_pb2.SamplingParams(regex=f"a{{{n + 1}}}") for n in range(MAX_WAITING)]
    checks = [asyncio.create_task(checker.check(other)) for other in others]
    try:
        await asyncio.sleep(0)
        await checker.check(common_pb2.SamplingParams(json_object=True))
        with pytest.raises(ClusterBusy, match=r"sampling\.grammar: 32 others wait to be compiled"):
            await checker.check(common_pb2.SamplingParams(regex="b"))
    finally:
        let_go.set()
    await asyncio.gather(*checks)
    await checker.check(common_pb2.SamplingParams(regex="b"))
