"""Rotation and key centring are exact: they change what is quantized, not what attention computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_int8_paged.kernels import alloc_paged_int8_layer, int8_kv_append_paged, int8_paged_decode_attention
from hf_int8_paged.kernels.conditioning import hadamard, hadamard_block

from .helpers import device_of, hadamard_matrix, int32_on


@pytest.mark.parametrize(("dim", "block"), [(1, 1), (7, 1), (20, 4), (32, 32), (80, 16), (96, 32), (256, 256)])
def test_hadamard_is_the_block_diagonal_matrix_of_the_largest_power_of_two(dim: int, block: int) -> None:
    assert hadamard_block(dim) == block
    matrix = hadamard(torch.eye(dim, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(matrix, hadamard_matrix(dim), atol=1e-15)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-14)


@pytest.mark.parametrize("dim", [32, 80, 96, 128, 256])
def test_hadamard_undoes_itself(dim: int) -> None:
    x = torch.randn(5, 3, dim, generator=torch.Generator().manual_seed(0))
    # log2(dim) butterflies and a factor each way, each off by half an ulp of the row's norm.
    bound = 2 * (np.log2(dim) + 1) * 2.0**-24 * x.norm(dim=-1, keepdim=True)
    assert ((hadamard(hadamard(x)) - x).abs() <= bound).all()


def decode_error(backend: str, *, rotation: str | None, center: bool, softcap: float | None) -> float:
    """Mean error of decode attention against attention over the rows before they were quantized, which have a large
    mean and an outlier channel, as the keys of real models do."""
    rng, tokens, dim = np.random.default_rng(0), 100, 64
    k, v, q = (rng.standard_normal((1, heads, n, dim)) for heads, n in ((2, tokens), (2, tokens), (4, 1)))
    k += rng.standard_normal((1, 2, 1, dim)) * 3
    k[..., 5] += 30
    q[..., 5] /= 10
    v[..., 9] *= 20
    device = device_of(backend)
    conditioning = {"rotation": rotation, "center_keys": center}
    storage = alloc_paged_int8_layer(7, 16, 2, dim, device=device, backend=backend, **conditioning)
    if storage.key_center is not None:
        storage.key_center.copy_(torch.from_numpy(k[0].mean(1)))
    new_k, new_v, new_q = (torch.from_numpy(x).float().to(device) for x in (k, v, q))
    int32 = int32_on(backend)
    table, lens = torch.arange(7, **int32)[None], torch.tensor([tokens], **int32)
    int8_kv_append_paged(new_k, new_v, storage, table, lens - tokens)
    out = int8_paged_decode_attention(new_q, storage, table, lens, dim**-0.5, softcap=softcap)
    scores = np.einsum("bhqd,bhtd->bhqt", q, k.repeat(2, 1)) * dim**-0.5
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = weights / weights.sum(-1, keepdims=True) @ v.repeat(2, 1)
    return float(np.abs(out.double().cpu().numpy() - want).mean())


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_each_transform_lowers_the_error_of_rows_with_a_mean_and_an_outlier_channel(
    backend: str, softcap: float | None
) -> None:
    plain = decode_error(backend, rotation=None, center=False, softcap=softcap)
    rotated = decode_error(backend, rotation="hadamard", center=False, softcap=softcap)
    both = decode_error(backend, rotation="hadamard", center=True, softcap=softcap)
    # An outlier 20 to 30 times the rest costs about 3 of 7 bits; the transforms win about 2 back.
    assert both < rotated < plain / 2
    assert both < plain / 4
