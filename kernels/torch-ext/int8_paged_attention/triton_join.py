"""The second launch of decode attention: it joins the splits of the context."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .conditioning import hadamard_block
from .triton_primitives import LOG2_E, exponent_shift, hadamard


@triton.jit
def reduce_kernel(
    out_ptr,  # [batch, q_heads, q_len, V_DIM]
    partial_ptr,  # as the decode kernel leaves it
    sinks_ptr,  # [q_heads]
    num_q_heads,
    q_len,
    num_splits,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    V_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # V_DIM, rounded up to a power of two
    ROTATED: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
):
    """Join the splits of one query row, apply its sink, divide, rotate back."""
    row = tl.program_id(0).to(tl.int64)
    head = row // q_len % num_q_heads
    stats_ptr = partial_ptr + tl.num_programs(0).to(tl.int64) * num_splits * V_DIM
    dims = tl.arange(0, DIMS)
    splits = tl.arange(0, SPLIT_TILE)
    top = float("-inf")
    total = 0.0
    if sinks_ptr is not None:
        top = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        total = 1.0
    acc = tl.zeros((DIMS,), tl.float32)
    for first in range(0, num_splits, SPLIT_TILE):
        valid = first + splits < num_splits
        at = row * num_splits + first + splits
        tops = tl.load(stats_ptr + at * 2, mask=valid, other=float("-inf"))
        totals = tl.load(stats_ptr + at * 2 + 1, mask=valid, other=0.0)
        mask = valid[:, None] & (dims < V_DIM)[None, :]
        parts = tl.load(partial_ptr + at[:, None] * V_DIM + dims[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        shift = exponent_shift(new_top)
        weights = tl.exp2(tops - shift)
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(totals * weights, axis=0)
        acc = acc * decay + tl.sum(parts * weights[:, None], axis=0)
        top = new_top
    out = acc / tl.where(total == 0.0, 1.0, total)
    if ROTATED > 1:
        out = tl.reshape(hadamard(tl.reshape(out, (1, DIMS)), 1, DIMS, ROTATED), (DIMS,))
    out_row_ptr = out_ptr + row // (q_len * num_q_heads) * out_batch_stride + head * out_head_stride
    out_row_ptr += row % q_len * out_row_stride
    tl.store(out_row_ptr + dims, out.to(out_ptr.dtype.element_ty), mask=dims < V_DIM)


@functools.lru_cache(maxsize=1024)
def join_constants(v_dim: int, rotated: bool) -> dict[str, Any]:
    return dict(
        V_DIM=v_dim,
        DIMS=triton.next_power_of_2(v_dim),
        ROTATED=hadamard_block(v_dim) if rotated else 1,
        SPLIT_TILE=16,
        num_warps=4,
        enable_fp_fusion=True,
    )


def launch_join(
    out: torch.Tensor, partial: torch.Tensor, sinks: torch.Tensor | None, num_splits: int, rotated: bool
) -> None:
    """Write ``out`` ``[batch, num_q_heads, q_len, v_head_dim]`` from the sums that the splits have left."""
    batch, num_q_heads, q_len, v_dim = out.shape
    reduce_kernel[(batch * num_q_heads * q_len,)](
        out,
        partial,
        sinks,
        num_q_heads,
        q_len,
        num_splits,
        *out.stride()[:3],
        **join_constants(v_dim, rotated),
    )
