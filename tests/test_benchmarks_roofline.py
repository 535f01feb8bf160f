"""The arithmetic of the roofline, against the published sizes of the models and against sums written out."""

from __future__ import annotations

import pytest

from benchmarks.engine_shapes import SHAPES, Shape
from benchmarks.roofline import Machine, Work, decode, head_weights, kv_token_bytes, layer_weights, prefill

TINY = Shape("tiny", "llama", 10, 8, 16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
TINY_LAYERS = 2 * ((2 + 1 + 1 + 2) * 4 * 8 + 3 * 8 * 16)


@pytest.mark.parametrize(("name", "parameters"), [("135m", 134.5e6), ("0.5b", 494.0e6)])
def test_the_shapes_have_the_sizes_that_are_published(name: str, parameters: float) -> None:
    assert layer_weights(SHAPES[name]) + head_weights(SHAPES[name]) == pytest.approx(parameters, rel=1e-3)


def test_kv_of_a_token() -> None:
    assert kv_token_bytes(SHAPES["135m"]) == 30 * 2 * 3 * 64 * 2


def test_a_prompt_sees_itself_causally() -> None:
    attention = sum(2 * 2 * 2 * 2 * 4 * (position + 1) for position in range(5))  # 2 layers, 2 products, 2 heads of 4
    assert prefill(TINY, 1, 5).flops == 2 * 5 * TINY_LAYERS + 2 * 10 * 8 + attention
    assert prefill(TINY, 3, 5).flops == 3 * prefill(TINY, 1, 5).flops


def test_a_decode_step_reads_the_weights_once_and_all_kv() -> None:
    assert decode(TINY, 3, 7).read_bytes == 2 * (TINY_LAYERS + 10 * 8) + 3 * 7 * kv_token_bytes(TINY)
    assert decode(TINY, 3, 7).flops == 3 * (2 * (TINY_LAYERS + 10 * 8) + 2 * 2 * 2 * 2 * 4 * 7)


def test_the_longer_of_the_two_counts() -> None:
    machine = Machine(read_bytes_per_s=10.0, flops_per_s=100.0)
    assert (machine.seconds(Work(20.0, 100.0)), machine.bound(Work(20.0, 100.0))) == (2.0, "memory")
    assert (machine.seconds(Work(20.0, 300.0)), machine.bound(Work(20.0, 300.0))) == (3.0, "FLOPs")
