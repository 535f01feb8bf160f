"""What a model is (from its Hugging Face folder) and how an engine is to run it. Knows files, but no torch.

Everything that is not supported is refused here, at start, by name and with the list of what is supported, so that
the model code behind it has no "else" that guesses. Both spellings of config.json are read: transformers 5
(`rope_parameters`, `dtype`) and older ones (`rope_theta` + `rope_scaling`, `torch_dtype`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UnsupportedModel
from kvstore.blocks import KVLayout

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "swish")  # two names of one function
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_KEYS = {
    "default": {"partial_rotary_factor"},
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"},
}
SAMPLE_BYTES = 4096  # of a tensor's start, middle and end, for the digest

Json = Mapping[str, Any]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, as in transformers' `modeling_rope_utils`. Fields of other rope types are unused."""

    rope_type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # llama3, yarn: tokens that the model was first trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn, from here on; None: follows from factor and the mscales
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


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
    digest: str  # names config and weights; the same on every machine that has the same files

    @classmethod
    def from_pretrained(cls, folder: Path) -> ModelConfig:
        """Reads `config.json`, `generation_config.json` and the weights' headers. Raises `UnsupportedModel`."""
        raw = _read_json(folder / "config.json")
        architecture = _architecture(raw)
        _refuse_options(raw)
        family = FAMILIES[architecture]
        hidden_size, num_heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
        num_layers = _positive(raw, "num_hidden_layers")
        attention_bias = bool(raw.get("attention_bias", False)) and family.reads_attention_bias
        config = cls(
            architecture=architecture,
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_positive(raw, "num_key_value_heads", num_heads),
            head_dim=_positive(raw, "head_dim", family.head_dim or hidden_size // num_heads),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=_positive(raw, "max_position_embeddings"),
            rope=_rope(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)) and family.reads_mlp_bias,
            qk_norm=family.qk_norm,
            sliding_windows=family.windows(raw, num_layers),
            eos_token_ids=_eos_token_ids(folder, raw),
            dtype=_dtype(raw),
            digest=model_digest(folder),
        )
        config._check_shapes()
        return config

    def _check_shapes(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim must be even for rotary embeddings, got {self.head_dim}")


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. Zero means "work it out"."""

    dtype: str = "auto"  # "auto": the checkpoint's
    device: str = "cpu"
    block_size: int = 16  # tokens
    num_blocks: int = 0  # 0: as many as fit into kv_cache_bytes
    kv_cache_bytes: int = 256 * 1024 * 1024
    max_model_len: int = 0  # 0: the model's, capped to what the pool can hold
    max_num_batched_tokens: int = 512
    max_num_requests: int = 64
    enable_prefix_caching: bool = True
    num_threads: int = 0  # 0: torch's default


def kv_layout(model: ModelConfig, engine: EngineConfig) -> KVLayout:
    """The meaning of this engine's blocks; resolves dtype "auto". Raises `UnsupportedModel` for an unknown dtype."""
    dtype = model.dtype if engine.dtype == "auto" else engine.dtype
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype {dtype!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    return KVLayout(
        model=model.digest,
        dtype=dtype,
        block_size=engine.block_size,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
    )


def model_digest(folder: Path) -> str:
    """Hex SHA-256 of config.json and, for each safetensors file, its size, its header and samples of each tensor.

    Cheap (reads some kilobytes for each tensor), yet any retraining, merge or conversion changes it.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise UnsupportedModel(f"{path} is not a safetensors file")
            header = file.read(length)
            digest.update(f"\0{path.name}\0{size}\0".encode() + header)
            for name, entry in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = (8 + length + offset for offset in entry["data_offsets"])
                    for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
                        file.seek(offset)
                        digest.update(file.read(min(SAMPLE_BYTES, end - offset)))
    return digest.hexdigest()


# --- what the four families differ in ---


@dataclass(frozen=True)
class _Family:
    windows: Callable[[Json, int], tuple[int | None, ...]]
    qkv_bias: bool = False
    qk_norm: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    head_dim: int = 0  # where config.json has none; 0: hidden_size / num_heads


def _full_attention(raw: Json, num_layers: int) -> tuple[int | None, ...]:
    return (None,) * num_layers


def _mistral_windows(raw: Json, num_layers: int) -> tuple[int | None, ...]:
    return (raw.get("sliding_window", 4096),) * num_layers


def _qwen_windows(raw: Json, num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    first = int(raw.get("max_window_layers", 28))
    default = [LAYER_TYPES[window is not None and layer >= first] for layer in range(num_layers)]
    types = raw.get("layer_types") or default
    if len(types) != num_layers:
        raise UnsupportedModel(f"layer_types names {len(types)} layers, num_hidden_layers is {num_layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(_full_attention, reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": _Family(_mistral_windows),
    "Qwen2ForCausalLM": _Family(_qwen_windows, qkv_bias=True),
    "Qwen3ForCausalLM": _Family(_qwen_windows, qk_norm=True, reads_attention_bias=True, head_dim=128),
}


# --- reading config.json ---


def _read_json(path: Path) -> Json:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModel(f"{path.parent} is not a Hugging Face model folder: it has no {path.name}") from None
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UnsupportedModel(f"{path} is not a JSON object")
    return raw


def _architecture(raw: Json) -> str:
    names = raw.get("architectures") or [f"model_type {raw.get('model_type')!r} without architectures"]
    if names[0] not in FAMILIES:
        raise UnsupportedModel(f"architecture {names[0]} is not supported; supported: {', '.join(FAMILIES)}")
    return str(names[0])


def _refuse_options(raw: Json) -> None:
    """Options that would change the result and are not built."""
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "?")
        raise UnsupportedModel(f"quantization_config ({method}) is not supported; supported: {', '.join(DTYPES)}")
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


def _rope(raw: Json) -> RopeConfig:
    given = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope_type = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModel(f"rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    theta = given.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0
    if given.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0 != 1.0:
        raise UnsupportedModel("partial_rotary_factor is not supported; supported: 1.0")
    return RopeConfig(rope_type=rope_type, theta=float(theta), **given)


def _eos_token_ids(folder: Path, raw: Json) -> tuple[int, ...]:
    """generation_config.json knows more ends than config.json (a chat model's end of turn), where there is one."""
    path = folder / "generation_config.json"
    eos = _read_json(path).get("eos_token_id") if path.exists() else None
    eos = raw.get("eos_token_id") if eos is None else eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _dtype(raw: Json) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    return dtype
