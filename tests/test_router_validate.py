"""Checks of a request: every limit is named, at its edge; bytes that are no message have an answer too."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batonpb import common_pb2, inference_pb2
from router.errors import InvalidRequest
from router.validate import (
    Limits,
    check,
    check_detokenize,
    check_length,
    check_model,
    check_prompt,
    check_tokens,
    parse,
)

LIMITS = Limits(max_message_bytes=10_000, max_prompt_bytes=1_000)


def sampling(**fields: object) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(**fields)


def request(**fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**({"text": "x"} | fields))


GOOD = [
    sampling(),
    sampling(temperature=0.0),
    sampling(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=2.0),
    sampling(min_p=1.0, top_p=0.001, presence_penalty=-2.0, frequency_penalty=2.0),
    sampling(max_tokens=1, min_tokens=1, logprobs=20, seed=2**64 - 1),
    sampling(stop_token_ids=range(16), stop=["x" * 256] * 16, logprobs=0),
    sampling(min_tokens=5),
    sampling(logit_bias={n: 100.0 if n % 2 else -100.0 for n in range(300)}),
]
BAD = [
    ("temperature", sampling(temperature=-0.001), "[0, 2]"),
    ("temperature", sampling(temperature=2.001), "[0, 2]"),
    ("temperature", sampling(temperature=float("inf")), "[0, 2]"),
    ("temperature", sampling(temperature=float("nan")), "nan"),
    ("top_k", sampling(top_k=-1), "at least 0"),
    ("top_p", sampling(top_p=0.0), "(0, 1]"),
    ("top_p", sampling(top_p=1.001), "(0, 1]"),
    ("min_p", sampling(min_p=-0.001), "[0, 1]"),
    ("repetition_penalty", sampling(repetition_penalty=0.0), "(0, 2]"),
    ("presence_penalty", sampling(presence_penalty=2.001), "[-2, 2]"),
    ("frequency_penalty", sampling(frequency_penalty=float("nan")), "[-2, 2]"),
    ("max_tokens", sampling(max_tokens=0), "at least 1"),
    ("min_tokens", sampling(min_tokens=9, max_tokens=8), "8"),
    ("stop_token_ids", sampling(stop_token_ids=range(17)), "16"),
    ("stop", sampling(stop=["x"] * 17), "16"),
    ("stop", sampling(stop=[""]), "256"),
    ("stop", sampling(stop=["x" * 257]), "256"),
    ("logprobs", sampling(logprobs=21), "20"),
    ("logit_bias", sampling(logit_bias=dict.fromkeys(range(301), 0.0)), "300 ids at most, got 301"),
    ("logit_bias", sampling(logit_bias={7: 100.5}), "[-100, 100], got 100.5 for token 7"),
    ("logit_bias", sampling(logit_bias={7: float("nan")}), "got nan for token 7"),
]


@pytest.mark.parametrize("params", GOOD, ids=str)
def test_values_at_the_edge_are_fine(params: common_pb2.SamplingParams) -> None:
    checked = check(request(sampling=params), LIMITS)
    assert checked.sampling == params and checked.text == "x"


@pytest.mark.parametrize(("field", "params", "limit"), BAD, ids=[f"{field}-{n}" for n, (field, _, _) in enumerate(BAD)])
def test_values_beyond_it_name_field_and_limit(field: str, params: common_pb2.SamplingParams, limit: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check(request(sampling=params), LIMITS)
    assert error.value.field == f"sampling.{field}" and limit in str(error.value)


CHAT = inference_pb2.ChatMessage
PROMPTS = [
    ("prompt", inference_pb2.GenerateRequest(), "must be set"),
    ("prompt.text", request(text=""), "empty"),
    ("prompt.text", request(text="é" * 501), "1000 bytes at most, got 1002"),
    ("prompt.tokens", inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt()), "empty"),
    ("prompt.chat.messages", inference_pb2.GenerateRequest(chat=inference_pb2.ChatPrompt()), "empty"),
    ("prompt.chat.messages.role", inference_pb2.GenerateRequest(chat={"messages": [CHAT(content="x")]}), "64"),
    (
        "prompt.chat",
        inference_pb2.GenerateRequest(chat={"messages": [CHAT(role="user", content="x" * 300)] * 4}),
        "1000 bytes at most, got 1200",
    ),
    ("request_id", request(request_id="i" * 129), "128"),
    ("request_id", request(request_id="i\nERROR event=forged"), "printable"),
]


@pytest.mark.parametrize(("field", "message", "limit"), PROMPTS, ids=[field for field, _, _ in PROMPTS])
def test_prompts(field: str, message: inference_pb2.GenerateRequest, limit: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        check(message, LIMITS)
    assert error.value.field == field and limit in str(error.value)


def test_each_kind_of_prompt() -> None:
    assert check(request(text="é" * 500), LIMITS).text == "é" * 500
    assert check(inference_pb2.GenerateRequest(tokens={"token_ids": [1, 2]}), LIMITS).token_ids == (1, 2)
    chat = check(inference_pb2.GenerateRequest(chat={"messages": [CHAT(role="user", content="")]}), LIMITS)
    assert chat.chat is not None and chat.text is None
    assert chat.chat.messages == ({"role": "user", "content": ""},)


def test_only_the_served_model() -> None:
    check_model("", "pocket")
    check_model("pocket", "pocket")
    with pytest.raises(InvalidRequest, match=r"model: 'pocket' is the model served here, got 'other'"):
        check_model("other", "pocket")


def test_lengths() -> None:
    check_length(9, 10)
    with pytest.raises(InvalidRequest, match=r"prompt: 9 tokens at most \(the model takes 10 .*got 10"):
        check_length(10, 10)
    with pytest.raises(InvalidRequest, match="got at least 10"):
        check_length(10, 10, is_bound=True)


def test_max_tokens_is_what_the_model_leaves() -> None:
    assert check_tokens([1] * 6, sampling(), 10, 50).max_tokens == 4
    assert check_tokens([1] * 6, sampling(max_tokens=3), 10, 50).max_tokens == 3
    asked = sampling(max_tokens=300)
    assert check_tokens([1] * 9, asked, 10, 50).max_tokens == 1
    assert asked.max_tokens == 300, "the client's own message is left alone"


@pytest.mark.parametrize(
    ("token_ids", "params", "problem"),
    [
        ([], sampling(), "prompt: must not be empty"),
        ([50], sampling(), r"prompt: token ids must be below 50 .*got 50"),
        ([1], sampling(stop_token_ids=[2**32 - 1]), r"sampling\.stop_token_ids: .* below 50"),
        ([1] * 6, sampling(min_tokens=5), r"sampling\.min_tokens: must be in \[0, 4\]"),
        ([1] * 6, sampling(min_tokens=5, max_tokens=7), r"sampling\.min_tokens: must be in \[0, 4\]"),
    ],
)
def test_what_the_model_does_not_take(token_ids: list[int], params: common_pb2.SamplingParams, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        check_tokens(token_ids, params, 10, 50)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"\x1a\x02\xff\xfe", r"^prompt\.text: must be valid UTF-8"),
        (b"\x0a\x01\x80", "^model: must be valid UTF-8"),
        (b"\x1a\x03\xed\xa0\x80", r"^prompt\.text: must be valid UTF-8"),  # a lone surrogate
        (b"\x2a\x06\x0a\x04\x12\x02\xff\xfe", r"^prompt\.chat\.messages\.content: must be valid UTF-8"),
        (b"\x32\x05\x62\x03ab\xff", r"^sampling\.stop: must be valid UTF-8"),
        (b"\xff" * 64, "^message: is no"),
        (b"\x1a\xff\xff\xff\xff\x0f", "^message: is no"),
        (b"\x1a\x05ab", "^message: is no"),
        (b"\x00" * 10_001, "^message: 10000 bytes at most, got 10001"),
    ],
)
def test_bytes_that_are_no_request(body: bytes, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        parse(body, LIMITS, inference_pb2.GenerateRequest)


def test_bytes_that_are_one() -> None:
    message = request(text="é", sampling=sampling(stop=["x"]))
    assert parse(message.SerializeToString(), LIMITS, inference_pb2.GenerateRequest) == message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(body: bytes) -> None:
    for kind in (inference_pb2.GenerateRequest, inference_pb2.TokenizeRequest):
        try:
            message = parse(body, LIMITS, kind)
            check_prompt(message, LIMITS)
            if isinstance(message, inference_pb2.GenerateRequest):
                check(message, LIMITS)
        except InvalidRequest as error:
            assert error.field


def test_numbers_of_answers() -> None:
    assert [check(request(n=n), LIMITS).num_answers for n in (0, 1, 16)] == [1, 1, 16]
    assert check(request(n=16, request_id="i" * 125), LIMITS) and check(request(n=1, request_id="i" * 128), LIMITS)
    with pytest.raises(InvalidRequest, match=r"^n: must be in \[1, 16\], got 17"):
        check(request(n=17), LIMITS)


def test_what_must_be_called_can_be_asked_for_and_counted() -> None:
    chat = {"messages": [CHAT(role="user")], "tools": [{"name": "f"}], "tool_choice": "TOOL_CHOICE_REQUIRED"}
    checked = check(inference_pb2.GenerateRequest(chat=chat), LIMITS).chat
    assert checked is not None and checked.is_required
    assert check_prompt(inference_pb2.TokenizeRequest(chat=chat), LIMITS)["chat"] == checked


def test_the_routers_own_grammar_is_no_clients() -> None:
    for text in ('start: "a"', ""):
        with pytest.raises(InvalidRequest, match=r"^sampling\.grammar\.lark: is the router's own to set"):
            check(inference_pb2.GenerateRequest(text="x", sampling={"lark": text}), LIMITS)


def test_tokens_to_make_text_of() -> None:
    message = inference_pb2.DetokenizeRequest(token_ids=[0, 49])
    assert check_detokenize(message, 50) == [0, 49]
    with pytest.raises(InvalidRequest, match=r"^token_ids: token ids must be below 49"):
        check_detokenize(message, 49)
