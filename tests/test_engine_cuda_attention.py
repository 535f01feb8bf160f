"""The kernels for GPUs. `padded` runs on any device. Of the others a CPU can test what they are asked for: stand-ins
that do what torch's and FlashInfer's documentation says must give SDPA's result."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_models import BLOCK, make_reference
from torch import Tensor

from engine import cuda_attention
from engine.attention import ForwardBatch, SequenceSpan, attend, plan_attention
from engine.config import ModelConfig
from engine.cuda_attention import Backend, FlashInferKernel, VarlenKernel, choose_backend, probe, table_kernels
from engine.device_batch import BatchShape, decode_shape, pack, pad_decode, unpack

NUM_BLOCKS = 40
WINDOWS = (None, 1, 5, BLOCK, 100)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """4 query heads, 2 KV heads."""
    folder = tmp_path_factory.mktemp("model")
    make_reference("Llama", {}).save_pretrained(folder)
    return replace(ModelConfig.from_pretrained(folder), sliding_windows=WINDOWS, num_layers=len(WINDOWS))


def make_batch(lens: Sequence[tuple[int, int]]) -> ForwardBatch:
    """On the host; of (queries, context) of each sequence, in scattered blocks."""
    free = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(1))
    spans: list[SequenceSpan] = []
    positions, slots = [], []
    for query_len, context in lens:
        count = -(-context // BLOCK)
        table, free = free[:count], free[count:]
        position = torch.arange(context - query_len, context)
        spans.append(SequenceSpan(sum(map(len, positions)), query_len, context, table))
        positions.append(position)
        slots.append(table[position // BLOCK] * BLOCK + position % BLOCK)
    rows = torch.cat(positions)
    return ForwardBatch(rows, rows, torch.cat(slots), tuple(spans), rows[:0])


class Step:
    """Random queries, keys and values for a batch, and a cache in which what was never written is not a number."""

    def __init__(self, config: ModelConfig, host: ForwardBatch, shape: BatchShape, device: str) -> None:
        torch.manual_seed(0)
        self.host = host
        self.batch, self.tables = unpack(pack(host, shape, BLOCK).to(device), shape, host.spans, BLOCK)
        self.q = torch.randn(len(host.token_ids), config.num_heads, config.head_dim).to(device)
        self.k, self.v = torch.randn(2, len(host.token_ids), config.num_kv_heads, config.head_dim).to(device)
        cache = torch.full((NUM_BLOCKS, 1, 2, BLOCK, config.num_kv_heads, config.head_dim), math.nan)
        for span in host.spans:
            for position in range(span.context_len):
                block = cache[span.block_table[position // BLOCK], 0]
                block[:, position % BLOCK] = torch.randn(block[:, 0].shape)
        self.cache = cache.to(device)

    def attend(self, window: int | None, **kernels: Any) -> Tensor:
        plan = plan_attention(replace(self.batch, kernels=kernels.get("kernels", {})), self.cache, window)
        return attend(self.q, self.k, self.v, self.cache[:, 0], plan)


def mixed_step(config: ModelConfig) -> Step:
    host = make_batch([(1, 40), (20, 30), (33, 33), (1, 1), (7, 2 * BLOCK), (1, 3 * BLOCK)])
    return Step(config, host, BatchShape.of(host, BLOCK), "cpu")


@pytest.mark.parametrize("window", WINDOWS)
def test_padded_decode_steps_equal_each_sequence_alone(config: ModelConfig, device: str, window: int | None) -> None:
    source = make_batch([(1, context) for context in (40, 1, BLOCK, 2 * BLOCK, 2 * BLOCK + 1)])
    shape = decode_shape(source, BLOCK)
    assert shape is not None
    step = Step(config, pad_decode(source, shape.num_sequences, NUM_BLOCKS - 1, BLOCK), shape, device)
    actual = step.attend(window, kernels=table_kernels("padded", step.tables, [window], BLOCK))
    torch.testing.assert_close(actual, step.attend(window), atol=1e-5, rtol=1e-5)


def test_padded_has_no_kernel_for_prompts(config: ModelConfig) -> None:
    assert table_kernels("padded", mixed_step(config).tables, WINDOWS, BLOCK) == {}


# --- stand-ins ---


def paged_reference(
    q: Tensor, pages: tuple[Tensor, Tensor], starts: Tensor, tables: list[Tensor], lens: Tensor, left: int
) -> Tensor:
    """Causal from the bottom right; `left` keys before a query's own, -1: all. `pages` are keys and values."""
    out = torch.empty_like(q)
    for row, (table, context) in enumerate(zip(tables, lens.tolist(), strict=True)):
        rows = slice(int(starts[row]), int(starts[row + 1]))
        count = -(-context // BLOCK)
        keys, values = (page[table[:count].long()].flatten(0, 1)[:context].double() for page in pages)
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        distance = torch.arange(context - rows.stop + rows.start, context)[:, None] - torch.arange(context)
        is_seen = (distance >= 0) & ((left < 0) | (distance <= left))
        scores = torch.einsum("qhd,shd->hqs", q[rows].double(), keys) / math.sqrt(q.shape[2])
        weights = scores.masked_fill(~is_seen, -math.inf).softmax(-1)
        out[rows] = torch.einsum("hqs,shd->qhd", weights, values).to(q.dtype)
    return out


@pytest.fixture
def flash() -> Iterator[list[dict[str, Any]]]:
    """The operator below `varlen_attn_out`, as FA3 has it; the arguments of each call."""
    calls: list[dict[str, Any]] = []

    def forward(out: Tensor, query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor | None,
                max_q: int, max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool,
                **options: Any) -> Tensor:  # fmt: skip
        left, right = options["window_size_left"], options["window_size_right"]
        used, table = options["seqused_k"], options["block_table"]
        assert cum_seq_k is None and right == 0 and is_causal == (left == -1) and dropout_p == 0.0
        assert {x.dtype for x in (cum_seq_q, used, table)} == {torch.int32} and table.stride(-1) == 1
        assert max_q == int((cum_seq_q[1:] - cum_seq_q[:-1]).max()) and max_k >= int(used.max())
        assert key.stride(-1) == value.stride(-1) == query.stride(-1) == 1
        out.copy_(paged_reference(query, (key, value), cum_seq_q, list(table), used, left))
        calls.append({"left": left})
        return query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("_flash_attention_forward_no_dropout_inplace", forward, "CPU")
    yield calls
    library._destroy()


@pytest.mark.parametrize("window", WINDOWS)
def test_varlen_is_asked_for_what_sdpa_gives(
    config: ModelConfig, flash: list[dict[str, Any]], window: int | None
) -> None:
    step = mixed_step(config)
    with torch.inference_mode():
        actual = step.attend(window, kernels={window: VarlenKernel(step.tables, window)})
    torch.testing.assert_close(actual, step.attend(window), atol=1e-5, rtol=1e-5)
    assert flash == [{"left": -1 if window is None else window - 1}]


class FakeWrapper:
    """FlashInfer's `BatchPrefillWithPagedKVCacheWrapper`; a graph's copies into the buffers that it was given."""

    def __init__(self, workspace: Tensor, kv_layout: str, use_cuda_graph: bool, **buffers: Tensor) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "NHD" and use_cuda_graph == bool(buffers)
        self._buffers = buffers

    def plan(self, starts: Tensor, page_starts: Tensor, pages: Tensor, last_page_lens: Tensor, num_heads: int,
             num_kv_heads: int, head_dim: int, page_size: int, *, causal: bool, window_left: int,
             q_data_type: torch.dtype) -> None:  # fmt: skip
        assert causal and page_size == BLOCK and (num_heads, num_kv_heads, head_dim) == (4, 2, 16)
        assert {x.dtype for x in (starts, page_starts, pages, last_page_lens)} == {torch.int32}
        counts = page_starts[1:] - page_starts[:-1]
        self._starts, self._left, self._dtype = starts, window_left, q_data_type
        self._tables = list(pages.split(counts.tolist()))
        self._lens = (counts - 1) * page_size + last_page_lens
        for name, value in (("qo_indptr_buf", starts), ("paged_kv_indptr_buf", page_starts),
                            ("paged_kv_last_page_len_buf", last_page_lens)):  # fmt: skip
            assert name not in self._buffers or self._buffers[name].shape == value.shape
        assert len(pages) <= len(self._buffers.get("paged_kv_indices_buf", pages))

    def run(self, q: Tensor, cache: Tensor, out: Tensor) -> Tensor:
        assert q.dtype == self._dtype
        pages = cache[:, 0], cache[:, 1]
        return out.copy_(paged_reference(q, pages, self._starts, self._tables, self._lens, self._left))


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=FakeWrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("window", WINDOWS)
def test_flashinfer_is_asked_for_what_sdpa_gives(config: ModelConfig, window: int | None) -> None:
    step = mixed_step(config)
    kernel = FlashInferKernel(config, window, step.cache, BLOCK)
    kernel.plan(step.host.spans)
    torch.testing.assert_close(step.attend(window, kernels={window: kernel}), step.attend(window), atol=1e-5, rtol=1e-5)


# --- the choice ---


@pytest.mark.usefixtures("flash", "flashinfer")
@pytest.mark.parametrize("backend", ["varlen", "flashinfer"])
def test_a_right_kernel_passes_the_probe(config: ModelConfig, backend: Backend) -> None:
    cache = torch.zeros(NUM_BLOCKS, len(WINDOWS), 2, BLOCK, config.num_kv_heads, config.head_dim)
    assert probe(backend, config, cache) < 1e-5
    assert cuda_attention._is_right(backend, config, cache)


@pytest.mark.parametrize("fault", ["raises", "wrong", "not a number"])
def test_a_kernel_that_fails_the_probe_is_not_used(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def attend(self: VarlenKernel, q: Tensor, cache: Tensor, out: Tensor) -> None:
        if fault == "raises":
            raise RuntimeError("no such kernel")
        out.fill_(0.0 if fault == "wrong" else math.nan)

    monkeypatch.setattr(VarlenKernel, "attend", attend)
    cache = torch.zeros(NUM_BLOCKS, 1, 2, BLOCK, config.num_kv_heads, config.head_dim)
    assert not cuda_attention._is_right("varlen", config, cache)
    assert "backend=varlen" in caplog.text


def test_single_precision_is_padded(config: ModelConfig, device: str) -> None:
    cache = torch.zeros(NUM_BLOCKS, 1, 2, BLOCK, config.num_kv_heads, config.head_dim, device=device)
    assert choose_backend(config, cache) == "padded"


def test_on_a_gpu_the_choice_is_right(config: ModelConfig, device: str) -> None:
    shape = (NUM_BLOCKS, 1, 2, BLOCK, config.num_kv_heads, config.head_dim)
    cache = torch.zeros(shape, device=device, dtype=torch.bfloat16)
    backend = choose_backend(config, cache)
    assert backend == "padded" or probe(backend, config, cache) <= cuda_attention.PROBE_TOLERANCE
