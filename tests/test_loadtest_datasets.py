"""What is sent: lengths, what prompts share, conversations, ShareGPT's file and traces."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.lengths import sharegpt_lengths
from loadtest.replay import replay_prompts, scaled
from loadtest.sharegpt import BadShareGpt, read_sharegpt
from loadtest.trace import BLOCK_TOKENS, TracedRequest, make_trace
from loadtest.wording import NUM_WORDS, Vocabulary, Words
from loadtest.workload import Dice, Session, Shape, as_text, conversations, random_sessions, sharegpt_like

DICE = Dice(1, "nonce")
POCKET = Path(__file__).resolve().parent.parent / "models" / "pocket"


def test_chance_by_purpose() -> None:
    assert DICE.of("a").random() == Dice(1, "other").of("a").random()
    assert DICE.of_content("a").random() != Dice(1, "other").of_content("a").random()
    assert DICE.of("a").random() != DICE.of("b").random() != Dice(2, "nonce").of("b").random()
    assert DICE.step(1).of("a").random() == DICE.of("a").random()
    assert DICE.step(1).of_content("a").random() != DICE.step(2).of_content("a").random()


def test_conversations_have_turns_and_pauses() -> None:
    sessions = conversations(3, Shape(16, 5, turns=4, think_s=2.0), 258, DICE)
    assert [len(session.turns) for session in sessions] == [4] * 3
    turns = [turn for session in sessions for turn in session.turns]
    assert all(len(turn.content) == 16 and turn.output_tokens == 5 for turn in turns)
    assert len({turn.content for turn in turns}) == 12
    assert [session.turns[0].think_s for session in sessions] == [0.0] * 3
    assert all(turn.think_s > 0 for session in sessions for turn in session.turns[1:])
    assert all(not t.think_s for s in conversations(2, Shape(4, 5, turns=3), 258, DICE) for t in s.turns)


def test_lengths_are_near_those_of_sharegpt() -> None:
    """`vllm bench serve` takes 217 tokens in and 202 out on average from 1,000 of its conversations."""
    lengths = sharegpt_lengths(20_000, 2048, random.Random(1))
    assert statistics.fmean(num_in for num_in, _ in lengths) == pytest.approx(217, rel=0.1)
    assert statistics.fmean(num_out for _, num_out in lengths) == pytest.approx(202, rel=0.1)
    assert all(4 <= num_in <= 1024 and num_out >= 4 and num_in + num_out <= 2048 for num_in, num_out in lengths)


@given(limit=st.integers(64, 3000), seed=st.integers(0, 99))
def test_lengths_stay_within_the_model(limit: int, seed: int) -> None:
    assert all(sum(pair) <= limit for pair in sharegpt_lengths(5, limit, random.Random(seed)))


def test_a_model_too_small_for_conversations() -> None:
    with pytest.raises(ValueError, match="too few"):
        sharegpt_lengths(1, 63, random.Random(0))


def test_the_seed_fixes_lengths_and_not_what_is_said() -> None:
    one, other = (sharegpt_like(20, 2048, 258, Dice(1, nonce)) for nonce in "ab")
    assert [len(s.turns[0].content) for s in one] == [len(s.turns[0].content) for s in other]
    assert all(a != b for a, b in zip(one, other, strict=True))


# --- text ---


def test_words_are_as_many_as_tokens_and_begin_alike() -> None:
    wording = Words()
    ids = tuple(random.Random(1).choices(range(NUM_WORDS), k=50))
    text = wording.text(ids)
    assert len(text.split()) == 50
    assert wording.text((*ids, 3)).startswith(text)
    assert NUM_WORDS >= 128


def test_a_vocabulary_says_and_counts() -> None:
    wording = Vocabulary(POCKET)
    text = wording.text((70, 71, 72))
    assert text and wording.count(text) == 3
    for path, words in ((POCKET / "nothing.json", "there is no"), (POCKET / "config.json", "is no tokenizer")):
        with pytest.raises(ValueError, match=words):
            Vocabulary(path)


def test_sessions_as_text() -> None:
    sessions = [*random_sessions(2, Shape(8, 5), NUM_WORDS, DICE), Session(())]
    texts = as_text(sessions, Words())
    assert all(isinstance(turn.content, str) for session in texts for turn in session.turns)
    assert as_text(texts, Words()) == texts


# --- ShareGPT's file ---


def conversation(*said: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": words} for who, words in said]}


def read(tmp_path: Path, content: Any, max_turns: int = 1) -> list[Session]:
    file = tmp_path / "sharegpt.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_sharegpt(file, lambda text: len(text.split()), max_turns)


def test_conversations_out_of_a_file(tmp_path: Path) -> None:
    question, answer = "one two three four", "a b c d e"
    long = " ".join(["x"] * 1025)
    content = [
        conversation(("human", question), ("gpt", answer), ("human", question + " five"), ("gpt", answer + " f")),
        conversation(("system", "be brief"), ("user", question), ("assistant", answer)),
        conversation(("human", "short"), ("gpt", answer)),
        conversation(("human", long), ("gpt", answer)),
        conversation(("human", question)),
        conversation(),
        conversation(("human", question), ("human", answer)),
    ]
    sessions = read(tmp_path, content)
    assert [[(turn.content, turn.output_tokens) for turn in s.turns] for s in sessions] == [[(question, 5)]] * 2
    sessions = read(tmp_path, content, max_turns=3)
    assert [[turn.output_tokens for turn in s.turns] for s in sessions] == [[5, 6], [5]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("{}", "must be a list"),
        ("[" * 100_000, "not JSON"),
        ([1], "conversation 0: `conversations` must be a list"),
        ([conversation(), {"conversations": [{"from": "human"}]}], "conversation 1: a message must have a text"),
    ],
)
def test_what_is_no_such_file(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(BadShareGpt, match=words):
        read(tmp_path, content)


# --- traces ---


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), block_tokens=st.sampled_from([1, 16, BLOCK_TOKENS]))
def test_a_trace_reuses_what_it_says(seed: int, block_tokens: int) -> None:
    requests = make_trace(8, random.Random(seed))
    prompts = replay_prompts(requests, block_tokens, 2**20, "n")
    for request, prompt in zip(requests, prompts, strict=True):
        assert len(prompt) == scaled(request, block_tokens)[0]
        assert -(-len(prompt) // block_tokens) == len(request.blocks)
    if block_tokens > 1:
        for a, left in zip(requests, prompts, strict=True):
            for b, right in zip(requests, prompts, strict=True):
                both = zip(a.blocks, b.blocks, strict=False)
                shared = next((i for i, (x, y) in enumerate(both) if x != y), min(len(a.blocks), len(b.blocks)))
                count = min(shared * block_tokens, len(left), len(right))
                assert left[:count] == right[:count]
                assert left[count : count + block_tokens] != right[count : count + block_tokens] or left == right


def test_a_trace_is_fresh_with_another_nonce() -> None:
    request = TracedRequest(0.0, 600, 90, (1, 2))
    one, other = (replay_prompts([request], 512, 258, nonce)[0] for nonce in "ab")
    assert len(one) == len(other) == 600 and one[:16] != other[:16]


def test_a_trace_shrinks_with_its_blocks() -> None:
    assert scaled(TracedRequest(0.0, 600, 90, (1, 2)), 512) == (600, 90)
    assert scaled(TracedRequest(0.0, 600, 90, (1, 2)), 16) == (16 + 3, 3)
    assert scaled(TracedRequest(0.0, 1024, 1, (1, 2)), 16) == (32, 1)
