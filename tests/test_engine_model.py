"""Logits against transformers: each architecture and rope type, whole and in chunks, through a shuffled paged cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_models import (
    BLOCK,
    NUM_BLOCKS,
    VOCAB,
    Pair,
    batch_of,
    empty_cache,
    logits_in_chunks,
    make_pair,
    make_reference,
    tokens_of,
)

from engine.attention import ForwardBatch, attend, plan_attention
from engine.config import ModelConfig
from engine.weights import load_model

LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + BLOCK // 2)

# Short first contexts and small bases: within 56 tokens every branch of the scalings is felt.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 50.0},
    "linear": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 9},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("Llama", {"head_dim": 24}),
    "llama one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama all kv heads": ("Llama", {"num_key_value_heads": 4}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral no window": ("Mistral", {"sliding_window": None}),
    "mistral window 1": ("Mistral", {"sliding_window": 1}),
    "mistral window of a block": ("Mistral", {"sliding_window": BLOCK}),
    "mistral window never full": ("Mistral", {"sliding_window": 57}),
    "qwen2 max_window_layers": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2 layer_types": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 17}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3 biases, windows": (
        "Qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "yarn attention_factor": ("Llama", {"rope_parameters": ROPES["yarn"] | {"attention_factor": 0.7}}),
    "yarn mscale": ("Llama", {"rope_parameters": ROPES["yarn"] | {"mscale": 1.0, "mscale_all_dim": 0.6}}),
    "yarn betas": ("Llama", {"rope_parameters": ROPES["yarn"] | {"beta_fast": 8, "beta_slow": 2, "truncate": False}}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterable[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("llama"), "Llama", {})


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("mistral"), "Mistral", {"sliding_window": 9})


def check_parity(pair: Pair) -> None:
    for length in LENGTHS:
        tokens = tokens_of(length)
        expected = pair.reference(tokens[None]).logits[0]
        for sizes in ([length], [BLOCK], [7, 1, 20], [1]):
            actual = logits_in_chunks(pair.model, tokens, sizes, torch.float32)
            assert (actual - expected).abs().max() <= 1e-4, (length, sizes)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers(tmp_path: Path, name: str, rope: str) -> None:
    check_parity(make_pair(tmp_path, name, ARCHITECTURES[name] | {"rope_parameters": ROPES[rope]}))


@pytest.mark.parametrize("case", OPTIONS)
def test_logits_equal_transformers_with_options(tmp_path: Path, case: str) -> None:
    check_parity(make_pair(tmp_path, *OPTIONS[case]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Plain torch, as where no compiler was at hand and on other devices: there attention gathers blocks."""
    monkeypatch.setattr("engine.attention.can_attend", lambda *shape: False)
    check_parity(make_pair(tmp_path, name, ARCHITECTURES[name]))


def test_the_cases_differ_from_each_other(tmp_path: Path) -> None:
    """Or else the tests above would show nothing of the scalings and windows."""
    tokens = tokens_of(LENGTHS[-1])[None]
    cases = [("Llama", {"rope_parameters": rope}) for rope in ROPES.values()]
    cases += [case for case in OPTIONS.values() if case[0] == "Mistral"]
    cases += [case for name, case in OPTIONS.items() if name.startswith("yarn")]
    last = [make_reference(*case)(tokens).logits[0, -1] for case in cases]
    for one, other in itertools.combinations(range(len(cases)), 2):
        if {repr(cases[one][1].get("sliding_window")), repr(cases[other][1].get("sliding_window"))} == {"None", "57"}:
            continue  # a window that is never full is no window
        assert (last[one] - last[other]).abs().max() > 1e-2, (cases[one], cases[other])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """Stored and run in half precision, next to transformers in the same; rounding differs by the way of summing."""
    make_reference("Qwen3", ARCHITECTURES["Qwen3"]).to(dtype).save_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    config = ModelConfig.from_pretrained(tmp_path)
    assert config.dtype == str(dtype).removeprefix("torch.")
    model = load_model(tmp_path, config, dtype, torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    tokens = tokens_of(LENGTHS[-1])
    expected = reference(tokens[None]).logits[0].detach().float()
    for sizes in ([len(tokens)], [7, 1, 20]):
        actual = logits_in_chunks(model, tokens, sizes, dtype)
        assert actual.dtype == torch.float32
        assert (actual - expected).abs().max() < 0.03 * expected.abs().max()


def test_stored_in_half_precision_run_in_float32(tmp_path: Path) -> None:
    make_reference("Llama", {}).to(torch.bfloat16).save_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load_model(tmp_path, ModelConfig.from_pretrained(tmp_path), torch.float32, torch.device("cpu"))
    tokens = tokens_of(20)
    expected = reference(tokens[None]).logits[0].detach()
    torch.testing.assert_close(logits_in_chunks(model, tokens, [20], torch.float32), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pair_name", ["llama", "mistral"])
def test_a_mixed_batch_gives_what_each_gives_alone(request: pytest.FixtureRequest, pair_name: str) -> None:
    """A decode step, a first chunk, a later chunk, a whole prompt and one of a single token, side by side."""
    pair: Pair = request.getfixturevalue(pair_name)
    cache = empty_cache(pair.config)
    tables = torch.randperm(NUM_BLOCKS)[:20].view(5, 4)
    plan = [(40, 39), (30, 0), (56, 25), (17, 0), (1, 0)]  # (end, start)
    sequences = [tokens_of(end, seed) for seed, (end, _) in enumerate(plan)]
    for tokens, (_, start), table in zip(sequences, plan, tables, strict=True):
        if start:
            pair.model(batch_of([(tokens, 0, start, table)]), cache)
    parts = [(t, start, end, table) for t, (end, start), table in zip(sequences, plan, tables, strict=True)]
    actual = pair.model(batch_of(parts), cache).split([end - start for end, start in plan])
    for logits, tokens, (_, start) in zip(actual, sequences, plan, strict=True):
        expected = pair.reference(tokens[None]).logits[0, start:]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_of_a_row_does_not_depend_on_its_neighbours(window: int | None) -> None:
    torch.manual_seed(0)
    cache = torch.randn(NUM_BLOCKS, 1, 2, BLOCK, 2, 16)
    tables = torch.randperm(NUM_BLOCKS)[:16].view(4, 4)
    tokens = torch.zeros(64, dtype=torch.int64)
    parts = [(tokens, 33, 34, tables[0]), (tokens, 10, 30, tables[1]), (tokens, 0, 50, tables[2])]
    batch = batch_of([*parts, (tokens, 0, 1, tables[3])])
    q, k, v = torch.randn(72, 4, 16), torch.randn(72, 2, 16), torch.randn(72, 2, 16)
    together = attend(q, k, v, cache.clone()[:, 0], plan_attention(batch, cache, window))
    for part, span in zip(parts, batch.spans, strict=False):
        rows = slice(span.query_start, span.query_start + span.query_len)
        plan = plan_attention(batch_of([part]), cache, window)
        alone = attend(q[rows], k[rows], v[rows], cache.clone()[:, 0], plan)
        assert torch.equal(together[rows], alone)


def test_a_step_writes_its_own_slots_alone(llama: Pair) -> None:
    cache = empty_cache(llama.config)
    table = torch.tensor([5, 2, 11])
    llama.model(batch_of([(tokens_of(40), 0, 20, table)]), cache)
    written = ~cache.isnan().any(dim=-1).any(dim=-1)  # [block, layer, k/v, slot]
    assert written[5].all() and written[2, :, :, :4].all()
    assert int(written.sum()) == 20 * llama.config.num_layers * 2


def test_logits_of_the_wanted_rows_alone(llama: Pair) -> None:
    tokens, table = tokens_of(20), torch.arange(NUM_BLOCKS)
    batch = batch_of([(tokens, 0, 20, table)])
    every = llama.model(batch, empty_cache(llama.config))
    for rows in ([19], [], [0, 7, 19]):
        wanted = torch.tensor(rows, dtype=torch.int64)
        some = ForwardBatch(batch.token_ids, batch.positions, batch.slot_mapping, batch.spans, wanted)
        logits = llama.model(some, empty_cache(llama.config))
        assert logits.shape == (len(rows), VOCAB) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, every[wanted], atol=1e-5, rtol=0)
