"""Append in Triton: condition and quantize new keys and values and write them into their slots, in one launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..calls import Tokens
from ..conditioning import hadamard_block
from ..layouts import check_append
from ..storage import KvCacheQuant
from .layouts import NOTE, Rows, in_32_bits, layer_of, tokens_of
from .primitives import hadamard, quantize_rows


@triton.jit(do_not_specialize=("new_tokens", "num_blocks", "table_width", "table_stride"))
def append_kernel(
    k_ptr,  # [kv_heads, num_blocks, BLOCK_SIZE, HEAD_DIM]
    v_ptr,  # [kv_heads, num_blocks, V_DIM, BLOCK_SIZE]
    k_scales_ptr,  # [kv_heads, num_blocks, BLOCK_SIZE]
    v_scales_ptr,
    k_new_ptr,  # [batch, kv_heads, new_tokens, HEAD_DIM]
    v_new_ptr,  # [batch, kv_heads, new_tokens, V_DIM]
    key_center_ptr,  # [kv_heads, HEAD_DIM] or None
    block_table_ptr,  # [batch, table_width]
    context_lens_before_ptr,  # [batch]
    new_tokens,
    num_blocks,
    table_width,
    k_head_stride,
    v_head_stride,
    k_scale_head_stride,
    v_scale_head_stride,
    k_new_batch_stride,
    k_new_head_stride,
    k_new_token_stride,
    k_new_dim_stride,
    v_new_batch_stride,
    v_new_head_stride,
    v_new_token_stride,
    v_new_dim_stride,
    table_stride,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_DIMS: tl.constexpr,  # HEAD_DIM, rounded up to a power of two
    V_DIMS: tl.constexpr,
    K_ROTATED: tl.constexpr,  # size of the Hadamard blocks, 1 without rotation
    V_ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program quantizes TOKENS rows of K and the same rows of V of one head."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    positions = tl.load(context_lens_before_ptr + sequence) + tokens
    logical = positions // BLOCK_SIZE
    covered = (tokens < new_tokens) & (positions >= 0) & (logical < table_width)
    blocks = tl.load(block_table_ptr + sequence * table_stride + logical, mask=covered, other=-1)
    kept = (blocks >= 0) & (blocks < num_blocks)
    blocks = blocks.to(tl.int64)
    slots = positions % BLOCK_SIZE
    tokens = tokens.to(tl.int64)

    dims = tl.arange(0, K_DIMS)
    mask = kept[:, None] & (dims < HEAD_DIM)[None, :]
    new_ptr = k_new_ptr + sequence * k_new_batch_stride + head * k_new_head_stride
    rows = tl.load(
        new_ptr + tokens[:, None] * k_new_token_stride + dims[None, :] * k_new_dim_stride, mask=mask, other=0.0
    )
    rows = rows.to(tl.float32)
    if key_center_ptr is not None:
        rows -= tl.load(key_center_ptr + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)[None, :]
    if K_ROTATED > 1:
        rows = hadamard(rows, TOKENS, K_DIMS, K_ROTATED)
    quantized, scales = quantize_rows(rows)
    tiles_ptr = k_ptr + head * k_head_stride + (blocks * BLOCK_SIZE + slots)[:, None] * HEAD_DIM
    tl.store(tiles_ptr + dims[None, :], quantized.to(tl.int8), mask=mask)
    tl.store(k_scales_ptr + head * k_scale_head_stride + blocks * BLOCK_SIZE + slots, scales, mask=kept)

    dims = tl.arange(0, V_DIMS)
    mask = kept[:, None] & (dims < V_DIM)[None, :]
    new_ptr = v_new_ptr + sequence * v_new_batch_stride + head * v_new_head_stride
    rows = tl.load(
        new_ptr + tokens[:, None] * v_new_token_stride + dims[None, :] * v_new_dim_stride, mask=mask, other=0.0
    )
    rows = rows.to(tl.float32)
    if V_ROTATED > 1:
        rows = hadamard(rows, TOKENS, V_DIMS, V_ROTATED)
    quantized, scales = quantize_rows(rows)
    tiles_ptr = v_ptr + head * v_head_stride + (blocks * (BLOCK_SIZE * V_DIM) + slots)[:, None]
    tl.store(tiles_ptr + dims[None, :] * BLOCK_SIZE, quantized.to(tl.int8), mask=mask)
    tl.store(v_scales_ptr + head * v_scale_head_stride + blocks * BLOCK_SIZE + slots, scales, mask=kept)


@functools.lru_cache(maxsize=1024)
def append_constants(kind: Rows, rows: int) -> dict[str, Any]:
    """The kernel's constants and options, worked out once per kind of call."""
    return dict(
        HEAD_DIM=kind.head_dim,
        V_DIM=kind.v_dim,
        K_DIMS=triton.next_power_of_2(kind.head_dim),
        V_DIMS=triton.next_power_of_2(kind.v_dim),
        K_ROTATED=hadamard_block(kind.head_dim) if kind.rotated else 1,
        V_ROTATED=hadamard_block(kind.v_dim) if kind.rotated else 1,
        BLOCK_SIZE=kind.block_size,
        TOKENS=rows,
        num_warps=4 if rows > 1 else 1,
        enable_fp_fusion=False,  # the bits are the contract
    )


def launch_append(k_new: torch.Tensor, v_new: torch.Tensor, storage: KvCacheQuant, tokens: Tokens) -> None:
    """`reference.append` on a GPU, one launch."""
    layout, kind, head_strides = storage.notes.get(NOTE) or layer_of(storage)
    held = tokens.notes.get(NOTE) or tokens_of(tokens)
    check_append(layout, held, k_new, v_new)
    k_new, v_new = in_32_bits(k_new), in_32_bits(v_new)
    batch, heads, new_tokens, _ = k_new.shape
    rows = 16 if new_tokens > 1 else 1
    append_kernel[(-(-new_tokens // rows), heads, batch)](
        storage.k,
        storage.v,
        storage.k_scales,
        storage.v_scales,
        k_new,
        v_new,
        storage.key_center,
        tokens.block_table,
        tokens.context_lens_before,
        new_tokens,
        layout.num_blocks,
        held.max_blocks,
        *head_strides,
        *k_new.stride(),
        *v_new.stride(),
        held.table_stride,
        **append_constants(kind, rows),
    )
