"""Exact transforms that take outliers out of a row before it is quantized with a single scale.

* Rotation: keys and values are multiplied by an orthonormal Hadamard matrix, queries likewise (q.k does
  not change), and the output is rotated back.
* Key centring: a fixed vector per head is subtracted from every key. It lowers all scores of a query
  by the same amount, which softmax does not see.

New rows, queries and outputs pass through one function each, in one order of float32 operations, so that every
backend that follows it produces the same bits.
"""

from __future__ import annotations

import math

import torch

from .storage import KvCacheQuant

ROTATIONS = ("hadamard",)


def hadamard_block(head_dim: int) -> int:
    """Size of the Hadamard blocks on the diagonal: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Multiply the rows of ``x`` (``[..., head_dim]``, float32 or float64) by the orthonormal Hadamard matrix.

    Fast Walsh-Hadamard transform: butterflies ``(a + b, a - b)`` at distance 1, 2, 4, ..., then one
    multiplication by ``1 / sqrt(n)``. The matrix is symmetric, so the function is its own inverse. Where
    ``head_dim`` is no power of two, the matrix is block-diagonal (`hadamard_block`).
    """
    n = hadamard_block(x.shape[-1])
    distance = 1
    y = x
    while distance < n:
        pairs = y.reshape(*x.shape[:-1], x.shape[-1] // (2 * distance), 2, distance)
        a, b = pairs.unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        distance *= 2
    return y * torch.tensor(1 / math.sqrt(n), dtype=x.dtype, device=x.device)


def mean_key(k: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of key rows ``[batch, num_kv_heads, tokens, head_dim]``, float32 ``[num_kv_heads, head_dim]``.

    Rows with NaN or infinity are left out: a fault in one row, or what attention made of padding, must not reach
    others. So are those of padding, False in ``tokens``, bool ``[batch, tokens]``.
    """
    rows = k.detach().to(torch.float32)
    counted = torch.isfinite(rows).all(dim=-1, keepdim=True)
    if tokens is not None:
        counted &= tokens[:, None, :, None]
    total = torch.where(counted, rows, 0.0).sum(dim=(0, 2))
    return total / counted.sum(dim=(0, 2)).clamp(min=1)


def condition_keys(k: torch.Tensor, storage: KvCacheQuant) -> torch.Tensor:
    """Float32 key rows ``[batch, num_kv_heads, tokens, head_dim]`` as they are quantized."""
    if storage.key_center is not None:
        k = k - storage.key_center[:, None]
    return hadamard(k) if storage.rotation else k


def condition_values(v: torch.Tensor, storage: KvCacheQuant) -> torch.Tensor:
    """Float32 value rows as they are quantized."""
    return hadamard(v) if storage.rotation else v


def condition_query(q: torch.Tensor, storage: KvCacheQuant) -> torch.Tensor:
    """Queries ``[..., head_dim]`` that score the stored keys as the original queries score the original ones."""
    return hadamard(q) if storage.rotation else q


def restore_output(out: torch.Tensor, storage: KvCacheQuant) -> torch.Tensor:
    """Weighted sums of stored values ``[..., v_head_dim]`` -> weighted sums of the original values."""
    return hadamard(out) if storage.rotation else out


def restore_keys(k: torch.Tensor, storage: KvCacheQuant) -> torch.Tensor:
    """Dequantized stored keys ``[batch, num_kv_heads, tokens, head_dim]`` -> keys as the model computed them."""
    k = hadamard(k) if storage.rotation else k
    return k if storage.key_center is None else k + storage.key_center[:, None]
