"""Checkpoints: sharded and single, tied, old leftovers; and what is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_models import Pair, logits_in_chunks, make_pair, tokens_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import UnsupportedModel
from engine.weights import load_model

Tensors = dict[str, Tensor]


def load(folder: Path) -> Tensor:
    """Loads the folder and gives logits of some tokens."""
    model = load_model(folder, ModelConfig.from_pretrained(folder), torch.float32, torch.device("cpu"))
    return logits_in_chunks(model, tokens_of(20), [20], torch.float32)


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def llama(tmp_path: Path) -> Pair:
    return make_pair(tmp_path, "Llama", {})


def test_sharded_equals_single(tmp_path: Path, llama: Pair) -> None:
    expected = load(llama.folder)
    pair = make_pair(tmp_path / "sharded", "Llama", {}, max_shard_size="60KB")
    assert len(list(pair.folder.glob("model-*.safetensors"))) > 2
    assert not (pair.folder / "model.safetensors").exists()
    assert torch.equal(load(pair.folder), expected)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "Llama", {}, max_shard_size="60KB")
    shard = sorted(pair.folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UnsupportedModel, match=shard.name):
        ModelConfig.from_pretrained(pair.folder)


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "Qwen2", {"tie_word_embeddings": True})
    assert pair.model.lm_head.weight is pair.model.embed_tokens.weight
    expected = load(pair.folder)
    # Some checkpoints hold the tied head all the same.
    rewrite(pair.folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(97, 64)}))
    assert torch.equal(load(pair.folder), expected)


def test_derived_tensors_of_old_checkpoints_are_passed_over(llama: Pair) -> None:
    expected = load(llama.folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(llama.folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert torch.equal(load(llama.folder), expected)


def _without_head(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]


def _extra_bias(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)


def _wrong_shape(tensors: Tensors) -> None:
    tensors["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(48, 64)


def _heads_exchanged(tensors: Tensors) -> None:
    """As many rows in all, but not in each."""
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 64)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(64, 64)


def _integers(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_head, ("lacks", "LlamaForCausalLM", "lm_head.weight")),
        (_extra_bias, ("does not ask for", "model.layers.1.self_attn.q_proj.bias")),
        (_wrong_shape, ("model.layers.2.self_attn.k_proj.weight", r"\(32, 64\)", r"\(48, 64\)")),
        (_heads_exchanged, ("model.layers.0.self_attn.q_proj.weight", r"\(64, 64\)", r"\(32, 64\)")),
        (_integers, ("model.norm.weight", "I8", "BF16")),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    llama: Pair, change: Callable[[Tensors], None], words: tuple[str, ...]
) -> None:
    rewrite(llama.folder, change)
    with pytest.raises(UnsupportedModel, match=".*".join(words)):
        load(llama.folder)


@pytest.mark.parametrize("length", [0, 4, 100, 50_000])
def test_a_file_that_is_cut_off(llama: Pair, length: int) -> None:
    path = llama.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UnsupportedModel, match="cut off"):
        ModelConfig.from_pretrained(llama.folder)


def test_only_safetensors(llama: Pair) -> None:
    (llama.folder / "model.safetensors").rename(llama.folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors"):
        ModelConfig.from_pretrained(llama.folder)


def test_old_spelling_of_the_config_gives_the_same_model(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
    pair = make_pair(tmp_path, "Llama", {"rope_parameters": rope})
    expected = load(pair.folder)
    path = pair.folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["rope_parameters"]
    raw["torch_dtype"] = raw.pop("dtype")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {**rope, "type": rope.pop("rope_type")}
    del raw["rope_scaling"]["rope_type"]
    path.write_text(json.dumps(raw))
    assert torch.equal(load(pair.folder), expected)
