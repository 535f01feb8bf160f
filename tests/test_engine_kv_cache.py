"""A block's bytes survive the way out and in again, on the host's way and on the way that a device takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.cuda_copies import STAGED_BLOCKS, BlockCopies
from engine.kv_cache import TORCH_DTYPES, KVCache
from kvstore.blocks import KVLayout

NUM_BLOCKS = 2 * STAGED_BLOCKS + 3


@pytest.fixture(params=["host", "staged", "cuda"])
def way(request: pytest.FixtureRequest) -> str:
    """`staged`: a device's way in the host's memory."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    way: str = request.param
    return way


def make_cache(dtype: str, way: str) -> KVCache:
    layout = KVLayout(model="m", dtype=dtype, block_size=4, num_layers=3, num_kv_heads=2, head_dim=6)
    cache = KVCache(layout, NUM_BLOCKS, torch.device("cuda" if way == "cuda" else "cpu"))
    if way == "staged":
        cache._host = None
        cache._copies = BlockCopies(cache._pieces)
    return cache


def read(cache: KVCache, block_ids: list[int]) -> list[bytes]:
    buffers = [bytearray(cache.piece_bytes) for _ in block_ids]
    cache.read(block_ids, [memoryview(buffer) for buffer in buffers])
    return [bytes(buffer) for buffer in buffers]


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_blocks_go_out_and_in(dtype: str, way: str) -> None:
    source, target = make_cache(dtype, way), make_cache(dtype, way)
    source.tensor.copy_(torch.randn(source.tensor.shape))
    first, second = read(source, [4, 1])
    assert target.write(0, memoryview(first))
    assert target.write(2, memoryview(bytearray(second)))
    assert torch.equal(target.tensor[0], source.tensor[4])
    assert torch.equal(target.tensor[2], source.tensor[1])
    assert not target.tensor[[1, *range(3, NUM_BLOCKS + 1)]].any()


def test_bytes_are_row_major_layer_then_key_or_value_then_token(way: str) -> None:
    cache = make_cache("float32", way)
    block = torch.arange(3 * 2 * 4 * 2 * 6, dtype=torch.float32)
    assert cache.write(3, memoryview(block.numpy()).cast("B"))
    assert torch.equal(cache.tensor[3].cpu(), block.view(3, 2, 4, 2, 6))


def test_more_blocks_than_are_on_their_way_at_once(way: str) -> None:
    """Each payload's memory is used again at once, as a store's slots are."""
    cache = make_cache("float32", way)
    payload = bytearray(cache.piece_bytes)
    for block_id in range(NUM_BLOCKS):
        payload[:] = bytes([block_id + 1]) * cache.piece_bytes
        assert cache.write(block_id, memoryview(payload))
    payload[:] = bytes(cache.piece_bytes)
    order = [*range(NUM_BLOCKS)][::-1]
    assert read(cache, order) == [bytes([block_id + 1]) * cache.piece_bytes for block_id in order]
    assert not cache.tensor[cache.spare_block].any()


def test_threads_read_side_by_side(way: str) -> None:
    cache = make_cache("float32", way)
    for block_id in range(NUM_BLOCKS):
        cache.write(block_id, memoryview(bytes([block_id]) * cache.piece_bytes))

    def is_right(shift: int) -> bool:
        order = [(block_id + shift) % NUM_BLOCKS for block_id in range(NUM_BLOCKS)]
        return read(cache, order) == [bytes([block_id]) * cache.piece_bytes for block_id in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, range(40)))


def test_other_sizes_are_not_copied(way: str) -> None:
    cache = make_cache("float16", way)
    for size in (0, cache.piece_bytes - 1, cache.piece_bytes + 1):
        assert not cache.write(1, memoryview(b"\xff" * size))
        with pytest.raises(ValueError):
            cache.read([1], [memoryview(bytearray(size))])
    with pytest.raises(ValueError):
        cache.read([1, 2], [memoryview(bytearray(cache.piece_bytes))])
    assert not cache.tensor.any()


@pytest.mark.parametrize("pieces", [(1, 2), (3, 1), (3, 2)])
def test_pieces_are_the_rows_and_columns_of_a_block(way: str, pieces: tuple[int, int]) -> None:
    rows, columns = pieces
    layout = KVLayout("m", "float32", block_size=4, num_layers=3 // rows, num_kv_heads=2 // columns, head_dim=6)
    device = torch.device("cuda" if way == "cuda" else "cpu")
    source, target = (KVCache(layout, NUM_BLOCKS, device, pieces) for _ in range(2))
    if way == "staged":
        for cache in (source, target):
            cache._host, cache._copies = None, BlockCopies(cache._pieces)
    source.tensor.copy_(torch.randn(source.tensor.shape))
    num_pieces = rows * columns
    out = read(source, [5 * num_pieces + piece for piece in range(num_pieces)])
    for piece, payload in enumerate(out):
        row, column = divmod(piece, columns)
        layers, heads = 3 // rows, 2 // columns
        part = source.tensor[5, row * layers : (row + 1) * layers, :, :, column * heads : (column + 1) * heads]
        assert payload == part.cpu().contiguous().numpy().tobytes()
        assert target.write(2 * num_pieces + piece, memoryview(bytearray(payload)))
    assert torch.equal(target.tensor[2], source.tensor[5])
    assert not target.tensor[[0, 1, *range(3, NUM_BLOCKS + 1)]].any()
