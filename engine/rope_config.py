"""The rotary embedding that config.json asks for, in either spelling. Knows no torch; `engine.rope` computes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import UnsupportedModel

logger = logging.getLogger(__name__)

Json = Mapping[str, Any]

# What each type reads besides `theta`. transformers warns of other keys and ignores them; so do we.
KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
NAMED_ELSEWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
DEFAULT_THETA = 10_000.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding as in transformers' `modeling_rope_utils`. Fields of other types are unused."""

    rope_type: str = "default"
    theta: float = DEFAULT_THETA
    original_max_position_embeddings: int = 0  # llama3, yarn: the original context length, tokens
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None  # None: follows from factor and the mscales
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    @classmethod
    def from_json(cls, raw: Json, max_position_embeddings: int) -> RopeConfig:
        """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`. Raises `UnsupportedModel`."""
        given: Json = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        rope_type = given.get("rope_type") or given.get("type") or "default"
        _check(raw, given, rope_type)
        options = {key: given[key] for key in KEYS[rope_type] if given.get(key) is not None}
        # A model's own field wins over the one in `rope_parameters` (transformers' exception for Phi3 and others).
        original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        original = original or max_position_embeddings
        if rope_type == "yarn":
            options.setdefault("factor", max_position_embeddings / original)
        theta = given.get("rope_theta") or raw.get("rope_theta") or DEFAULT_THETA
        return cls(rope_type, float(theta), original, **options)


def _check(raw: Json, given: Json, rope_type: str) -> None:
    if any(isinstance(value, Mapping) for value in given.values()):
        raise UnsupportedModel(f"rope_parameters for each layer type ({', '.join(given)}) are not supported")
    if rope_type not in KEYS:
        raise UnsupportedModel(f"rope type {rope_type!r} is not supported; supported: {', '.join(KEYS)}")
    partial = given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor {partial} is not supported; supported: 1.0")
    required = (
        set(KEYS[rope_type]) & {"factor", "low_freq_factor", "high_freq_factor"} if rope_type != "yarn" else set()
    )
    if missing := sorted(key for key in required if not given.get(key)):
        raise UnsupportedModel(f"rope type {rope_type!r} needs {', '.join(missing)} in rope_parameters")
    if unread := sorted(set(given) - NAMED_ELSEWHERE - set(KEYS[rope_type])):
        logger.warning("rope parameters not read rope_type=%s keys=%s", rope_type, ",".join(unread))
