"""Rotary frequencies of models that people run, against transformers' own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.rope import inverse_frequencies, rotate, rotation
from engine.rope_config import RopeConfig

LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama 3.1": (131_072, {"rope_theta": 5e5, **LLAMA_31, "original_max_position_embeddings": 8192}),
    "Llama 3.2": (131_072, {"rope_theta": 5e5, **LLAMA_31, "factor": 32.0, "original_max_position_embeddings": 8192}),
    "Llama 3.1, no original": (8192, {"rope_theta": 5e5, **LLAMA_31}),
    "Qwen2.5 long": (32_768, {"rope_theta": 1e6, "type": "yarn", "factor": 4.0}
                     | {"original_max_position_embeddings": 32_768}),
    "Qwen3 long": (40_960, {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}
                   | {"original_max_position_embeddings": 32_768}),
    "mscales": (163_840, {"rope_type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0}
                | {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}),
    "mscale alone": (16_384, {"rope_type": "yarn", "factor": 4.0, "mscale": 0.5}
                     | {"original_max_position_embeddings": 4096}),
    "attention_factor": (16_384, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3}
                         | {"original_max_position_embeddings": 4096}),
    "no truncation": (16_384, {"rope_type": "yarn", "factor": 4.0, "truncate": False}
                      | {"original_max_position_embeddings": 4096}),
    "shorter than at first": (4096, {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096}),
    "a ramp beyond the head": (16_384, {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0}
                               | {"original_max_position_embeddings": 4096}),
    "linear": (16_384, {"type": "linear", "factor": 2.5}),
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", MODELS)
def test_frequencies_equal_transformers(name: str, head_dim: int) -> None:
    max_positions, given = MODELS[name]
    rope = RopeConfig.from_json({"rope_parameters": given}, max_positions)
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        rope_parameters=dict(given),
    )
    expected, expected_scale = ROPE_INIT_FUNCTIONS[rope.rope_type](config)
    frequencies, scale = inverse_frequencies(rope, head_dim)
    torch.testing.assert_close(frequencies, expected, rtol=2e-6, atol=0)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


def test_old_and_new_spelling_are_one() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    new = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 1e6}
    old = RopeConfig.from_json({"rope_theta": 1e6, "rope_scaling": scaling}, 8192)
    assert old == RopeConfig.from_json({"rope_parameters": new}, 8192)
    assert old.theta == 1e6 and old.original_max_position_embeddings == 2048


def test_no_rope_parameters_at_all() -> None:
    for raw in ({}, {"rope_scaling": None}, {"rope_parameters": None}, {"rope_theta": 10_000}):
        assert RopeConfig.from_json(raw, 8192) == RopeConfig(original_max_position_embeddings=8192)


def test_yarn_factor_follows_from_the_contexts() -> None:
    given = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 2048}
    assert RopeConfig.from_json({"rope_parameters": given}, 8192).factor == 4.0


def test_keys_that_are_not_read_are_told(caplog: pytest.LogCaptureFixture) -> None:
    given = {"rope_type": "linear", "factor": 2.0, "finetuned": True}
    assert RopeConfig.from_json({"rope_scaling": given}, 8192).factor == 2.0
    assert "finetuned" in caplog.text


def test_rotation_keeps_lengths_and_relative_angles() -> None:
    """A score depends on the distance of two positions alone, which is what rotary embeddings are for."""
    torch.manual_seed(0)
    frequencies, scale = inverse_frequencies(RopeConfig(theta=100.0), 32)
    x, y = torch.randn(1, 1, 32).double(), torch.randn(1, 1, 32).double()

    def score(query: int, key: int) -> torch.Tensor:
        turned = [
            rotate(head, *rotation(torch.tensor([position]), frequencies, scale, torch.float64))
            for head, position in ((x, query), (y, key))
        ]
        torch.testing.assert_close(turned[0].norm(), x.norm(), rtol=1e-6, atol=0)
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-4, atol=1e-4)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3
