"""Large answers as JSON: in pieces, and the same text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import http_json
from router.http_json import encode, encode_large
from router.http_requests import MAX_CHOICES

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=30
)


@given(VALUES)
def test_pieces_are_the_same_text(value: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_json, "PIECE_ITEMS", 3)
        assert encode_large(value) == encode(value)
    assert encode_large(value) == encode(value)


def test_no_piece_is_long() -> None:
    """However many choices there are, and whatever is told of each token."""
    entry = {str(token): {"logprob": -0.125, "rank": 1, "decoded_token": "x"} for token in range(21)}
    lists = {"tokens": ["x"] * 300, "top_logprobs": [dict.fromkeys(entry, -1.0)] * 300}
    choice = {"index": 0, "text": "x" * 300, "logprobs": lists, "prompt_logprobs": [None, *[entry] * 300]}
    spoken = {"index": 0, "message": {"content": "x"}, "logprobs": {"content": [entry] * 300}}
    value = {"id": "x", "choices": [choice, spoken] * 2, "prompt_logprobs": [None, *[entry] * 300]}
    size = len(encode(entry))
    assert max(map(len, http_json._pieces(value, 0))) <= (size + 1) * http_json.PIECE_ITEMS
    assert encode_large(value) == encode(value)
    assert MAX_CHOICES <= http_json.PIECE_ITEMS, "choices are not taken for tokens"
