"""Grammars on nodes: what comes out is what a brute-force loop in transformers gives, on one node or on two."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import numpy as np
import pytest
import torch
from conftest import POCKET, eventually
from llguidance import LLMatcher
from node_harness import (
    Machine,
    decode,
    finish,
    ids,
    journey,
    node_request,
    prompt_of,
    running_machine,
    sampling,
    start,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from batonpb import common_pb2
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.request import Request
from grammar.compiler import Compiler
from grammar.queue import MAX_WAITING
from grammar.source import Grammar, grammar_of
from node.convert import to_sampling_params
from node.errors import Busy
from node.grammar import GrammarMask, GrammarMasks

EOS, VOCAB = 257, 258
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["list", "tuple", "dict"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
    },
    "required": ["name", "kind", "count", "tags"],
    "additionalProperties": False,
}
REGEX = r"[A-Z][a-z]{2,8} [0-9]{3}-[0-9]{4}(; (yes|no))?"
CHOICES = ["a list", "a list of names", "a tuple", "None"]
PROMPT = [256, *b"What is returned by the function, written as JSON?\n"]
COMPILER = Compiler(POCKET, [EOS], VOCAB)
GRAMMARS: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": json.dumps(SCHEMA)},
    "regex": {"regex": REGEX},
    "choice": {"choice": common_pb2.ChoiceGrammar(choices=CHOICES)},
}


def asked(name: str, **fields: Any) -> common_pb2.SamplingParams:
    return sampling(**({"ignore_eos": False, "max_tokens": 300} | GRAMMARS[name] | fields))


def assert_fits(name: str, text: str) -> None:
    if name == "schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif name == "regex":
        assert re.fullmatch(REGEX, text)
    else:
        assert text in CHOICES


def allowed_choice(output: bytes) -> set[int]:
    longer = [text.encode() for text in CHOICES if text.encode().startswith(output) and len(text) > len(output)]
    return {text[len(output)] for text in longer} | ({EOS} if output.decode() in CHOICES else set())


def allowed_by_trying(name: str) -> Callable[[bytes], set[int]]:
    """Each token is put to a matcher of its own: no mask is computed."""
    grammar = grammar_of(asked(name))
    assert grammar is not None

    def allowed(output: bytes) -> set[int]:
        matcher = COMPILER.matcher(grammar)
        assert matcher.consume_tokens(list(output))
        return {token_id for token_id in range(VOCAB) if matcher.deep_copy().consume_token(token_id)}

    return allowed


@pytest.fixture(scope="module")
def transformer() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(POCKET, EngineConfig(dtype="float32", num_blocks=256, num_threads=1))


def run(engine: Engine, message: common_pb2.SamplingParams, outputs: tuple[int, ...] = ()) -> list[int]:
    """One engine's output, from behind `outputs`."""
    grammar = grammar_of(message)
    assert grammar is not None
    tokens, params = [*PROMPT, *outputs], to_sampling_params(message)
    mask = GrammarMask(COMPILER.matcher(grammar), grammar)
    engine.add(Request("r", tokens, len(PROMPT), params, engine.layout.root(), engine.layout.block_size, mask=mask))
    request = engine.request("r")
    while not request.is_finished:
        for output in engine.step():
            engine.unpin([block.block_id for block in output.full_blocks])
            if output.error is not None:
                raise output.error
    return request.token_ids[len(PROMPT) :]


def text_of(token_ids: list[int]) -> str:
    assert token_ids[-1] == EOS and EOS not in token_ids[:-1]
    return bytes(token_ids[:-1]).decode()


@pytest.mark.parametrize("name", GRAMMARS)
def test_greedy_is_what_a_loop_over_the_allowed_tokens_gives(
    name: str, engine: Engine, transformer: PreTrainedModel
) -> None:
    allowed = allowed_choice if name == "choice" else allowed_by_trying(name)
    output: list[int] = []
    with torch.inference_mode():
        while EOS not in output:
            logits = transformer(torch.tensor([[*PROMPT, *output]])).logits[0, -1]
            candidates = sorted(allowed(bytes(output)))
            output.append(candidates[int(logits[candidates].argmax())])
    assert run(engine, asked(name)) == output
    assert_fits(name, text_of(output))


@pytest.mark.parametrize("name", GRAMMARS)
def test_any_seed_gives_a_text_of_the_grammar(name: str, engine: Engine) -> None:
    texts = set()
    for seed in range(8):
        message = asked(name, temperature=1.5, seed=seed, frequency_penalty=0.5, top_p=0.95)
        output = run(engine, message)
        assert_fits(name, text_of(output))
        texts.add(text_of(output))
        for cut in {1, len(output) // 2, len(output) - 1}:
            assert run(engine, message, outputs=tuple(output[:cut])) == output
    assert len(texts) > 1


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 200}])
@pytest.mark.parametrize("name", GRAMMARS)
def test_nothing_comes_behind_the_end(name: str, fields: dict[str, Any], engine: Engine) -> None:
    assert_fits(name, text_of(run(engine, asked(name, **fields))))


def test_a_json_object_is_one_though_the_model_would_go_on(engine: Engine) -> None:
    bias = {ord("}"): 100.0}  # ends it as soon as it may
    output = run(engine, sampling(json_object=True, ignore_eos=True, logit_bias=bias))
    assert json.loads(text_of(output)) == {}


def test_outputs_that_no_text_begins_with_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.grammar\.regex"):
        run(engine, asked("regex"), outputs=tuple(b"nothing like it"))


def test_a_full_mask_has_the_width_of_the_model() -> None:
    """A model may have more logits than its tokenizer has tokens: those are never allowed."""
    wide = Compiler(POCKET, [EOS], 300)
    grammar = grammar_of(sampling(regex="(?s:.*)"))
    assert grammar is not None
    words = np.zeros(-(-300 // 32), dtype=np.uint32)
    GrammarMask(wide.matcher(grammar), grammar).fill([], words)
    ids = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0]
    assert EOS in ids and 256 not in ids and ids.max() == EOS


async def test_masks_of_no_grammar_cost_nothing() -> None:
    assert await GrammarMasks(Compiler(Path("/nowhere"), [EOS])).mask(sampling()) is None


async def test_masks_of_one_grammar_share_what_is_compiled_and_nothing_else() -> None:
    masks, message = GrammarMasks(COMPILER), sampling(regex="ab")
    first, second = await masks.mask(message), await masks.mask(message)
    assert first is not None and second is not None
    words = np.zeros(-(-VOCAB // 32), dtype=np.uint32)
    for mask, output, allowed in ((first, b"", "a"), (first, b"a", "b"), (second, b"", "a"), (first, b"ab", "")):
        mask.fill(list(output), words)
        ids = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist()
        assert ids == ([ord(allowed)] if allowed else [EOS])


async def test_a_grammar_that_was_compiled_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, compiled = threading.Event(), Compiler.matcher

    def matcher(compiler: Compiler, grammar: Grammar) -> LLMatcher:
        assert grammar.kind == "json_object" or let_go.wait(30)
        return compiled(compiler, grammar)

    monkeypatch.setattr(Compiler, "matcher", matcher)
    masks = GrammarMasks(COMPILER)
    assert await masks.mask(sampling(json_object=True)) is not None
    others = [asyncio.create_task(masks.mask(sampling(regex=f"a{{{n + 1}}}"))) for n in range(MAX_WAITING)]
    try:
        await asyncio.sleep(0)
        assert await masks.mask(sampling(json_object=True)) is not None
        with pytest.raises(Busy, match="32 others wait to be compiled"):
            await masks.mask(sampling(regex="b"))
    finally:
        let_go.set()
    assert None not in await asyncio.gather(*others)


# --- nodes ---


@pytest.fixture
async def machine(tiny_model_dir: Path, redis_url: str, short_dir: Path) -> AsyncIterator[Machine]:
    async with running_machine(tiny_model_dir, redis_url, short_dir) as machine:
        yield machine


@pytest.mark.parametrize("name", GRAMMARS)
async def test_a_hand_off_and_a_failover_change_nothing(name: str, machine: Machine) -> None:
    await machine.store()
    first, second = await machine.node(), await machine.node()
    prompt = prompt_of(70)
    request = node_request(prompt, sampling=asked(name, temperature=1.0))
    alone = (await decode(first, request)).token_ids
    assert_fits(name, text_of(alone))
    tokens, decoded = await journey(first, second, request)
    assert tokens == alone and decoded.finished is not None
    assert decoded.finished.finish_reason == common_pb2.FINISH_REASON_STOP
    for cut in (1, 2, len(alone) - 1):
        behind = node_request([*prompt, *alone[:cut]], len(prompt), sampling=request.sampling)
        assert (await decode(second, behind)).token_ids == alone[cut:]
        call = await first.admit(request)
        await start(call, alone[:cut])
        assert (await finish(call)).token_ids == alone[cut:]


async def test_what_a_grammar_cannot_do_is_a_status(machine: Machine) -> None:
    """Refused before the engine hears of it; and where it comes to nothing, the tokens until then and a status."""
    node = await machine.node(store_dir="")
    prompt = prompt_of(20)
    for grammar, problem in [
        ({"regex": "("}, "unclosed"),
        ({"json_schema": "{"}, "no JSON"),
        ({"json_object": False}, "must be true"),
    ]:
        request = node_request(prompt)
        request.sampling.MergeFrom(common_pb2.SamplingParams(**grammar))
        for call in (node.prefill(request), decode(node, request)):
            with pytest.raises(grpc.aio.AioRpcError, match=problem) as error:
                await call
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    stuck = node_request([*prompt, *b"no"], len(prompt), sampling=asked("regex"))
    for call in (node.prefill(stuck), decode(node, stuck)):
        with pytest.raises(grpc.aio.AioRpcError, match=r"sampling\.grammar\.regex") as error:
            await call
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    await eventually(node.is_clean)


async def test_a_grammar_that_costs_too_much_ends_behind_its_tokens(machine: Machine) -> None:
    """Its first state is cheap and the next ones are not, so no check in advance could tell."""
    node = await machine.node(store_dir="")
    request = node_request(prompt_of(20), sampling=sampling(regex="((a{1000}){1000}){1000}", max_tokens=100))
    call = await node.admit(request)
    await start(call)
    streamed: list[int] = []
    with pytest.raises(grpc.aio.AioRpcError, match=r"sampling\.grammar\.regex: .*too many") as error:
        while True:
            streamed += ids((await call.read()).tokens.tokens)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert streamed and set(streamed) == {ord("a")}
    await eventually(node.is_clean)
