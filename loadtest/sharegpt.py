"""Conversations from a ShareGPT file: a list of `{"conversations": [{"from": "human", "value": "..."}, ...]}`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadtest.workload import Session, Turn

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
MIN_TOKENS, MAX_INPUT_TOKENS, MAX_TOTAL_TOKENS = 4, 1024, 2048  # as `vllm bench serve` filters


class BadShareGpt(ValueError):
    """The file is not a list of conversations; says where."""


def read_sharegpt(
    path: Path, count_tokens: Callable[[str], int], max_turns: int, max_model_len: int = 0
) -> list[Session]:
    """All conversations in which a human asks and gets an answer, cut after `max_turns` questions.

    Each turn asks for as many tokens as the answer in the file has. Conversations whose first question has less than 4
    or more than 1,024 tokens, or with more than 2,048 (or `max_model_len`) tokens in all, are left out. Raises
    `BadShareGpt`, OSError.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadShareGpt(f"{path.name}: not JSON: {error}") from error
    if not isinstance(content, list):
        raise BadShareGpt(f"{path.name}: must be a list, got {type(content).__name__}")
    limit = min(MAX_TOTAL_TOKENS * max_turns, max_model_len or MAX_TOTAL_TOKENS * max_turns)
    sessions = []
    for number, item in enumerate(content):
        pairs = _pairs(item, f"{path.name}, conversation {number}")[:max_turns]
        lengths = [(count_tokens(question), count_tokens(answer)) for question, answer in pairs]
        if pairs and _fits(lengths, limit):
            turns = (Turn(pairs[i][0], num_out) for i, (_, num_out) in enumerate(lengths))
            sessions.append(Session(tuple(turns)))
    return sessions


def _fits(lengths: list[tuple[int, int]], limit: int) -> bool:
    total = sum(num_in + num_out for num_in, num_out in lengths)
    shortest = min(min(pair) for pair in lengths)
    return shortest >= MIN_TOKENS and lengths[0][0] <= MAX_INPUT_TOKENS and total <= limit


def _pairs(item: Any, where: str) -> list[tuple[str, str]]:
    """Alternating questions and answers, from the first question on, until they no longer alternate."""
    messages = item.get("conversations", item.get("conversation")) if isinstance(item, dict) else None
    if not isinstance(messages, list):
        raise BadShareGpt(f"{where}: `conversations` must be a list")
    said: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise BadShareGpt(f"{where}: a message must have a text `value`")
        said.append((_ROLES.get(str(message.get("from")), ""), message["value"]))
    if said and said[0][0] != "user":  # a system prompt, or an answer to what was cut off
        said = said[1:]
    pairs = []
    for (asker, question), (answerer, answer) in zip(said[::2], said[1::2], strict=False):
        if (asker, answerer) != ("user", "assistant") or not question or not answer:
            break
        pairs.append((question, answer))
    return pairs
