"""A model behind graphs gives the model's own logits and tokens. On a CPU a graph is its function, called again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import engine_driver
import engine_models
import pytest
import torch
from engine_driver import GREEDY, MODELS, assert_all_free, drive, make_engine, make_model, make_prompt, make_request
from engine_models import Pair, batch_of, make_pair, tokens_of
from test_engine_cuda_attention import FakeWrapper
from torch import Tensor

from engine.attention import ForwardBatch
from engine.cuda_attention import Backend, table_kernels
from engine.cuda_graphs import GraphedModel, GraphRecorder, on_device
from engine.device_batch import BatchShape, decode_shapes, pack, unpack
from engine.kv_cache import KVCache
from engine.model import Transformer
from engine.request import SamplingParams
from engine.weights import load_model
from kvstore.blocks import KVLayout

BLOCK = engine_driver.BLOCK
PROMPTS = {f"r{length}": make_prompt(length) for length in (1, 3, BLOCK, BLOCK + 1, 30, 41)}
KINDS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=1.1, top_p=0.9, repetition_penalty=1.1, logprobs=2, seed=4, max_tokens=12),
}


class Recorder:
    """Counts what is recorded, and records it where that can be done."""

    def __init__(self, device: str) -> None:
        self.num_recorded = 0
        self._record = GraphRecorder(torch.device("cuda:0")) if device == "cuda" else None

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1
        return compute if self._record is None else self._record(compute)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("budget", [7, 64])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_tokens_are_those_without_graphs(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, name: str, budget: int
) -> None:
    make_model(name, tmp_path)

    def tokens(device: str) -> list[list[int]]:
        engine = make_engine(tmp_path, device=device, max_num_batched_tokens=budget)
        requests = [
            make_request(engine, f"{kind} {length}", prompt, params)
            for kind, params in KINDS.items()
            for length, prompt in PROMPTS.items()
        ]
        run = drive(engine, requests)
        assert_all_free(engine)
        return [run.ids(request.request_id) for request in requests]

    expected = tokens("cpu")
    recorder = Recorder(device)
    monkeypatch.setattr("engine.engine.fastest", lambda model: model)
    monkeypatch.setattr("engine.engine.on_device", lambda model, cache: GraphedModel(model, cache, "padded", recorder))
    assert tokens(device) == expected
    assert recorder.num_recorded >= 3


# --- step by step ---


@pytest.fixture(scope="module", params=["Llama", "Mistral"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    options = {"Llama": {}, "Mistral": {"sliding_window": 9}}[request.param]
    return make_pair(tmp_path_factory.mktemp(request.param), request.param, options)


STEPS = [  # (sequence, start, end) of each span
    [(0, 0, 17), (1, 0, 1), (2, 0, 40), (3, 0, 9), (4, 0, 5)],
    [(0, 17, 18), (1, 1, 2), (2, 40, 41), (3, 9, 10), (4, 5, 6)],  # bucket 8
    [(0, 18, 19), (2, 41, 42)],  # bucket 2
    [(0, 19, 20), (1, 2, 4), (2, 42, 43), (3, 10, 14)],  # no decode step
    [(0, 20, 21), (1, 4, 5), (2, 43, 44)],  # bucket 4
    [(0, 21, 22), (1, 5, 6), (2, 44, 45), (3, 14, 15), (4, 6, 7)],  # bucket 8 again
]


def batches() -> list[ForwardBatch]:
    tables = torch.randperm(20, generator=torch.Generator().manual_seed(2)).view(5, 4)
    return [batch_of([(tokens_of(end, row), start, end, tables[row]) for row, start, end in step]) for step in STEPS]


def make_cache(pair: Pair, device: str) -> KVCache:
    config = pair.config
    layout = KVLayout("m", "float32", engine_models.BLOCK, config.num_layers, config.num_kv_heads, config.head_dim)
    return KVCache(layout, engine_models.NUM_BLOCKS, torch.device(device))


@pytest.mark.parametrize("backend", ["padded", "flashinfer"])
def test_logits_and_blocks_are_those_without_graphs(
    pair: Pair, device: str, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    if backend == "flashinfer":
        if device != "cpu":
            pytest.skip("a stand-in for FlashInfer that runs on the host")
        fake = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=FakeWrapper)
        monkeypatch.setitem(sys.modules, "flashinfer", fake)
    plain, cache = make_cache(pair, "cpu"), make_cache(pair, device)
    recorder = Recorder(device)
    model = load_model(pair.folder, pair.config, torch.float32, torch.device(device))
    graphed = GraphedModel(model, cache, backend, recorder)
    for batch in batches():
        logits = graphed(batch, cache.tensor)
        torch.testing.assert_close(logits.cpu(), pair.model(batch, plain.tensor), atol=1e-4, rtol=0)
        blocks = slice(plain.spare_block)
        torch.testing.assert_close(cache.tensor[blocks].cpu(), plain.tensor[blocks], atol=1e-4, rtol=0)
    assert recorder.num_recorded == 3
    assert cache.tensor[cache.spare_block].any() and not plain.tensor[plain.spare_block].any()


def test_warm_up_captures_all_that_steps_need_and_touches_no_block(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama", tmp_path)
    recorder = Recorder(device)
    monkeypatch.setattr("engine.engine.fastest", lambda model: model)
    monkeypatch.setattr("engine.engine.on_device", lambda model, cache: GraphedModel(model, cache, "padded", recorder))
    engine = make_engine(tmp_path, device=device, max_num_requests=5, enable_prefix_caching=False)
    told: list[tuple[int, int]] = []
    engine.warm_up(lambda done, total: told.append((done, total)))
    num_graphs = recorder.num_recorded
    assert told[-1] == (num_graphs + 2, num_graphs + 2), "a throw-away request, and a measurement"
    requests = [make_request(engine, name, prompt, GREEDY) for name, prompt in PROMPTS.items()]
    drive(engine, requests)
    assert_all_free(engine)
    assert recorder.num_recorded == num_graphs


def test_buckets_cover_what_an_engine_can_ask_for() -> None:
    shapes = decode_shapes(max_sequences=5, max_context_len=1000, block_size=16)
    assert {shape.num_sequences for shape in shapes} == {1, 2, 4, 8}
    assert {shape.width for shape in shapes} == {16, 32, 64}
    assert {shape.num_sequences for shape in decode_shapes(4, 16, 16)} == {1, 2, 4}
    assert max(shape.num_sequences for shape in decode_shapes(1000, 16, 16)) == 256


def test_logits_of_the_wanted_rows_alone(pair: Pair, device: str) -> None:
    cache = make_cache(pair, device)
    model = load_model(pair.folder, pair.config, torch.float32, torch.device(device))
    graphed = GraphedModel(model, cache, "padded", Recorder(device))
    prompts, decodes, *_ = batches()
    graphed(prompts, cache.tensor)
    every = graphed(decodes, cache.tensor).clone()
    for rows in ([4], [], [0, 2, 3]):
        wanted = replace(decodes, logits_indices=torch.tensor(rows, dtype=torch.int64))
        assert torch.equal(graphed(wanted, cache.tensor), every[rows])


@pytest.mark.parametrize("backend", ["varlen", "padded"])
@pytest.mark.parametrize("step", [0, 1])
def test_a_step_stays_on_its_device(pair: Pair, backend: Backend, step: int) -> None:
    """On a device that has shapes and no numbers: a tensor of the host in the middle of a step would be refused."""
    batch, block_size = batches()[step], engine_models.BLOCK
    shape = BatchShape.of(batch, block_size)
    moved, tables = unpack(pack(batch, shape, block_size).to("meta"), shape, batch.spans, block_size)
    kernels = table_kernels(backend, tables, pair.config.sliding_windows, block_size)
    assert bool(kernels) == (backend == "varlen" or step == 1)
    model = Transformer(pair.config).to("meta", torch.bfloat16)
    cache = make_cache(pair, "cpu").tensor.to("meta", torch.bfloat16)
    logits = model(replace(moved, kernels=kernels), cache)
    assert logits.shape == (shape.num_logits, engine_models.VOCAB) and logits.device.type == "meta"


def test_a_model_on_a_cpu_is_called_as_it_is(pair: Pair) -> None:
    assert on_device(pair.model, make_cache(pair, "cpu")) is pair.model
