"""The model that benchmarks/serving.py serves: random weights, and a vocabulary in which each token is a word.

Words are "t0" to "t49151", in the text that comes back as in the text that is sent; so an answer's tokens can be read
from its text, whoever served it, and a conversation goes on with exactly the tokens that were answered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.engine_shapes import Shape

_WORD = re.compile(r"t(\d+)")


def write_model(shape: Shape, folder: Path) -> Path:
    """The shape's weights and a tokenizer beside them. Returns the folder."""
    shape.write(folder)
    vocabulary = {word(token): token for token in range(shape.vocab_size)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": word(0)},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def word(token: int) -> str:
    """How a token is written."""
    return f"t{token}"


def text_of(tokens: Iterable[int]) -> str:
    return " ".join(map(word, tokens))


def tokens_of(text: str) -> tuple[int, ...]:
    """The tokens of a text that a server made, however it puts spaces."""
    return tuple(map(int, _WORD.findall(text)))
