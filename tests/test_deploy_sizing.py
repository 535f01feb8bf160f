"""Memory counted from config.json: against weights that are there, known parameters, and the page with both."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import POCKET, REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from deploy.cli import main
from deploy.sizing import Plan, Shape, count, problem
from engine.checkpoint import stored_tensors
from engine.config import EngineConfig, ModelConfig, kv_layout
from engine.errors import UnsupportedModel

GIB = 2**30
PAGE = (REPOSITORY / "docs" / "deploy.md").read_text()


def config(
    name: str, layers: int, hidden: int, mlp: int, vocab: int, heads: int, kv: int, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": [f"{name}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    } | more


MODELS = {  # name: config.json, parameters as their makers count them
    "Llama-3.1-8B": (config("Llama", 32, 4096, 14336, 128256, 32, 8), 8_030_261_248),
    "Llama-3.3-70B": (config("Llama", 80, 8192, 28672, 128256, 64, 8), 70_553_706_496),
    "Mistral-7B-v0.1": (config("Mistral", 32, 4096, 14336, 32000, 32, 8), 7_241_732_096),
    "Qwen2.5-7B": (config("Qwen2", 28, 3584, 18944, 152064, 28, 4), 7_615_616_512),
    "Qwen3-32B": (config("Qwen3", 64, 5120, 25600, 151936, 64, 8, head_dim=128), 32_762_123_264),
}
TABLE = [  # model, GPU's name and GiB, GPUs a node, steps of so many tokens, requests
    ("Llama-3.1-8B", "24 GB", 22, 1, 2048, 64),
    ("Llama-3.1-8B", "80 GB", 79, 1, 8192, 256),
    ("Qwen3-32B", "80 GB", 79, 1, 4096, 128),
    ("Qwen3-32B", "80 GB", 79, 2, 8192, 256),
    ("Llama-3.3-70B", "80 GB", 79, 2, 4096, 64),
    ("Llama-3.3-70B", "80 GB", 79, 4, 8192, 256),
    ("Llama-3.3-70B", "80 GB", 79, 8, 8192, 256),
    ("Llama-3.3-70B", "141 GB", 139, 2, 8192, 256),
]


def row(name: str, gpu: str, gib: int, width: int, tokens: int, requests: int) -> str:
    """A line of the page's table."""
    plan = Plan(tensor_parallel_size=width, max_batched_tokens=tokens, max_requests=requests)
    found = count(Shape.from_json(MODELS[name][0]), plan, gib * GIB, 3 * GIB)
    sizes = " | ".join(f"{size / GIB:.1f}" for size in (found.weight_bytes, found.activation_bytes, found.kv_bytes))
    flags = f"`--tensor-parallel-size {width} --max-batched-tokens {tokens} --max-requests {requests}"
    flags += f" --kv-memory {found.kv_bytes // GIB}G`"
    return f"| {name} | {width} x {gpu} | {sizes} | {found.kv_tokens:,} | {flags} |"


def test_parameters_are_those_of_the_makers() -> None:
    for name, (raw, parameters) in MODELS.items():
        assert count(Shape.from_json(raw), Plan(), 80 * GIB, 0).parameters == parameters, name


def test_weights_and_kv_are_those_of_a_model_that_is_there() -> None:
    raw = json.loads((POCKET / "config.json").read_text())
    found = count(Shape.from_json(raw), Plan(), GIB, 0)
    assert found.parameters == sum(math.prod(tensor.shape) for tensor in stored_tensors(POCKET).values())
    layout = kv_layout(ModelConfig.from_pretrained(POCKET), EngineConfig(dtype="bfloat16"))
    assert found.kv_bytes_a_token == layout.block_bytes // layout.block_size


@given(st.sampled_from(sorted(MODELS)), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4]))
def test_shares_cover_the_model(name: str, width: int, stages: int) -> None:
    shape = Shape.from_json(MODELS[name][0])
    plan = Plan(tensor_parallel_size=width, pipeline_parallel_size=stages)
    if problem(shape, plan):
        return
    found = count(shape, plan, 80 * GIB, 3 * GIB)
    assert found.weight_bytes * width * stages >= 2 * found.parameters, "no weight is left out"
    assert found.kv_bytes_a_token * width * stages >= found.model_kv_bytes_a_token
    assert found.weight_bytes + found.activation_bytes + found.kv_bytes + 3 * GIB == 80 * GIB
    if width <= shape.num_kv_heads and shape.num_layers % stages == 0:
        assert found.kv_bytes_a_token * width * stages == found.model_kv_bytes_a_token, "and no KV held twice"


def test_what_cannot_be_cut() -> None:
    shape = Shape.from_json(MODELS["Qwen2.5-7B"][0])
    assert "28 heads" in problem(shape, Plan(tensor_parallel_size=8))
    assert "28 layers" in problem(shape, Plan(pipeline_parallel_size=29))
    assert "KV heads" in problem(dataclasses.replace(shape, num_kv_heads=3), Plan(tensor_parallel_size=2))
    assert problem(shape, Plan(tensor_parallel_size=0)) and not problem(shape, Plan(tensor_parallel_size=4))
    with pytest.raises(UnsupportedModel, match="hidden_size must be a positive integer, got '4096'"):
        Shape.from_json(MODELS["Llama-3.1-8B"][0] | {"hidden_size": "4096"})
    with pytest.raises(UnsupportedModel, match="Gpt9ForCausalLM is not supported"):
        Shape.from_json({"architectures": ["Gpt9ForCausalLM"]})


@pytest.mark.parametrize("line", TABLE, ids=lambda line: f"{line[0]}-{line[3]}x{line[2]}")
def test_the_page_s_table_is_what_is_counted(line: tuple[str, str, int, int, int, int]) -> None:
    assert row(*line) in PAGE, row(*line)


def test_the_page_s_bytes_a_token_are_what_is_counted() -> None:
    for name, (raw, _) in MODELS.items():
        a_token = count(Shape.from_json(raw), Plan(), 80 * GIB, 0).model_kv_bytes_a_token
        wanted = f"| {name} | {a_token:,} | {a_token * 10_000 / 1e9:.2f} | {a_token * 80_000 / 1e9:.1f} |"
        assert wanted in PAGE, wanted


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MODELS["Llama-3.3-70B"][0]))
    argv = ["size", str(file), "--gpu-memory", "79G", "--tensor-parallel-size", "8", "--max-model-len", "32768"]
    assert main([*argv, "--prefill-tokens-per-s", "10000"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("70.55 billion parameters in bfloat16, a node of 8 GPUs") and "--kv-memory" in out
    assert "10,000 prompt tokens/s are 3.28 GB/s of KV (26.2 Gbit/s): 327,680 bytes a token" in out
    assert "--store-memory 184G in all prefill machines together keeps 60 s" in out
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensor_parallel_size"] == 8
    for option, wrong in (("--prefill-tokens-per-s", "nan"), ("--arena-seconds", "-1")):
        assert main([*argv, option, wrong]) == 1
        assert capsys.readouterr().err == f"baton: error: {option} must be 0 or more, got {wrong}\n"
    assert main(["size", str(file), "--gpu-memory", "79G"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main(["size", str(POCKET), "--gpu-memory", "8G"]) == 0
    assert main(["size", str(tmp_path / "none"), "--gpu-memory", "8G"]) == 1
    assert main([*argv[:4], "--tensor-parallel-size", "3"]) == 1
    assert "does not divide 64 heads" in capsys.readouterr().err
