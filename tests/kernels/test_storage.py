"""The memory layout: tile orders element by element, shapes and byte counts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hf_int8_paged.kernels import (
    TILE_ORDERS,
    KvCacheQuant,
    alloc_paged_int8_layer,
    int8_kv_append_paged,
    load_backend,
    resolve_backend,
)
from hf_int8_paged.kernels.storage import tiles_to_rows, write_rows

from .helpers import device_of, make_case, snapshot, tile_offsets


@pytest.mark.parametrize("values", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize("tile_order", TILE_ORDERS)
@pytest.mark.parametrize("dim", [32, 80])
def test_tiles_to_rows_finds_every_element(tile_order: str, values: bool, dim: int) -> None:
    block_size = 48
    tiles = torch.arange(2 * block_size * dim).reshape(2, block_size, dim)
    rows = tiles_to_rows(tiles, tile_order, values=values)
    offsets = torch.from_numpy(tile_offsets(tile_order, block_size, dim, values=values))
    assert torch.equal(rows, torch.stack((offsets, offsets + block_size * dim)))


@pytest.mark.parametrize("values", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize("tile_order", TILE_ORDERS)
def test_write_rows_puts_every_element_and_no_other(tile_order: str, values: bool) -> None:
    heads, num_blocks, block_size, dim = 3, 4, 16, 20
    store = torch.full((heads, num_blocks, block_size, dim), -128, dtype=torch.int8)
    blocks, slots = torch.tensor([2, 2, 0, 3]), torch.tensor([0, 15, 7, 6])
    rows = torch.randint(-127, 128, (heads, 4, dim), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    want = store.numpy().copy()
    offsets = tile_offsets(tile_order, block_size, dim, values=values)
    for h, i, d in np.ndindex(heads, 4, dim):
        want[h, blocks[i]].reshape(-1)[offsets[slots[i], d]] = rows[h, i, d]
    write_rows(store, tile_order, blocks, slots, rows, values=values)
    np.testing.assert_array_equal(store.numpy(), want)


@pytest.mark.parametrize("v_head_dim", [None, 96])
@pytest.mark.parametrize("num_blocks", [0, 1, 37])
def test_a_layer_takes_int8_values_and_one_float16_scale_per_row(
    backend: str, num_blocks: int, v_head_dim: int | None
) -> None:
    storage = alloc_paged_int8_layer(
        num_blocks, 32, 3, 64, v_head_dim=v_head_dim, device=device_of(backend), backend=backend
    )
    v_dim = v_head_dim or 64
    assert (storage.k.shape, storage.k.dtype) == ((3, num_blocks, 32, 64), torch.int8)
    assert (storage.v.shape, storage.v.dtype) == ((3, num_blocks, 32, v_dim), torch.int8)
    for scales in (storage.k_scales, storage.v_scales):
        assert (scales.shape, scales.dtype) == ((3, num_blocks, 32), torch.float16)
    assert (storage.num_kv_heads, storage.num_blocks, storage.block_size) == (3, num_blocks, 32)
    assert (storage.head_dim, storage.v_head_dim, storage.device.type) == (64, v_dim, device_of(backend).type)
    assert storage.bytes_per_token == 3 * (64 + v_dim + 4)
    stores = (storage.k, storage.v, storage.k_scales, storage.v_scales)
    assert (
        storage.nbytes == sum(x.numel() * x.element_size() for x in stores) == num_blocks * 32 * storage.bytes_per_token
    )
    assert all(x.is_contiguous() for x in stores)
    assert (storage.backend, storage.tile_order) == (backend, load_backend(backend).TILE_ORDER)
    assert storage.key_center is None


def test_a_key_center_starts_at_zero(backend: str) -> None:
    storage = alloc_paged_int8_layer(2, 16, 3, 80, device=device_of(backend), backend=backend, center_keys=True)
    assert storage.key_center is not None
    assert (storage.key_center.shape, storage.key_center.dtype) == ((3, 80), torch.float32)
    assert not storage.key_center.any()


def test_without_a_name_the_device_gets_its_best_backend(backend: str) -> None:
    device = device_of(backend)
    best = {"cpu": "cpu", "cuda": "triton"}[device.type]
    assert resolve_backend(None, device).NAME in (best, "reference")
    assert alloc_paged_int8_layer(1, 16, 1, 64, device=device).backend == resolve_backend(None, device).NAME


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_what_kernels_know_of_a_storage_does_not_go_with_its_copy(
    backend: str, copied: Callable[[KvCacheQuant], KvCacheQuant]
) -> None:
    """They keep addresses with it, and those of the copy are others."""
    case = make_case(backend, lens=(20,), rotation="hadamard", center=True)
    table, lens = case.block_table, case.context_lens
    rows = torch.randn(2, 1, 2, 3, 64, generator=torch.Generator().manual_seed(0)).to(table.device)
    int8_kv_append_paged(rows[0], rows[0], case.storage, table, lens)
    before, twin = snapshot(case.storage), copied(case.storage)
    int8_kv_append_paged(rows[1], rows[1], twin, table, lens)
    after, theirs = snapshot(case.storage), snapshot(twin)
    assert all((before[name] == after[name]).all() for name in before)
    assert any((before[name] != theirs[name]).any() for name in before)
    int8_kv_append_paged(rows[1], rows[1], case.storage, table, lens)
    after = snapshot(case.storage)
    assert all((after[name] == theirs[name]).all() for name in after)
