"""How much memory a model takes on how many GPUs, and the size of its KV: computed from config.json only. Pure.

One rank is one GPU. A node of tensor-parallel width t and p pipeline stages has t x p ranks; a rank has its share of a
matrix and of KV heads (a head is replicated if there are fewer heads than ranks), and whole norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import FAMILIES
from engine.errors import UnsupportedModel

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGIT_BYTES = 4  # logits are float32
LIVE_ROWS = 4  # of the hidden size at a time: the residual, its norm, what comes out of a block, a reduction's copy


@dataclass(frozen=True)
class Shape:
    """The sizes in a model's config.json."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_tied: bool  # the output head is the embedding
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    max_positions: int = 0
    dtype: str = "bfloat16"

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Shape:
        """The sizes in a config.json. Raises `UnsupportedModel`, which names the key."""
        name = (raw.get("architectures") or ["none"])[0]
        if name not in FAMILIES:
            raise UnsupportedModel(f"architecture {name} is not supported; supported: {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        hidden, heads = _count(raw, "hidden_size"), _count(raw, "num_attention_heads")
        return cls(
            num_layers=_count(raw, "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=_count(raw, "intermediate_size"),
            vocab_size=_count(raw, "vocab_size"),
            num_heads=heads,
            num_kv_heads=_count(raw, "num_key_value_heads", heads),
            head_dim=_count(raw, "head_dim", family.default_head_dim or hidden // heads),
            is_tied=bool(raw.get("tie_word_embeddings", False)),
            has_qkv_bias=family.qkv_bias,
            has_qk_norm=family.qk_norm,
            max_positions=_count(raw, "max_position_embeddings"),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        )


@dataclass(frozen=True)
class Plan:
    """How a node runs the model. `max_model_len` 0 is the model's."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    dtype: str = "bfloat16"
    max_batched_tokens: int = 512
    max_requests: int = 64
    max_model_len: int = 0


@dataclass(frozen=True)
class Count:
    """Bytes on the fullest rank, unless a field says otherwise."""

    parameters: int  # of the whole model
    weight_bytes: int
    activation_bytes: int
    kv_bytes_a_token: int
    model_kv_bytes_a_token: int  # of all ranks' distinct KV: what goes to the store and over the network
    kv_bytes: int  # room for KV; 0 or less: it does not fit
    kv_tokens: int  # that a node holds at a time


def problem(shape: Shape, plan: Plan) -> str:
    """Why a model cannot be sharded this way; "" if it can."""
    width, stages = plan.tensor_parallel_size, plan.pipeline_parallel_size
    if width < 1 or stages < 1:
        return "--tensor-parallel-size and --pipeline-parallel-size must be 1 or more"
    if shape.num_heads % width or shape.intermediate_size % width:
        return f"--tensor-parallel-size {width} does not divide {shape.num_heads} heads and {shape.intermediate_size}"
    if shape.num_kv_heads % width and width % shape.num_kv_heads:
        return f"--tensor-parallel-size {width} neither divides {shape.num_kv_heads} KV heads nor is a multiple of them"
    if stages > shape.num_layers:
        return f"--pipeline-parallel-size {stages} is more than {shape.num_layers} layers"
    return ""


def count(shape: Shape, plan: Plan, gpu_bytes: int, reserve_bytes: int) -> Count:
    """What one rank holds in `gpu_bytes`, of which `reserve_bytes` are for the device: context, graphs, NCCL."""
    item = ITEM_BYTES[plan.dtype]
    weights = _rank_parameters(shape, plan) * item
    activations = _activation_bytes(shape, plan, item)
    room = gpu_bytes - reserve_bytes - weights - activations
    layers = -(-shape.num_layers // plan.pipeline_parallel_size)
    a_token = layers * 2 * _kv_heads(shape, plan) * shape.head_dim * item
    return Count(
        parameters=_layer_parameters(shape, 1) * shape.num_layers + _ends(shape, 1) + shape.hidden_size,
        weight_bytes=weights,
        activation_bytes=activations,
        kv_bytes_a_token=a_token,
        model_kv_bytes_a_token=shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * item,
        kv_bytes=room,
        kv_tokens=max(0, room) // a_token,
    )


def _rank_parameters(shape: Shape, plan: Plan) -> int:
    """Parameters of a rank of the fullest stage: the one with the embedding or the head, or both if there is one."""
    width, stages = plan.tensor_parallel_size, plan.pipeline_parallel_size
    layers = _layer_parameters(shape, width) * -(-shape.num_layers // stages)
    ends = _ends(shape, width) if stages == 1 else shape.hidden_size * -(-shape.vocab_size // width)
    return layers + ends + shape.hidden_size


def _layer_parameters(shape: Shape, width: int) -> int:
    heads, kv_heads = shape.num_heads // width, max(1, shape.num_kv_heads // width)
    qkv = (heads + 2 * kv_heads) * shape.head_dim
    attention = shape.hidden_size * (qkv + heads * shape.head_dim) + (qkv if shape.has_qkv_bias else 0)
    norms = 2 * shape.hidden_size + (2 * shape.head_dim if shape.has_qk_norm else 0)
    return attention + 3 * shape.hidden_size * (shape.intermediate_size // width) + norms


def _ends(shape: Shape, width: int) -> int:
    """Parameters of embedding and head."""
    return shape.hidden_size * -(-shape.vocab_size // width) * (1 if shape.is_tied else 2)


def _kv_heads(shape: Shape, plan: Plan) -> int:
    return max(1, shape.num_kv_heads // plan.tensor_parallel_size)


def _activation_bytes(shape: Shape, plan: Plan, item: int) -> int:
    """At the widest point of a step: rows of one layer, queries, keys and values, both halves of the MLP, logits."""
    width = plan.tensor_parallel_size
    row = LIVE_ROWS * shape.hidden_size
    row += (2 * shape.num_heads // width + 2 * _kv_heads(shape, plan)) * shape.head_dim  # queries and their answers
    row += 3 * shape.intermediate_size // width  # gate, up, and their product
    logits = plan.max_requests * shape.vocab_size * LOGIT_BYTES  # gathered from all ranks
    return plan.max_batched_tokens * row * item + 2 * logits


def _count(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"config.json: {key} must be a positive integer, got {value!r}")
    return value
