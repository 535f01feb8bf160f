"""The demo's judgement: it is the oracle's, and it is loud."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import POCKET

from batonpb import inference_pb2
from deploy import demo, oracle
from deploy.demo import Outcome, Shot

TEXT = "It is a list."


def outcome(text: str = TEXT, prefill_node: str = "prefill-0") -> Outcome:
    timeline = inference_pb2.Timeline(prefill_node=prefill_node, decode_node="decode-0", decode_store_hit_tokens=16)
    return Outcome(Shot("plain", "What is it?"), text, list(text.encode()), inference_pb2.Usage(), timeline)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(model_dir: Path, questions: Sequence[oracle.Question]) -> list[list[int]]:
        assert all(list(question.token_ids) == [256, *b"What is it?"] for question in questions)
        return [list(TEXT.encode()) for _ in questions]

    monkeypatch.setattr(oracle, "ask", ask)


def test_equal_texts_are_no_problem() -> None:
    assert demo.check([outcome(), outcome(prefill_node="")], POCKET) == []


def test_another_text_is_shown_beside_the_right_one() -> None:
    [problem] = demo.check([outcome(), outcome("It is a lisp.")], POCKET)
    assert "plain" in problem and "It is a lisp." in problem and TEXT in problem


def test_a_cluster_that_hands_nothing_over_is_a_problem() -> None:
    [problem] = demo.check([outcome(prefill_node="")], POCKET)
    assert "through the store" in problem
