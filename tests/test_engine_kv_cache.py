"""A block's bytes survive the way out and in again, on the host's way and on the way that a device takes."""

from __future__ import annotations

import pytest
import torch

from engine.kv_cache import TORCH_DTYPES, KVCache
from kvstore.blocks import KVLayout


def make_cache(dtype: str, on_host: bool) -> KVCache:
    layout = KVLayout(model="m", dtype=dtype, block_size=4, num_layers=3, num_kv_heads=2, head_dim=6)
    cache = KVCache(layout, 5, torch.device("cpu"))
    if not on_host:
        cache._host = None  # what a device's memory looks like: only torch may touch it
    return cache


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_blocks_go_out_and_in(dtype: str, on_host: bool) -> None:
    source, target = make_cache(dtype, on_host), make_cache(dtype, on_host)
    source.tensor.copy_(torch.randn(source.tensor.shape))
    buffers = [bytearray(source.block_bytes) for _ in range(2)]
    source.read([4, 1], [memoryview(buffer) for buffer in buffers])
    assert target.write(0, memoryview(bytes(buffers[0])))
    assert target.write(2, memoryview(buffers[1]))
    assert torch.equal(target.tensor[0], source.tensor[4])
    assert torch.equal(target.tensor[2], source.tensor[1])
    assert not target.tensor[[1, 3, 4]].any()


@pytest.mark.parametrize("on_host", [True, False])
def test_bytes_are_row_major_layer_then_key_or_value_then_token(on_host: bool) -> None:
    cache = make_cache("float32", on_host)
    block = torch.arange(3 * 2 * 4 * 2 * 6, dtype=torch.float32)
    assert cache.write(3, memoryview(block.numpy()).cast("B"))
    assert torch.equal(cache.tensor[3], block.view(3, 2, 4, 2, 6))


@pytest.mark.parametrize("on_host", [True, False])
def test_other_sizes_are_not_copied(on_host: bool) -> None:
    cache = make_cache("float16", on_host)
    for size in (0, cache.block_bytes - 1, cache.block_bytes + 1):
        assert not cache.write(1, memoryview(b"\xff" * size))
        with pytest.raises(ValueError):
            cache.read([1], [memoryview(bytearray(size))])
    with pytest.raises(ValueError):
        cache.read([1, 2], [memoryview(bytearray(cache.block_bytes))])
    assert not cache.tensor.any()
