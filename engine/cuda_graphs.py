"""A model on a CUDA device, called like the model itself: takes batches on the host, moves each with one copy, and
replays decode steps as graphs. Not yet run on a GPU; on a CPU the tests run all of it except the capture.

A graph is a step of fixed shape: the number of sequences and the width of their block tables are rounded up to buckets.
Padding rows read and write the cache's spare block. Graphs are captured at warm-up, or when first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from engine.attention import ForwardBatch, Kernel, SequenceSpan
from engine.cuda_attention import Backend, FlashInferKernel, choose_backend, planned_kernels, table_kernels
from engine.device_batch import BatchShape, decode_shape, decode_shapes, pack, pad_decode, unpack
from engine.kv_cache import KVCache
from engine.model import Model, Transformer

Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
Planned = Mapping[int | None, FlashInferKernel]


def on_device(model: Model, cache: KVCache) -> Model:
    """The model as a runner calls it: itself on a CPU, behind graphs on a CUDA device."""
    if not cache.tensor.is_cuda:
        return model
    assert isinstance(model, Transformer)
    backend, recorder = choose_backend(model.config, cache.tensor), GraphRecorder(cache.tensor.device)
    return GraphedModel(model, cache, backend, recorder, is_alone=model.parallel.shard.num_ranks == 1)


class GraphRecorder:
    """Captures what a function launches; calling the result replays it and returns the same tensor, filled anew."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # shared by all graphs, as they never run at the same time
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Libraries allocate and select kernels on their first call, which a capture does not allow.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                compute()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads keep exporting blocks meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = compute()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class GraphedModel:
    """Takes batches on the host, returns logits on the device; those of a graph are valid until the next call."""

    def __init__(
        self, model: Transformer, cache: KVCache, backend: Backend, record: Recorder, is_alone: bool = True
    ) -> None:
        """Without `is_alone` there are no graphs, as communication between ranks is not captured."""
        self._model, self._backend, self._record = model, backend, record
        self._is_alone = is_alone
        self._cache, self._spare_block = cache.tensor, cache.spare_block
        self._block_size = cache.tensor.shape[3]
        self._planned = self._planned_kernels()
        self._graphs: dict[BatchShape, _DecodeGraph] = {}

    def __call__(self, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Logits float32 `[R, vocab]`, like `Transformer`; `cache` must be the one this model was made for."""
        assert cache is self._cache, "graphs read and write one cache"
        shape = decode_shape(batch, self._block_size) if self._is_alone else None
        if shape is None:
            return self._run(batch)
        if shape not in self._graphs:
            self._graphs[shape] = self._graph(shape)
        logits = self._replay(self._graphs[shape], batch)
        if len(batch.logits_indices) == len(batch.spans):
            return logits[: len(batch.spans)]
        return logits[batch.logits_indices.to(logits.device)]  # a single prompt token that needs no logits

    def captures(self, max_sequences: int, max_context_len: int) -> list[Callable[[], object]]:
        """Functions that capture the graphs of all decode steps that an engine can run, one graph each.

        They read and write only the spare block. The largest comes first, so that the others reuse its memory.
        """
        shapes = decode_shapes(max_sequences, max_context_len, self._block_size) if self._is_alone else []
        return [partial(self._capture, shape) for shape in reversed(shapes)]

    def _capture(self, shape: BatchShape) -> None:
        if shape in self._graphs:
            return
        nothing = torch.empty(0, dtype=torch.int64)
        self._graphs[shape] = self._graph(shape)
        self._replay(self._graphs[shape], ForwardBatch(nothing, nothing, nothing, (), nothing))

    def _run(self, batch: ForwardBatch) -> Tensor:
        shape = BatchShape.of(batch, self._block_size)
        packed = torch.empty(sum(shape.sizes), dtype=torch.int64, device=self._cache.device)
        self._fill(packed, shape, batch, self._planned)
        return self._compute(packed, shape, batch.spans, self._planned)

    def _graph(self, shape: BatchShape) -> _DecodeGraph:
        packed = torch.empty(sum(shape.sizes), dtype=torch.int64, device=self._cache.device)
        return _DecodeGraph(shape, packed, self._planned_kernels(shape))

    def _replay(self, graph: _DecodeGraph, batch: ForwardBatch) -> Tensor:
        """The logits of all rows, including padding."""
        padded = pad_decode(batch, graph.shape.num_sequences, self._spare_block, self._block_size)
        self._fill(graph.packed, graph.shape, padded, graph.planned)
        if graph.replay is None:
            # Captured with this step as its input: computing a step twice changes nothing.
            graph.replay = self._record(lambda: self._compute(graph.packed, graph.shape, (), graph.planned))
        return graph.replay()

    def _fill(self, packed: Tensor, shape: BatchShape, batch: ForwardBatch, planned: Planned) -> None:
        source = pack(batch, shape, self._block_size)
        # The allocator of pinned memory does not reuse it before the copy is done.
        packed.copy_(source.pin_memory() if packed.is_cuda else source, non_blocking=True)
        for kernel in planned.values():
            kernel.plan(batch.spans)

    def _compute(self, packed: Tensor, shape: BatchShape, spans: Sequence[SequenceSpan], planned: Planned) -> Tensor:
        batch, tables = unpack(packed, shape, spans, self._block_size)
        windows = self._model.config.sliding_windows
        kernels: Mapping[int | None, Kernel] = planned
        if not kernels:
            kernels = table_kernels(self._backend, tables, windows, self._block_size)
        logits: Tensor = self._model(replace(batch, kernels=kernels), self._cache)
        return logits

    def _planned_kernels(self, shape: BatchShape | None = None) -> Planned:
        if self._backend != "flashinfer":
            return {}
        return planned_kernels(self._model.config, self._cache, self._block_size, shape)


@dataclass
class _DecodeGraph:
    shape: BatchShape
    packed: Tensor  # int64, the graph's only input
    planned: Planned
    replay: Callable[[], Tensor] | None = None  # None: not captured yet
