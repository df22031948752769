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
from .launch import launch
from .layouts import NOTE, Rows, in_32_bits, layer_of, tokens_of
from .rows import RUN, conditioned, elements, load_rows


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
    K_RUNS: tl.constexpr,  # runs of a row of K, rounded up to a power of two
    V_RUNS: tl.constexpr,
    K_ROTATED: tl.constexpr,  # size of the Hadamard blocks, 1 without rotation
    V_ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program takes one token, or those of a group of 16 positions, which lie together in a block.

    It quantizes their rows of K and V of one head.
    """
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(context_lens_before_ptr + sequence)
    first = (length // TOKENS + tl.program_id(0)) * TOKENS
    logical = first // BLOCK_SIZE
    covered = (first >= 0) & (first < length + new_tokens) & (logical < table_width)
    block = tl.load(block_table_ptr + sequence * table_stride + logical, mask=covered, other=-1)
    if (block >= 0) & (block < num_blocks):
        slots = tl.arange(0, TOKENS)
        tokens = first - length + slots
        # Those before the first new one are negative, and large as unsigned numbers.
        new = tokens.to(tl.uint32, bitcast=True) < new_tokens.to(tl.uint32)
        place = block.to(tl.int64) * BLOCK_SIZE + first % BLOCK_SIZE

        k_new_ptr += sequence * k_new_batch_stride + head * k_new_head_stride
        rows = load_rows(k_new_ptr, tokens, new, k_new_token_stride, k_new_dim_stride, HEAD_DIM, K_RUNS)
        dims = elements(K_RUNS)
        if key_center_ptr is not None:
            rows -= tl.load(key_center_ptr + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        values, scales = conditioned(rows, TOKENS, K_RUNS, K_ROTATED)
        tile_ptrs = k_ptr + head * k_head_stride + place * HEAD_DIM + slots[:, None, None] * HEAD_DIM + dims
        tl.store(tile_ptrs, values, mask=new[:, None, None] & (dims < HEAD_DIM))
        tl.store(k_scales_ptr + head * k_scale_head_stride + place + slots, scales, mask=new)

        v_new_ptr += sequence * v_new_batch_stride + head * v_new_head_stride
        rows = load_rows(v_new_ptr, tokens, new, v_new_token_stride, v_new_dim_stride, V_DIM, V_RUNS)
        dims = elements(V_RUNS)
        values, scales = conditioned(rows, TOKENS, V_RUNS, V_ROTATED)
        tile_ptr = v_ptr + head * v_head_stride + block.to(tl.int64) * (BLOCK_SIZE * V_DIM) + first % BLOCK_SIZE
        tile_ptrs = tile_ptr + dims * BLOCK_SIZE + slots[:, None, None]
        # A thread stores 16 tokens of an element at once, or where not all of them are new each by itself.
        whole = (first >= length) & (first + TOKENS <= length + new_tokens)
        mask = tl.broadcast_to(dims < tl.where(whole, V_DIM, 0), values.shape)
        tl.store(tile_ptrs, values, mask=tl.max_constancy(mask, (TOKENS, 1, 1)))
        if TOKENS > 1 and not whole:
            tl.store(tile_ptrs, values, mask=new[:, None, None] & (dims < V_DIM))
        tl.store(v_scales_ptr + head * v_scale_head_stride + place + slots, scales, mask=new)


@functools.lru_cache(maxsize=1024)
def append_constants(kind: Rows, rows: int) -> dict[str, Any]:
    """The kernel's constants and options, worked out once per kind of call."""
    return dict(
        HEAD_DIM=kind.head_dim,
        V_DIM=kind.v_dim,
        K_RUNS=triton.next_power_of_2(-(-kind.head_dim // RUN.value)),
        V_RUNS=triton.next_power_of_2(-(-kind.v_dim // RUN.value)),
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
    # Sequences may begin inside a group: this many groups hold their tokens wherever they begin.
    groups = (new_tokens - 2) // rows + 2 if rows > 1 else 1
    arguments = (
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
    )
    launch(append_kernel, (groups, heads, batch), arguments, **append_constants(kind, rows))
