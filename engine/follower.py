"""A rank other than the leader: its part of the model and of the cache. Knows nothing of requests."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config import EngineConfig, ModelConfig, kv_layout
from engine.cuda_graphs import on_device
from engine.kv_cache import TORCH_DTYPES, make_cache
from engine.native_model import fastest
from engine.parallel import RankGroup
from engine.pieces import is_writer, pieces_of
from engine.rank_meter import RankWork
from engine.ranks import MAX_PARTS_A_STAGE, follow
from engine.weights import load_model
from kvstore.blocks import Payload


class Follower:
    """Loads the same as its leader's `Engine.from_pretrained`, with the same config; call `run` on a thread afterwards.

    A step ends here at another time than at the leader. Before blocks are copied, `wait_for_steps` must wait until
    the steps that the leader had sent have ended: they may still be writing the bytes to be read, or using blocks to
    be filled that belonged to another request before.
    """

    def __init__(self, folder: Path, engine_config: EngineConfig, group: RankGroup) -> None:
        """Raises `UnsupportedModel`, `RanksDisagree`."""
        config, self._group = ModelConfig.from_pretrained(folder), group
        self.layout = kv_layout(config, engine_config)
        self.pieces = pieces_of(config, engine_config, group.shard)
        self.is_writer = is_writer(config, group.shard)
        group.agree(self.layout)
        dtype, self._device = TORCH_DTYPES[self.layout.dtype], torch.device(engine_config.device)
        model = load_model(folder, config, dtype, self._device, group)
        self._cache = make_cache(config, engine_config, group)
        self._model = on_device(fastest(model), self._cache)
        self._num_threads = engine_config.num_threads
        self._importing = threading.Lock()  # one thread writes at a time
        self._stepped = threading.Condition()
        self._num_steps = 0

    @property
    def num_blocks(self) -> int:
        """The number of blocks in the cache; block ids are below it."""
        return self._cache.spare_block

    @property
    def stage(self) -> int:
        return self._group.shard.pp_rank

    @property
    def work(self) -> RankWork:
        """What this rank has done so far; any thread may ask."""
        return self._group.meter.work

    def run(self) -> None:
        """Computes its part of each step until the leader stops it. Raises `RuntimeError` when a rank is lost."""
        if self._num_threads > 0:
            torch.set_num_threads(self._num_threads)
        follow(self._model, self._group, self._cache.tensor, self._on_step)

    @property
    def max_told_steps(self) -> int:
        """The most steps the leader can have sent by now, given how far ahead of this rank it may be."""
        return self._num_steps + MAX_PARTS_A_STAGE * self._group.shard.pp_size + 1

    def wait_for_steps(self, num_steps: int, timeout_s: float) -> bool:
        """Waits until `num_steps` steps have ended here. False: they have not within `timeout_s`."""
        with self._stepped:
            return self._stepped.wait_for(lambda: self._num_steps >= num_steps, timeout_s)

    def import_blocks(self, block_ids: Sequence[int], payloads: Sequence[Payload]) -> int:
        """Fills blocks of a request that the leader holds, like `Engine.import_blocks`; returns how many are good."""
        num_pieces = len(self.pieces)
        with self._importing:
            for index, block_id in enumerate(block_ids):
                parts = payloads[index * num_pieces : (index + 1) * num_pieces]
                if len(parts) < num_pieces or not self._cache.write_block(block_id, parts):
                    return index
        return len(block_ids)

    def export_pieces(self, piece_ids: Sequence[int], destinations: Sequence[memoryview]) -> list[int]:
        """Like `Engine.export_pieces`, for blocks that the leader keeps pinned meanwhile."""
        return self._cache.read(piece_ids, destinations)

    def _on_step(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        with self._stepped:
            self._num_steps += 1
            self._stepped.notify_all()
