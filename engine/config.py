"""The configuration of a model (from its Hugging Face folder) and of an engine. Knows files, but no torch.

Everything unsupported is refused here, at start, by name and with a list of what is supported, so that the model code
has no branch that guesses. Both spellings of config.json are read: that of transformers 5 (`rope_parameters`, `dtype`)
and the older one (`rope_theta` and `rope_scaling`, `torch_dtype`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import model_digest, read_json
from engine.errors import UnsupportedModel
from engine.rope_config import RopeConfig
from kvstore.blocks import KVLayout

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "swish")  # two names of one function
LAYER_TYPES = ("full_attention", "sliding_attention")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # tokens, one for each layer; None: full attention
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the checkpoint
    digest: str  # identifies config and weights; the same on every machine that has the same files

    @classmethod
    def from_pretrained(cls, folder: Path) -> ModelConfig:
        """Reads config.json, generation_config.json and the weight files' headers. Raises `UnsupportedModel`."""
        raw = read_json(folder / "config.json")
        family = _family(raw)
        _refuse_options(raw)
        hidden_size, num_heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
        num_layers = _positive(raw, "num_hidden_layers")
        max_position_embeddings = _positive(raw, "max_position_embeddings")
        attention_bias = family.reads_attention_bias and bool(raw.get("attention_bias", False))
        config = cls(
            architecture=raw["architectures"][0],
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_positive(raw, "num_key_value_heads", num_heads),
            head_dim=_positive(raw, "head_dim", family.default_head_dim or hidden_size // num_heads),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=max_position_embeddings,
            rope=RopeConfig.from_json(raw, max_position_embeddings),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family.reads_mlp_bias and bool(raw.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            sliding_windows=family.windows(raw, num_layers),
            eos_token_ids=_eos_token_ids(folder, raw),
            dtype=_dtype(str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")),
            digest=model_digest(folder),
        )
        config._check_heads()
        return config

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim must be even for rotary embeddings, got {self.head_dim}")


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. Zero means: determine it automatically."""

    dtype: str = "auto"  # "auto": float32 on a CPU, the checkpoint's elsewhere
    device: str = "cpu"
    block_size: int = 16  # tokens
    num_blocks: int = 0  # 0: as many as fit into kv_cache_bytes
    kv_cache_bytes: int = 256 * 1024 * 1024
    max_model_len: int = 0  # tokens of prompt and output; 0: the model's, capped to what the pool can hold
    max_num_batched_tokens: int = 512  # token budget of one step
    max_num_requests: int = 64  # in one step; more decodes take turns
    enable_prefix_caching: bool = True
    num_threads: int = 0  # 0: torch's default
    kv_layer_pieces: int = 1  # a block is cut into so many pieces by layers, to suit the stages of all nodes
    kv_head_pieces: int = 1  # and into so many by heads, no more than KV heads, to suit their tensor-parallel ranks


def kv_layout(model: ModelConfig, engine: EngineConfig) -> KVLayout:
    """The layout of the blocks, or of their pieces, with dtype "auto" resolved; `model` is the whole model.

    Raises `UnsupportedModel` for an unknown dtype.
    """
    dtype = engine.dtype
    if dtype == "auto":
        # In half precision the last bit of a logit depends on how a prompt was cut into chunks, and one token in a few
        # hundred depends on that bit. Few CPUs are faster in it, so the same text on every path is worth more there.
        dtype = "float32" if engine.device == "cpu" else model.dtype
    return KVLayout(
        model=model.digest,
        dtype=_dtype(dtype),
        block_size=engine.block_size,
        num_layers=model.num_layers // engine.kv_layer_pieces,
        num_kv_heads=model.num_kv_heads // engine.kv_head_pieces,
        head_dim=model.head_dim,
        num_pieces=engine.kv_layer_pieces * engine.kv_head_pieces,
    )


# --- how the families differ ---


def _full_attention(raw: Json, num_layers: int) -> tuple[int | None, ...]:
    _refuse_layer_types(raw, "full_attention")
    return (None,) * num_layers


def _mistral_windows(raw: Json, num_layers: int) -> tuple[int | None, ...]:
    """One window for all layers; a folder without it was saved with transformers' default."""
    window = _window(raw)
    _refuse_layer_types(raw, "full_attention" if window is None else "sliding_attention")
    return (window,) * num_layers


def _qwen_windows(raw: Json, num_layers: int) -> tuple[int | None, ...]:
    window = _window(raw) if raw.get("use_sliding_window", False) else None
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28) if window is not None else num_layers
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if len(types) != num_layers:
        raise UnsupportedModel(f"layer_types names {len(types)} layers, num_hidden_layers is {num_layers}")
    if window is None:
        _refuse_layer_types(raw, "full_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _window(raw: Json) -> int | None:
    return None if raw.get("sliding_window", 4096) is None else _positive(raw, "sliding_window", 4096)


def _refuse_layer_types(raw: Json, supported: str) -> None:
    for kind in raw.get("layer_types") or ():
        if kind != supported:
            raise UnsupportedModel(
                f"layer_types {kind!r} is not supported for {raw['architectures'][0]} with sliding_window="
                f"{raw.get('sliding_window')!r} and use_sliding_window={raw.get('use_sliding_window')!r}; "
                f"supported: {supported}"
            )


@dataclass(frozen=True)
class _Family:
    windows: Callable[[Json, int], tuple[int | None, ...]]
    qkv_bias: bool = False
    qk_norm: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    default_head_dim: int = 0  # if config.json has none; 0: hidden_size / num_attention_heads


FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(_full_attention, reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": _Family(_mistral_windows),
    "Qwen2ForCausalLM": _Family(_qwen_windows, qkv_bias=True),
    "Qwen3ForCausalLM": _Family(_qwen_windows, qk_norm=True, reads_attention_bias=True, default_head_dim=128),
}


# --- reading config.json ---


def _family(raw: Json) -> _Family:
    names = raw.get("architectures") or [f"(none; model_type {raw.get('model_type')!r})"]
    if names[0] not in FAMILIES:
        raise UnsupportedModel(f"architecture {names[0]} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[names[0]]


def _refuse_options(raw: Json) -> None:
    """Refuses options that change the result and are not implemented."""
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            method = raw[key].get("quant_method", "unnamed method")
            raise UnsupportedModel(f"{key} ({method}) is not supported; supported: weights in {', '.join(DTYPES)}")
    activation = raw.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    for kind in raw.get("layer_types") or ():
        if kind not in LAYER_TYPES:
            raise UnsupportedModel(f"layer_types {kind!r} is not supported; supported: {', '.join(LAYER_TYPES)}")


def _positive(raw: Json, key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def _eos_token_ids(folder: Path, raw: Json) -> tuple[int, ...]:
    """generation_config.json, if present, has more end tokens than config.json, such as a chat model's end of turn."""
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    eos = raw.get("eos_token_id") if eos is None else eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype {dtype!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    return dtype
