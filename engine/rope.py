"""Rotary position embeddings: `default`, `linear`, `llama3` and `yarn`, as transformers' `modeling_rope_utils`.

Knows positions and head dimensions; knows neither batches nor models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians per token, float32 `[head_dim / 2]` on the CPU, and the scale factor of cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        return frequencies / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, frequencies, head_dim), _yarn_attention_factor(rope)
    return frequencies, 1.0


def rotation(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cos and sin for `rotate`, each `[N, 1, head_dim]` in `dtype`, for positions int64 `[N]`.

    The first half of sin is negated: `rotate` then needs no negation of its own.
    """
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), -1).to(dtype)[:, None], torch.cat((-sin, sin), -1).to(dtype)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each head of `[N, heads, head_dim]` by its token's angles; pairs are `(i, i + head_dim / 2)`."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Divides low frequencies by `factor`, keeps high ones, and interpolates smoothly in between."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context length
    smooth = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """Like `_llama3`, but interpolating linearly in the dimension (https://arxiv.org/abs/2309.00071, 3.2)."""

    def dimension(turns: float) -> float:
        context = rope.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return frequencies / rope.factor * slowed + frequencies * (1 - slowed)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
