"""The compiled step against plain torch and transformers, and its promise: results hang on the request alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import BLOCK, Pair, batch_of, empty_cache, logits_in_chunks, make_pair, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine import native, native_model
from engine.config import ModelConfig
from engine.native import packed
from engine.native_model import NativeTransformer, can_run, fastest
from engine.rope_config import RopeConfig
from engine.weights import load_model

ISAS = [isa for isa in range(len(native.ISA_NAMES)) if isa <= native.isa()]
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not ISAS, reason="this installation has no compiled kernels")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama all kv heads": ("Llama", {"num_key_value_heads": 4}),
    "llama sizes of half panels": ("Llama", {"hidden_size": 80, "intermediate_size": 112, "head_dim": 16}),
    "llama, vocabulary of whole panels": ("Llama", {"vocab_size": 128, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2 tied, two windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@pytest.fixture(params=ISAS, ids=[native.ISA_NAMES[isa] for isa in ISAS])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(native_model, "isa", lambda: request.param)
    return int(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def native_of(pair: Pair, dtype: torch.dtype = torch.float32) -> NativeTransformer:
    model = fastest(load_model(pair.folder, pair.config, dtype, CPU))
    assert isinstance(model, NativeTransformer)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path: Path, isa: int, case: str) -> None:
    pair = make_pair(tmp_path, *CASES[case])
    model = native_of(pair)
    tokens = tokens_of(3 * BLOCK + BLOCK // 2)
    expected = pair.reference(tokens[None]).logits[0]
    for sizes in ([len(tokens)], [7, 1, 20], [1]):
        actual = logits_in_chunks(model, tokens, sizes, torch.float32)
        assert (actual - expected).abs().max() <= 1e-4, sizes


@pytest.mark.parametrize("case", ["llama", "llama biases", "qwen3"])
def test_bfloat16_is_as_near_to_the_truth_as_torch(tmp_path: Path, isa: int, case: str) -> None:
    name, options = CASES[case]
    pair = make_pair(tmp_path, name, options | {"head_dim": 32})
    plain, model = load_model(pair.folder, pair.config, torch.bfloat16, CPU), native_of(pair, torch.bfloat16)
    exact = pair.model
    for parameter, rounded in zip(exact.parameters(), plain.parameters(), strict=True):
        parameter.copy_(rounded)  # the same weights
    tokens = tokens_of(50)
    truth = logits_in_chunks(exact, tokens, [50], torch.float32)
    errors = [
        (logits_in_chunks(which, tokens, [20, 1], torch.bfloat16) - truth).square().mean().sqrt()
        for which in (plain, model)
    ]
    assert errors[1] <= 1.2 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_do_not_depend_on_neighbours_chunks_or_threads(tmp_path: Path, isa: int, dtype: torch.dtype) -> None:
    """Bit for bit: tiles of rows, of keys and runs of panels are cut so that no sum changes its order."""
    pair = make_pair(tmp_path, "Llama", {"head_dim": 32})
    model = native_of(pair, dtype)
    tables = torch.arange(24).view(4, 6)
    prompts = [tokens_of(length, seed) for seed, length in enumerate((40, 65, 3, 22))]

    def run(parts: list[tuple[Tensor, int, int, Tensor]]) -> list[Tensor]:
        steps = model(batch_of(parts), empty_cache(pair.config, dtype))
        return list(steps.split([end - start for _, start, end, _ in parts]))

    torch.set_num_threads(2)
    together = run([(tokens, 0, len(tokens), table) for tokens, table in zip(prompts, tables, strict=True)])
    torch.set_num_threads(1)
    for tokens, table, expected in zip(prompts, tables, together, strict=True):
        assert torch.equal(run([(tokens, 0, len(tokens), table)])[0], expected)
        if len(tokens) % 20 != 1:  # a chunk of one token is a decode step, which sums over keys in another order
            assert torch.equal(logits_in_chunks(model, tokens, [20], dtype), expected)


@pytest.mark.parametrize("isa", ISAS, ids=[native.ISA_NAMES[isa] for isa in ISAS])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=4),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 64, 80]),
    sizes=st.tuples(st.sampled_from([16, 48, 96]), st.sampled_from([16, 80, 112])),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm")}),
)
def test_equals_torch(isa, seed, lengths, group, head_dim, sizes, options) -> None:
    """Random shapes and batches, in float32."""
    config = random_config(group, head_dim, sizes, options)
    torch.manual_seed(seed)
    model = native_model.Transformer(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    tokens = [torch.randint(0, config.vocab_size, (chunk + prior,)) for chunk, prior in lengths]
    tables = torch.randperm(24)[: 6 * len(tokens)].split(6)
    steps = [
        [(t, 0, prior, table) for t, table, (_, prior) in zip(tokens, tables, lengths, strict=False) if prior],
        [(t, prior, len(t), table) for t, table, (_, prior) in zip(tokens, tables, lengths, strict=False)],
    ]
    caches = [empty_cache(config), empty_cache(config)]
    batches = [batch_of(parts) for parts in steps if parts]
    expected = [model(batch, caches[0]) for batch in batches]
    compiled = NativeTransformer(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_model, "isa", lambda: isa)
        actual = [compiled(batch, caches[1]) for batch in batches]
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    torch.testing.assert_close(caches[1], caches[0], rtol=1e-4, atol=1e-4, equal_nan=True)


def random_config(group: int, head_dim: int, sizes: tuple[int, int], options: dict[str, bool]) -> ModelConfig:
    plain = dict(architecture="LlamaForCausalLM", vocab_size=77, num_layers=2, num_kv_heads=2, rms_norm_eps=1e-5)
    plain |= dict(max_position_embeddings=128, rope=RopeConfig.from_json({}, 128), tie_word_embeddings=False, digest="")
    plain |= dict(sliding_windows=(None, 20), eos_token_ids=(), dtype="float32")
    shape = dict(hidden_size=sizes[0], intermediate_size=sizes[1], num_heads=2 * group, head_dim=head_dim)
    return ModelConfig(**(plain | shape | options))  # type: ignore[arg-type]


def test_what_it_cannot_do_is_left_to_torch(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "Llama", {"head_dim": 24})
    model = load_model(pair.folder, pair.config, torch.float32, CPU)
    assert fastest(model) is model
    assert not can_run(pair.config, torch.float16, CPU)


@pytest.mark.parametrize("isa", ISAS, ids=[native.ISA_NAMES[isa] for isa in ISAS])
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 80),
    inputs=st.sampled_from([2, 16, 32, 64, 80, 96, 576]),
    outputs=st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_a_linear_layer_equals_torch(isa, rows, inputs, outputs, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, inputs, generator=generator).to(dtype) for n in (rows, outputs))
    result = native.linear(x, packed(weight), outputs, isa)
    torch.testing.assert_close(result.double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-4)
    one = native.linear(x[-1:], packed(weight), outputs, isa)
    assert torch.equal(one, result[-1:]), "a row's sums depend on its neighbours"


def test_packed_weights_are_all_there() -> None:
    weight = torch.randn(40, 6)
    panels = packed(weight).view(torch.float32)  # [2, 6, 32]
    assert torch.equal(panels.transpose(1, 2).reshape(64, 6)[:40], weight)
    assert not panels.transpose(1, 2).reshape(64, 6)[40:].any()
    halves = packed(weight.bfloat16()).view(torch.bfloat16).view(2, 3, 32, 2)
    assert torch.equal(halves.permute(0, 2, 1, 3).reshape(64, 6)[:40], weight.bfloat16())


def test_a_model_whose_weights_were_taken_keeps_no_copy(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "Llama", {})
    model = load_model(pair.folder, pair.config, torch.float32, CPU)
    NativeTransformer(model)
    assert all(module.weight.numel() == 0 for module in model.modules() if isinstance(module, nn.Linear))
