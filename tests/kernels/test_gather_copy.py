"""`gather_dense` and `copy_blocks` against the dequantized rows that the test itself put into the pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_int8_paged.kernels import copy_blocks, gather_dense
from tests.segments import STORES, put_whole, whole

from .helpers import Case, device_of, int32_on, make_case, poisoned_layer, snapshot

SHAPES: dict[str, dict[str, Any]] = {
    "one_token": dict(lens=(1,), head_dim=32),
    "ragged": dict(lens=(0, 5, 48, 33), head_dim=64),
    "v_wider": dict(lens=(40, 7), head_dim=80, v_head_dim=128),
    "block_of_64": dict(lens=(70, 200), head_dim=96, block_size=64),
    "head_dim_256": dict(lens=(21,), head_dim=256, block_size=32),
    "holes": dict(lens=(60, 40), head_dim=64, holes=((0, 0), (0, 2), (1, 1))),
}


def dequantized(case: Case, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of the positions, 0 where there is no token."""
    keys, values = (np.nan_to_num(x[:, :, start:stop], nan=0.0) for x in (case.keys, case.values))
    return keys, values


def with_every_token_kept(backend: str, **shape: Any) -> Case:
    """Every token is visible to the last of its rows, so `make_case` poisons none of them."""
    return make_case(backend, **shape, group=1, q_len=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gather_is_the_exact_product_rounded_once(backend: str, shape: dict[str, Any], dtype: torch.dtype) -> None:
    case = with_every_token_kept(backend, **shape)
    dense = gather_dense(case.storage, case.block_table, case.context_lens, dtype=dtype)
    for got, want in zip(dense, dequantized(case, 0, case.keys.shape[2])):
        assert got.dtype == dtype
        # 8 bits of value times 11 bits of scale fit in float32.
        assert torch.equal(got.cpu(), torch.from_numpy(want).float().to(dtype))


@pytest.mark.parametrize("center", [False, True], ids=["uncentered", "centered"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gather_undoes_rotation_and_key_center(backend: str, shape: dict[str, Any], center: bool) -> None:
    case = with_every_token_kept(backend, **shape, rotation="hadamard", center=center)
    dense = gather_dense(case.storage, case.block_table, case.context_lens)
    for got, want in zip(dense, dequantized(case, 0, case.keys.shape[2])):
        assert not got.cpu()[torch.from_numpy(want) == 0].any()
        # At most 8 butterflies, a factor and a sum, each off by half an ulp of the row's norm.
        bound = 10 * 2.0**-24 * (np.linalg.norm(want, axis=-1, keepdims=True) + (want.shape[-1] ** 0.5) * 8 * center)
        assert (np.abs(got.cpu().double().numpy() - want) <= bound).all()


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (3, 3), (5, 9), (13, 50), (16, 32), (47, 64), (60, 64)])
def test_gather_of_a_range(backend: str, start: int, stop: int) -> None:
    case = with_every_token_kept(backend, lens=(48, 21, 10), head_dim=64, holes=((0, 1),))
    dense = gather_dense(case.storage, case.block_table, case.context_lens, start=start, stop=stop)
    for got, want in zip(dense, dequantized(case, start, stop)):
        assert got.shape == want.shape
        assert torch.equal(got.cpu(), torch.from_numpy(want).float())


def test_gather_of_no_sequences_or_no_blocks(backend: str) -> None:
    int32 = int32_on(backend)
    storage = poisoned_layer(backend, 2, 16, 3, 64, v_head_dim=96)
    k, v = gather_dense(storage, torch.zeros(0, 2, **int32), torch.zeros(0, **int32))
    assert (k.shape, v.shape) == ((0, 3, 32, 64), (0, 3, 32, 96))
    empty = poisoned_layer(backend, 0, 16, 3, 64)
    k, v = gather_dense(empty, torch.full((2, 1), -1, **int32), torch.zeros(2, **int32))
    assert k.shape == v.shape == (2, 3, 16, 64)
    assert not k.any()
    assert not v.any()


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("pairs", [[], [(0, 3)], [(5, 0), (5, 1), (2, 6), (4, 3)]], ids=str)
def test_copy_moves_every_bit_of_a_block_and_no_other(backend: str, pairs: list, block_size: int) -> None:
    storage = poisoned_layer(backend, 7, block_size, 3, 64, v_head_dim=80)
    generator = torch.Generator().manual_seed(0)
    for name in STORES:
        shape = whole(storage, name).shape
        if name.endswith("scales"):
            content = torch.rand(shape, generator=generator).half()
            content[:, 5, 3] = torch.nan
        else:
            content = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        put_whole(storage, name, content)
    want = snapshot(storage)
    for src, dst in pairs:
        for store in want.values():
            store[:, dst] = store[:, src]
    src, dst = torch.tensor(pairs, dtype=torch.int32, device=device_of(backend)).reshape(-1, 2).T
    assert copy_blocks(storage, src.contiguous(), dst.contiguous()) is None
    for name, bits in snapshot(storage).items():
        np.testing.assert_array_equal(bits, want[name], err_msg=name)
