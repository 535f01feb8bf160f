"""Prompts: their lengths, their vocabulary, what they share, and that a seed repeats them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.prompts import PrefixShape, random_prompts, shared_prefix_prompts

seeds = st.integers(0, 2**64 - 1)


@given(num=st.integers(0, 8), length=st.integers(1, 64), vocab=st.integers(1, 300), seed=seeds)
def test_random_prompts(num: int, length: int, vocab: int, seed: int) -> None:
    prompts = random_prompts(num, length, vocab, random.Random(seed))
    assert [len(prompt) for prompt in prompts] == [length] * num
    assert all(0 <= token < vocab for prompt in prompts for token in prompt)
    assert prompts == random_prompts(num, length, vocab, random.Random(seed))


@given(
    num=st.integers(0, 20),
    prefix_len=st.integers(1, 20),
    tail_len=st.integers(1, 20),
    num_prefixes=st.integers(1, 6),
    seed=seeds,
)
def test_shared_prefixes_are_used_equally_often(
    num: int, prefix_len: int, tail_len: int, num_prefixes: int, seed: int
) -> None:
    def make() -> list[tuple[int, ...]]:
        shape = PrefixShape(prefix_len, num_prefixes)
        return shared_prefix_prompts(num, prefix_len + tail_len, shape, 2**20, random.Random(seed))

    prompts = make()
    assert prompts == make()
    assert [len(prompt) for prompt in prompts] == [prefix_len + tail_len] * num
    uses = Counter(prompt[:prefix_len] for prompt in prompts)
    if prefix_len > 4:  # shorter ones may be equal by chance
        assert len(uses) == min(num, num_prefixes)
        assert not uses or max(uses.values()) - min(uses.values()) <= 1


def test_random_prompts_share_no_block() -> None:
    prompts = random_prompts(200, 64, 258, random.Random(0))
    assert len({prompt[:16] for prompt in prompts}) == 200


def test_prefixes_come_mixed() -> None:
    """A server that sees each prefix in one run of requests has an easier time than one that sees them mixed."""
    prompts = shared_prefix_prompts(40, 32, PrefixShape(16, 4), 258, random.Random(0))
    order = [prompt[:16] for prompt in prompts]
    assert order != sorted(order)
    assert order != [order[i % 4] for i in range(40)]


@pytest.mark.parametrize("prefix_len", [0, 16, 17])
def test_the_prefix_is_shorter_than_the_prompt(prefix_len: int) -> None:
    with pytest.raises(ValueError, match="1 to 15"):
        shared_prefix_prompts(4, 16, PrefixShape(prefix_len, 2), 258, random.Random(0))


def test_empty_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        random_prompts(1, 0, 258, random.Random(0))
    with pytest.raises(ValueError, match="num_prefixes"):
        shared_prefix_prompts(1, 16, PrefixShape(8, 0), 258, random.Random(0))
