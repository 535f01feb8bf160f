"""config.json as people have it: what is read, what is refused and how, and the digest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.config import FAMILIES, EngineConfig, ModelConfig, kv_layout
from engine.errors import UnsupportedModel
from engine.rope_config import RopeConfig

Json = dict[str, Any]

# As published, without the keys that nobody reads.
LLAMA_31_8B: Json = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_7B: Json = {
    "architectures": ["MistralForCausalLM"],
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN2_05B: Json = {
    "architectures": ["Qwen2ForCausalLM"],
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B: Json = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(folder: Path, raw: Json, generation: Json | None = None) -> ModelConfig:
    """Of a folder with this config.json and a checkpoint of one tensor: nobody asks yet whether it fits."""
    (folder / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file({"model.norm.weight": torch.arange(64.0)}, folder / "model.safetensors")
    return ModelConfig.from_pretrained(folder)


def test_llama_31(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA_31_8B)
    assert (config.head_dim, config.num_kv_heads, config.num_layers) == (128, 8, 32)
    assert config.rope == RopeConfig("llama3", 500_000.0, 8192, 8.0, 1.0, 4.0)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.dtype == "bfloat16"
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm or config.tie_word_embeddings)
    assert config.sliding_windows == (None,) * 32


def test_mistral(tmp_path: Path) -> None:
    assert read(tmp_path, MISTRAL_7B).sliding_windows == (4096,) * 32
    assert read(tmp_path, MISTRAL_7B | {"sliding_window": None}).sliding_windows == (None,) * 32
    assert read(tmp_path, MISTRAL_7B | {"head_dim": 96}).head_dim == 96
    assert read(tmp_path, MISTRAL_7B | {"head_dim": None}).head_dim == 128


def test_qwen2(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN2_05B)
    assert (config.head_dim, config.qkv_bias, config.o_bias, config.tie_word_embeddings) == (64, True, False, True)
    assert config.sliding_windows == (None,) * 24
    windowed = read(tmp_path, QWEN2_05B | {"use_sliding_window": True})
    assert windowed.sliding_windows == (None,) * 21 + (32768,) * 3
    types = ["full_attention", "sliding_attention"] * 12
    alternating = read(tmp_path, QWEN2_05B | {"use_sliding_window": True, "layer_types": types})
    assert alternating.sliding_windows == (None, 32768) * 12


def test_qwen3(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN3_06B)
    assert (config.head_dim, config.qk_norm, config.qkv_bias, config.o_bias) == (128, True, False, False)
    assert config.rope == RopeConfig("default", 1e6, 40960)
    biased = read(tmp_path, QWEN3_06B | {"attention_bias": True})
    assert biased.qkv_bias and biased.o_bias
    without = {key: value for key, value in QWEN3_06B.items() if key != "head_dim"}
    assert read(tmp_path, without).head_dim == 128


def test_the_spelling_of_transformers_5(tmp_path: Path) -> None:
    raw = dict(LLAMA_31_8B)
    raw["rope_parameters"] = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    raw["dtype"] = raw.pop("torch_dtype")
    new, old = read(tmp_path, raw), read(tmp_path, LLAMA_31_8B)
    assert {**vars(new), "digest": ""} == {**vars(old), "digest": ""}


def test_ends_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN2_05B).eos_token_ids == (151645,)
    assert read(tmp_path, QWEN2_05B, {"eos_token_id": [151645, 151643]}).eos_token_ids == (151645, 151643)
    assert read(tmp_path, QWEN2_05B, {"temperature": 0.7}).eos_token_ids == (151645,)
    assert read(tmp_path, QWEN2_05B | {"eos_token_id": None}, {}).eos_token_ids == ()
    assert read(tmp_path, QWEN2_05B, {"eos_token_id": 0}).eos_token_ids == (0,)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", *FAMILIES]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", *FAMILIES]),
        ({"architectures": None}, ["llama", *FAMILIES]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq", "bfloat16"]),
        ({"compression_config": {"format": "x"}}, ["compression_config"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["float8_e4m3fn", "float32", "bfloat16", "float16"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic", "default", "linear", "llama3", "yarn"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["longrope", "yarn"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3", "high_freq_factor", "low_freq_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_scaling": None}, ["full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"layer_types": ["linear_attention"] * 32}, ["linear_attention", "full_attention", "sliding_attention"]),
        ({"layer_types": ["sliding_attention"] * 32}, ["sliding_attention", "LlamaForCausalLM", "full_attention"]),
        ({"num_key_value_heads": 7}, ["num_key_value_heads", "7", "32"]),
        ({"head_dim": 33}, ["head_dim", "33"]),
        ({"vocab_size": None}, ["vocab_size"]),
        ({"num_hidden_layers": "32"}, ["num_hidden_layers", "'32'"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings"]),
    ],
)
def test_what_is_refused_is_named_with_what_is_supported(tmp_path: Path, change: Json, names: list[str]) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        read(tmp_path, LLAMA_31_8B | change)
    assert [name for name in names if name not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("raw", "change", "name"),
    [
        (MISTRAL_7B, {"sliding_window": 0}, "sliding_window"),
        (MISTRAL_7B, {"layer_types": ["full_attention", "sliding_attention"] * 16}, "layer_types"),
        (QWEN2_05B, {"layer_types": ["sliding_attention"] * 24}, "use_sliding_window=False"),
        (QWEN3_06B, {"layer_types": ["full_attention"] * 27}, "27"),
    ],
)
def test_windows_that_make_no_sense_are_refused(tmp_path: Path, raw: Json, change: Json, name: str) -> None:
    with pytest.raises(UnsupportedModel, match=name):
        read(tmp_path, raw | change)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\udcff"])
def test_a_folder_without_a_config(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        ModelConfig.from_pretrained(tmp_path)


# --- digest ---


def test_the_digest_is_of_the_files_alone(tmp_path: Path) -> None:
    """Not of the folder's name, nor of what else lies in it, nor of the process."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    digest = read(here, LLAMA_31_8B).digest
    shutil.copytree(here, there)
    (there / "README.md").write_text("a copy")
    (there / "consolidated.safetensors").write_bytes(b"the same weights in another format")
    code = "import sys, pathlib, engine.checkpoint as c; print(c.model_digest(pathlib.Path(sys.argv[1])))"
    other = subprocess.run([sys.executable, "-c", code, there], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest


@pytest.mark.parametrize("position", [0, 50_000, 99_999])
def test_other_config_shape_or_numbers_give_another_digest(tmp_path: Path, position: int) -> None:
    digests = {read(tmp_path, LLAMA_31_8B).digest, read(tmp_path, LLAMA_31_8B | {"rope_theta": 1.0}).digest}
    for name, shape in (("a", (100_000,)), ("b", (100_000,)), ("a", (1000, 100))):
        tensor = torch.zeros(shape)
        save_file({name: tensor}, tmp_path / "model.safetensors")
        digests.add(ModelConfig.from_pretrained(tmp_path).digest)
        tensor.view(-1)[position] = 1.0
        save_file({name: tensor}, tmp_path / "model.safetensors")
        digests.add(ModelConfig.from_pretrained(tmp_path).digest)
    assert len(digests) == 8


# --- layout ---


def test_layout(tmp_path: Path) -> None:
    model = read(tmp_path, LLAMA_31_8B)
    layout = kv_layout(model, EngineConfig(dtype="bfloat16", block_size=32))
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_size) == (32, 8, 128, 32)
    assert layout.model == model.digest
    assert layout.block_bytes == 32 * 2 * 32 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("asked", "device", "got"),
    [("auto", "cpu", "float32"), ("auto", "cuda", "bfloat16"), ("float16", "cpu", "float16")],
)
def test_layout_dtype(tmp_path: Path, asked: str, device: str, got: str) -> None:
    assert kv_layout(read(tmp_path, LLAMA_31_8B), EngineConfig(dtype=asked, device=device)).dtype == got


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"int4.*float32, bfloat16, float16"):
        kv_layout(read(tmp_path, LLAMA_31_8B), EngineConfig(dtype="int4"))


def test_reading_a_config_needs_no_torch() -> None:
    """The command line reads it before any node starts, and should not wait for torch."""
    code = "import sys, engine.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
