"""The hash chain: golden vectors, the same in every process, and a root that names all that makes KV differ."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import PROBE, BlockHash, KVLayout, hash_blocks, salted

LAYOUT = KVLayout("llama@0123", "bfloat16", block_size=4, num_layers=2, num_kv_heads=2, head_dim=8)

GOLDEN_ROOT = "bd9121738d12e58a44fca7fa792ddb01"
GOLDEN_CHAIN = [
    "0cffc8084dc37c015e14892105bebd43",
    "46511d778b1d8fb945be33636cfff1ea",
    "deb3152d79d9d5d18552665b730f774d",
]
GOLDEN_SALTED = "498004c3a7957163f7294a0511718d27"
GOLDEN_PROBE = "79406edffff90fae87c8bdae804927c7"
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 2**31, 0, 258, 65536, 9]

SCRIPT = """
from kvstore.blocks import PROBE, KVLayout, hash_blocks
layout = KVLayout("llama@0123", "bfloat16", block_size=4, num_layers=2, num_kv_heads=2, head_dim=8)
print(PROBE, layout.root().hex(), *(h.hex() for h in hash_blocks(layout.root(), %r, 4)))
"""


def test_golden_vectors() -> None:
    assert LAYOUT.root().hex() == GOLDEN_ROOT
    assert [block_hash.hex() for block_hash in hash_blocks(LAYOUT.root(), TOKENS, 4)] == GOLDEN_CHAIN
    assert salted(LAYOUT.root(), b"tenant").hex() == GOLDEN_SALTED
    assert PROBE == GOLDEN_PROBE, "a change of the scheme: raise LAYOUT_VERSION if the bytes mean something else too"


def test_chain_is_what_the_design_says() -> None:
    tokens = b"".join(token.to_bytes(4, "little") for token in TOKENS[:4])
    assert hash_blocks(LAYOUT.root(), TOKENS, 4)[0] == hashlib.sha256(LAYOUT.root() + tokens).digest()[:16]


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_same_in_every_process(seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", SCRIPT % TOKENS]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.split() == [GOLDEN_PROBE, GOLDEN_ROOT, *GOLDEN_CHAIN]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 7), st.data())
def test_chain_goes_on_where_it_was_left(tokens: list[int], block_size: int, data: st.DataObject) -> None:
    whole = hash_blocks(LAYOUT.root(), tokens, block_size)
    assert len(whole) == len(tokens) // block_size
    cut = data.draw(st.integers(0, len(whole)))
    head, tail = tokens[: cut * block_size], tokens[cut * block_size :]
    first = hash_blocks(LAYOUT.root(), head, block_size)
    assert first + hash_blocks(first[-1] if first else LAYOUT.root(), tail, block_size) == whole


def test_prefix_alone_decides() -> None:
    chain = hash_blocks(LAYOUT.root(), TOKENS, 4)
    other = hash_blocks(LAYOUT.root(), [0, *TOKENS[1:]], 4)
    assert not set(chain) & set(other)


CHANGES = [
    {"model": "llama@0124"},
    {"dtype": "float16"},
    {"block_size": 8},
    {"num_layers": 3},
    {"num_kv_heads": 1},
    {"head_dim": 16},
    {"num_pieces": 2},
    {"adapter": "lora"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_root_names_all_that_makes_kv_differ(change: dict[str, object]) -> None:
    assert replace(LAYOUT, **change).root() != LAYOUT.root()


def test_salt_separates_tenants() -> None:
    root = LAYOUT.root()
    assert salted(root, b"") == root
    assert len({root, salted(root, b"a"), salted(root, b"b"), BlockHash(bytes(16))}) == 4


def test_block_bytes() -> None:
    assert LAYOUT.block_bytes == 2 * 2 * 4 * 2 * 8 * 2
    assert replace(LAYOUT, dtype="float32").block_bytes == 2 * LAYOUT.block_bytes
