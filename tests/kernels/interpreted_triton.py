"""What only Triton's kernels can get wrong. test_triton.py runs this file under TRITON_INTERPRET=1, and `make test-gpu`
on a GPU."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from hf_int8_paged.kernels import (
    KvCacheQuant,
    Scoring,
    Tokens,
    gather_dense,
    int8_kv_append_paged,
    int8_paged_decode_attention,
)
from hf_int8_paged.kernels.triton import backend as triton_backend
from hf_int8_paged.kernels.triton.tuning import Chip

from .attention_oracle import dense_attention
from .conftest import on_the_device
from .helpers import device_of, make_case

pytestmark = on_the_device
DEVICE = device_of("triton")
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on
#: Largest error of an output row, relative to the row's length, that the integer arithmetic may cause.
ROW_ERROR = 3e-4


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + m * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n)
    tl.store(out_ptr + m * N + n, tl.dot(a, b, out_dtype=tl.int32))


@pytest.mark.parametrize("fill", [None, 127, -128], ids=["random", "largest", "smallest"])
def test_int8_products_are_exact(fill: int | None) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, shape, dtype=np.int8) for shape in ((16, 256), (256, 64)))
    if fill is not None:
        a[:], b[:] = fill, -128
    out = torch.empty(16, 64, dtype=torch.int32, device=DEVICE)
    dot_kernel[(1,)](out, torch.from_numpy(a).to(DEVICE), torch.from_numpy(b).to(DEVICE), 16, 64, 256)
    np.testing.assert_array_equal(out.cpu().numpy(), a.astype(np.int64) @ b.astype(np.int64))


def outlier_query(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    q[..., 5] *= 30


def one_dominant_key(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    k[:, :, 40] = q[:, :1, 0] * 3


def equal_scores(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    k[:] = k[:, :, :1]


def scales_over_6_orders(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    sizes = 10.0 ** np.linspace(-3, 3, v.shape[2])
    np.random.default_rng(1).shuffle(sizes)
    v *= sizes[:, None]


def loud_value_under_a_light_weight(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    v[:, :, 7] *= 1e4
    k[:, :, 7] = -q[:, :1, 0]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "edit",
    [None, outlier_query, one_dominant_key, equal_scores, scales_over_6_orders, loud_value_under_a_light_weight],
    ids=lambda edit: edit.__name__ if edit else "random",
)
def test_integer_arithmetic_is_close_to_float64(edit, head_dim: int) -> None:
    case = make_case("triton", lens=(150, 333), kv_heads=1, group=4, head_dim=head_dim, edit=edit)
    want = dense_attention(case)
    out = int8_paged_decode_attention(*case.arguments).double().cpu().numpy()
    error = np.linalg.norm(out - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() <= ROW_ERROR, error.max()


@pytest.mark.parametrize("processors", [2, 40])
@pytest.mark.parametrize(
    "options", [{}, {"sink_logits": True}, {"window": 200}], ids=["plain", "sink_logits", "window"]
)
def test_any_number_of_splits_gives_the_same_answer(monkeypatch, processors: int, options: dict) -> None:
    monkeypatch.setattr(triton_backend, "chip_of", lambda device: Chip("interpreter", processors))
    case = make_case("triton", lens=(9, 803), kv_heads=1, group=2, head_dim=32, **options)
    out = int8_paged_decode_attention(*case.arguments, **case.options).double().cpu().numpy()
    want = dense_attention(case)
    error = np.linalg.norm(out - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() <= ROW_ERROR, error.max()


def test_a_split_without_tokens_adds_nothing(monkeypatch) -> None:
    """A table reserved for a long context, a short context: most splits are empty."""
    monkeypatch.setattr(triton_backend, "chip_of", lambda device: Chip("interpreter", 9))
    case = make_case("triton", lens=(21,), kv_heads=1, group=1, head_dim=32)
    wide = torch.nn.functional.pad(case.block_table, (0, 200), value=-1)
    q, storage, _, lens, scale = case.arguments
    out = int8_paged_decode_attention(q, storage, wide, lens, scale)
    torch.testing.assert_close(out, int8_paged_decode_attention(*case.arguments), rtol=1e-6, atol=1e-6)


def reserved(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros over reserved addresses; only pages that are written take memory, on the CPU."""
    if DEVICE.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    count = int(np.prod(shape))
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_blocks_past_2_to_the_31_elements(kv_heads: int) -> None:
    """The last blocks of pools of 2**31 elements and more per head, without allocating them."""
    block_size, head_dim = 16, 128
    num_blocks = 2**31 // (block_size * head_dim) + 5
    slots = (kv_heads, num_blocks, block_size)
    storage = KvCacheQuant(
        k=reserved((*slots, head_dim), torch.int8),
        v=reserved((*slots, head_dim), torch.int8),
        k_scales=reserved(slots, torch.float16),
        v_scales=reserved(slots, torch.float16),
        backend="triton",
        tile_order="v_transposed",
    )
    table = torch.tensor([[num_blocks - 1, num_blocks - 3]], dtype=torch.int32, device=DEVICE)
    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, kv_heads, 30, head_dim, generator=rng).to(DEVICE) for _ in range(2))
    q = torch.randn(1, kv_heads, 1, head_dim, generator=rng).to(DEVICE)
    lens = torch.tensor([30], dtype=torch.int32, device=DEVICE)
    int8_kv_append_paged(k, v, storage, table, torch.zeros_like(lens))
    k_stored, v_stored = gather_dense(storage, table, lens, stop=30)
    torch.testing.assert_close(k_stored, k, rtol=0, atol=float(k.abs().max()) / 200)
    torch.testing.assert_close(v_stored, v, rtol=0, atol=float(v.abs().max()) / 200)
    out = int8_paged_decode_attention(q, storage, table, lens, head_dim**-0.5)
    want = torch.nn.functional.scaled_dot_product_attention(q, k_stored, v_stored)
    assert (out - want).norm() <= ROW_ERROR * want.norm()


@pytest.mark.parametrize("head_dim", [1, 5, 40, 72, 200])
def test_head_dims_that_no_vector_fits(head_dim: int) -> None:
    case = make_case("triton", lens=(37,), group=2, head_dim=head_dim)
    want = dense_attention(case)
    out = int8_paged_decode_attention(*case.arguments).double().cpu().numpy()
    assert np.linalg.norm(out - want) <= ROW_ERROR * np.linalg.norm(want)


@pytest.mark.parametrize("rotation", [None, "hadamard"])
def test_the_variant_without_int8_products_is_exact(monkeypatch, rotation: str | None) -> None:
    monkeypatch.setattr(triton_backend, "multiplies_int8", lambda chip: False)
    case = make_case("triton", lens=(150, 33), kv_heads=1, group=3, head_dim=80, rotation=rotation, edit=outlier_query)
    want = dense_attention(case)
    out = int8_paged_decode_attention(*case.arguments).double().cpu().numpy()
    # Two float16 terms carry 21 bits.
    assert (np.linalg.norm(out - want, axis=-1) <= 2e-5 * np.linalg.norm(want, axis=-1)).all()


def spread(x: torch.Tensor, axis: int, stride: int) -> torch.Tensor:
    """``x``, its elements along ``axis`` that many apart, over reserved addresses."""
    strides = list(x.stride())
    strides[axis] = stride
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides))
    return reserved((extent,), x.dtype).as_strided(x.shape, strides).copy_(x)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="takes gigabytes where nothing can be reserved only")
@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["batch", "head", "row", "element"])
def test_strides_whose_products_pass_2_to_the_31(axis: int) -> None:
    """A step along one axis, taken two times or more, leaves 32 bits; each step alone does not."""
    batch, heads, rows = (3 if axis == i else 1 for i in range(3))
    case = make_case("triton", lens=(20,) * batch, kv_heads=heads, head_dim=4, q_len=rows)
    stride = 2**30 + 2**20 + 16
    new = [torch.randn(batch, heads, rows, 4, generator=torch.Generator().manual_seed(i)).half() for i in range(2)]
    q, storage, table, lens, scale = case.arguments
    q = q.half()
    wide_q, *wide_new = (spread(x, axis, stride) for x in (q, *new))
    int8_kv_append_paged(*new, storage, table, lens - rows)
    answers = []
    for queries, keys, values in ((q, *new), (wide_q, *wide_new)):
        out = torch.empty_like(q)
        triton_backend.attend(out, queries, storage, Tokens.at(table, lens), Scoring(scale), (keys, values))
        int8_kv_append_paged(keys, values, storage, table, lens - rows)
        decoded = int8_paged_decode_attention(queries, storage, table, lens, scale)
        answers.append((out, decoded, *gather_dense(storage, table, lens)))
    for narrow, wide in zip(*answers):
        assert torch.equal(narrow, wide)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="takes gigabytes where nothing can be reserved only")
def test_a_mask_whose_rows_lie_past_2_to_the_31() -> None:
    case = make_case("triton", lens=(20, 21, 22), kv_heads=1, head_dim=32, key_mask=0.5)
    narrow = int8_paged_decode_attention(*case.arguments, **case.options)
    case.options["key_mask"] = spread(case.options["key_mask"], 0, 2**30 + 2**20 + 16)
    assert torch.equal(int8_paged_decode_attention(*case.arguments, **case.options), narrow)
