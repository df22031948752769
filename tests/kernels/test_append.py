"""Append: every bit of the storage against an independent numpy implementation of the formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hf_int8_paged.kernels import KvCacheQuant, gather_dense, int8_kv_append_paged
from tests.segments import fill_blocks

from .helpers import SEED, device_of, int32_on, poisoned_layer, quantize, snapshot, write_slots

wide = pytest.mark.wide
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def butterflies(x: np.ndarray) -> np.ndarray:
    """Float32 fast Walsh-Hadamard transform of rows, in the order that `conditioning` documents, pair by pair."""
    x = x.copy()
    dim, distance = x.shape[-1], 1
    while dim % (2 * distance) == 0:
        first = np.array([i for i in range(dim) if i // distance % 2 == 0])
        a, b = x[..., first], x[..., first + distance]
        x[..., first], x[..., first + distance] = a + b, a - b
        distance *= 2
    return x * np.float32(1 / np.sqrt(distance))


def expect_append(
    expected: KvCacheQuant, k: torch.Tensor, v: torch.Tensor, table: np.ndarray, before: Sequence[int]
) -> None:
    """Write what append should have written, token by token."""
    for rows, values in ((k, False), (v, True)):
        x = rows.float().cpu().numpy()
        with np.errstate(all="ignore"):
            if expected.key_center is not None and not values:
                x = x - expected.key_center.cpu().numpy()[:, None]
            if expected.rotation:
                x = butterflies(x)
        q, scales = quantize(x)
        places = [
            (b, t, table[b, p // expected.block_size], p % expected.block_size)
            for b, start in enumerate(before)
            for t, p in enumerate(range(start, start + x.shape[2]))
            if table[b, p // expected.block_size] >= 0
        ]
        b, t, block, slot = np.array(places, dtype=np.int64).reshape(-1, 4).T
        write_slots(
            expected, block, slot, q[b, :, t].transpose(1, 0, 2), scales[b, :, t].transpose(1, 0), values=values
        )


def append_and_check(
    backend: str,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    before: Sequence[int] = (0,),
    block_size: int = 16,
    holes: Sequence[tuple[int, int]] = (),
    rotation: str | None = None,
    key_center: torch.Tensor | None = None,
) -> KvCacheQuant:
    """Append to a poisoned pool with permuted blocks; every slot, addressed or not, must hold the expected bits."""
    batch, heads, tokens, head_dim = k.shape
    width = max((n + tokens) // block_size + 1 for n in before)
    conditioning: dict[str, Any] = {"rotation": rotation, "center_keys": key_center is not None}
    got, expected = (
        poisoned_layer(backend, batch * width + 2, block_size, heads, head_dim, v_head_dim=v.shape[-1], **conditioning)
        for _ in range(2)
    )
    table = np.random.default_rng(1).permutation(batch * width).reshape(batch, width).astype(np.int32) + 1
    for b, j in holes:
        table[b, j] = -1
    if key_center is not None:
        for storage in (got, expected):
            storage.key_center.copy_(key_center)
    device = device_of(backend)
    lens = torch.tensor(before, dtype=torch.int32, device=device)
    assert int8_kv_append_paged(k.to(device), v.to(device), got, torch.from_numpy(table).to(device), lens) is None
    expect_append(expected, k, v, table, before)
    assert_same_bits(snapshot(got), snapshot(expected))
    return got


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    for name, bits in want.items():
        same = got[name] == bits
        if name.endswith("scales"):
            # A backend may choose the payload of the NaN that it writes.
            same |= np.isnan(got[name].view(np.float16)) & np.isnan(bits.view(np.float16))
        assert same.all(), f"{(~same).sum()} wrong elements of {name}, first at {np.argwhere(~same)[0].tolist()}"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED + seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [
    (1, 2, 1, 64, 64),
    (2, 3, 20, 32, 96),
    pytest.param((3, 2, 70, 128, 80), marks=wide),
    pytest.param((1, 4, 33, 256, 256), marks=wide),
    pytest.param((5, 1, 7, 80, 32), marks=wide),
], ids=str)  # fmt: skip
def test_rows_of_every_dtype_and_size(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, heads, tokens, head_dim, v_head_dim = shape
    k, v = (
        normal(batch, heads, tokens, head_dim, dtype=dtype),
        normal(batch, heads, tokens, v_head_dim, dtype=dtype, seed=1),
    )
    append_and_check(backend, k, v, before=[(7 * b) % 40 for b in range(batch)])


@pytest.mark.parametrize("block_size", [16, *(pytest.param(n, marks=wide) for n in (32, 64, 128))])
def test_prompts_of_every_length_modulo_the_block_size(backend: str, block_size: int) -> None:
    lengths = range(1, 2 * block_size + 1) if block_size < 64 else range(1, 2 * block_size, 7)
    for tokens in lengths if backend != "triton" else (1, 15, 16, 17, 31, 32):
        append_and_check(backend, normal(1, 1, tokens, 32), normal(1, 1, tokens, 32, seed=1), block_size=block_size)


@pytest.mark.parametrize("tokens", [1, 5, 18])
def test_ragged_lengths_before(backend: str, tokens: int) -> None:
    k, v = normal(5, 2, tokens, 64), normal(5, 2, tokens, 64, seed=1)
    append_and_check(backend, k, v, before=(0, 1, 15, 16, 47))


def test_tokens_in_holes_are_not_stored(backend: str) -> None:
    k, v = normal(2, 2, 40, 32), normal(2, 2, 40, 32, seed=1)
    append_and_check(backend, k, v, before=(0, 10), holes=((0, 1), (1, 0), (1, 3)))


def special_rows(dim: int, dtype: torch.dtype) -> torch.Tensor:
    """``[1, 1, rows, dim]``: each row tests one clause of the formula."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal(dim)
    scale = 2.0**-5
    # Scale is exactly 2^-5, so every value / scale is a half-integer: round half to even shows.
    ties = (rng.integers(-126, 126, dim) + 0.5) * scale
    ties[0] = 127 * scale
    rows = [
        np.zeros(dim),
        -np.zeros(dim),
        ties,
        -ties,
        np.linspace(-1, 1, dim),
        noise * 2.0**-20,  # subnormal float16 scale
        np.full(dim, 127 * 2.0**-24),  # the smallest scale
        np.full(dim, 127 * 2.0**-25),  # a tie between that and zero: to even, zero
        np.full(dim, 127 * 1.49 * 2.0**-24),  # rounds down to it: values clip at 127
        noise * 1e-12,  # scale rounds to zero
        noise * 2e4,
        np.eye(1, dim, 3)[0],
        np.where(np.arange(dim) == 5, np.nan, noise),
        np.where(np.arange(dim) == dim - 1, np.inf, noise),
        np.where(np.arange(dim) == 0, -np.inf, noise),
        np.where(np.arange(dim) % 2 == 0, np.inf, np.nan),
        np.full(dim, np.nan),
        noise,
    ]
    if dtype != torch.float16:
        rows += [
            noise * 1e7,
            noise * 1e30,
            np.full(dim, 127 * 65504.0),
            np.full(dim, 127 * 65519.0),
            np.full(dim, 3e38),
        ]
    if dtype == torch.float32:
        # Just above a tie between two float16 scales, where a product with 1 / 127 would round down.
        ties_of_scales = [np.float32(127 * (1 + (m + 0.5) / 1024)) for m in (0, 2, 4, 6)]
        rows += [np.full(dim, np.nextafter(tie, np.float32(np.inf))) for tie in ties_of_scales]
    return torch.from_numpy(np.array(rows)).to(dtype)[None, None]


@pytest.mark.parametrize("rotation", [None, "hadamard"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", [64, pytest.param(96, marks=wide)])
def test_ties_zeros_tiny_huge_and_faulty_rows(backend: str, dtype: torch.dtype, dim: int, rotation: str | None) -> None:
    rows = special_rows(dim, dtype)
    append_and_check(backend, rows, rows.flip(2), before=(5,), rotation=rotation)


def test_a_faulty_row_is_marked_by_a_nan_scale_and_zeros(backend: str) -> None:
    storage = poisoned_layer(backend, 1, 16, 1, 32)
    fill_blocks(storage, [0], 0, 1.0)
    device = device_of(backend)
    k, v = normal(1, 1, 3, 32).to(device), normal(1, 1, 3, 32, seed=1).to(device)
    k[0, 0, 1, 7], v[0, 0, 2, 31] = torch.nan, -torch.inf
    int32 = int32_on(backend)
    table, before = torch.zeros(1, 1, **int32), torch.zeros(1, **int32)
    int8_kv_append_paged(k, v, storage, table, before)
    assert storage.k_scales[0, 0].isnan().nonzero().flatten().tolist() == [1]
    assert storage.v_scales[0, 0].isnan().nonzero().flatten().tolist() == [2]
    k_dense, v_dense = gather_dense(storage, table, before + 3)
    assert k_dense.isnan().all(-1).flatten().tolist()[:3] == [False, True, False]
    assert v_dense.isnan().all(-1).flatten().tolist()[:3] == [False, False, True]


@pytest.mark.parametrize("dim", [32, 64, *(pytest.param(d, marks=wide) for d in (80, 96, 128, 256))])
@pytest.mark.parametrize("rotation", [None, "hadamard"], ids=["unrotated", "rotated"])
@pytest.mark.parametrize("centered", [False, True], ids=["uncentered", "centered"])
def test_conditioning_produces_the_same_bits(backend: str, dim: int, rotation: str | None, centered: bool) -> None:
    k, v = normal(2, 3, 21, dim), normal(2, 3, 21, dim, seed=1)
    k[..., 3] += 20
    center = normal(3, dim, seed=2) * 5 if centered else None
    append_and_check(backend, k, v, before=(3, 17), rotation=rotation, key_center=center)


@wide
def test_a_million_rotated_values_have_the_same_bits(backend: str) -> None:
    """Another order of operations in the transform, off by one ulp, changes about one value in 100,000."""
    append_and_check(backend, normal(1, 2, 5000, 32), normal(1, 2, 5000, 128, seed=1), rotation="hadamard")


def as_a_model_lays_it_out(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_second_element(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x * torch.nan), -1)[..., 0]


def slice_of_fused_qkv(x: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, dim = x.shape
    fused = torch.full((batch, tokens, 3 * heads * dim + 5), torch.nan, dtype=x.dtype)
    part = fused[..., heads * dim + 5 : 2 * heads * dim + 5]
    part.copy_(x.transpose(1, 2).reshape(batch, tokens, heads * dim))
    return part.unflatten(-1, (heads, dim)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", [as_a_model_lays_it_out, every_second_element, slice_of_fused_qkv])
def test_strided_rows(backend: str, layout, dtype: torch.dtype) -> None:
    k, v = layout(normal(2, 2, 19, 64, dtype=dtype)), layout(normal(2, 2, 19, 64, dtype=dtype, seed=1))
    assert not k.is_contiguous()
    append_and_check(backend, k, v, before=(3, 20))


def test_one_row_expanded_over_the_batch(backend: str) -> None:
    k, v = normal(1, 2, 3, 64).expand(4, -1, -1, -1), normal(1, 2, 3, 64, seed=1).expand(4, -1, -1, -1)
    append_and_check(backend, k, v, before=(0, 1, 2, 30))


@pytest.mark.parametrize("shape", [(2, 2, 0, 64), (0, 2, 5, 64)], ids=["no_tokens", "no_sequences"])
def test_nothing_to_append_changes_nothing(backend: str, shape: tuple[int, ...]) -> None:
    storage = poisoned_layer(backend, 4, 16, 2, 64)
    before = snapshot(storage)
    int32 = int32_on(backend)
    rows = torch.empty(shape, device=device_of(backend))
    int8_kv_append_paged(rows, rows, storage, torch.zeros(shape[0], 2, **int32), torch.zeros(shape[0], **int32))
    for name, bits in snapshot(storage).items():
        np.testing.assert_array_equal(bits, before[name])


def test_appending_token_by_token_equals_appending_at_once(backend: str) -> None:
    k, v = normal(2, 2, 21, 32), normal(2, 2, 21, 32, seed=1)
    device = device_of(backend)
    k, v = k.to(device), v.to(device)
    int32 = int32_on(backend)
    table, lens = torch.tensor([[3, 0, 4], [2, 5, 1]], **int32), torch.tensor([4, 17], **int32)
    once, stepwise = (poisoned_layer(backend, 6, 16, 2, 32, rotation="hadamard") for _ in range(2))
    int8_kv_append_paged(k, v, once, table, lens)
    for t in range(21):
        int8_kv_append_paged(k[:, :, t : t + 1], v[:, :, t : t + 1], stepwise, table, lens + t)
    assert_same_bits(snapshot(stepwise), snapshot(once))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_round_trip_error_is_at_most_half_a_step(backend: str, dtype: torch.dtype) -> None:
    tokens, dim = 30, 64
    magnitudes = torch.logspace(-7, 4, tokens)[:, None]
    k, v = (normal(1, 2, tokens, dim, seed=s) * magnitudes for s in (0, 1))
    k, v = k.to(dtype), v.to(dtype)
    storage = append_and_check(backend, k, v)
    table = torch.from_numpy(np.random.default_rng(1).permutation(2).reshape(1, 2).astype(np.int32) + 1)
    lens = torch.tensor([tokens], dtype=torch.int32)
    device = device_of(backend)
    dense = gather_dense(storage, table.to(device), lens.to(device))
    for x, got in zip((k, v), dense):
        x, got = x.double(), got.cpu()[:, :, :tokens].double()
        scale = (x.abs().amax(-1, keepdim=True) / 127).to(torch.float16).double()
        # A normal float16 scale is off by at most 2^-11 of itself, so that clipping at 127 costs less than half a
        # step. A subnormal one is off by up to 2^-25, and the largest value by 127 times that.
        bound = torch.maximum(scale / 2, torch.full_like(scale, 127 * 2.0**-25))
        assert ((x - got).abs() <= bound * (1 + 1e-6)).all()
