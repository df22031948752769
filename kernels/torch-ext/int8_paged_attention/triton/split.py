"""The first launch of decode attention: each program takes a split of the context, in the integer domain."""

# ruff: noqa: RUF005 (Triton compiles no starred tuple displays)

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LOG2_E, block_ids, exponent_shift, hadamard, tanh
from .tiles import (
    PART,
    TOKENS,
    groups_to_columns,
    key_scores,
    load_scales,
    load_value_part,
    query_part,
    split_query,
    split_weights,
    tokens_of_columns,
    weighted_values,
)

#: Warps of a program; each is a stream of its own.
STREAMS = 4
#: Tokens that a program reads per iteration.
CHUNK = STREAMS * TOKENS.value


@triton.jit(
    do_not_specialize=(
        "num_blocks",
        "table_width",
        "table_stride",
        "key_mask_start",
        "key_mask_width",
        "key_mask_stride",
        "window",
    ),
    do_not_specialize_on_alignment=("key_mask_ptr",),
)
def decode_kernel(
    partial_ptr,  # float32: sums of values, not yet divided, [batch * q_heads * q_len, splits, V_DIM], and after them
    # [batch * q_heads * q_len, splits, 2]: base-2 maximum and denominator
    q_ptr,  # [batch, q_heads, q_len, HEAD_DIM]
    k_ptr,  # [kv_heads, num_blocks, BLOCK_SIZE, HEAD_DIM]
    v_ptr,  # [kv_heads, num_blocks, V_DIM, BLOCK_SIZE]
    k_scales_ptr,  # [kv_heads, num_blocks, BLOCK_SIZE]
    v_scales_ptr,
    key_center_ptr,  # [kv_heads, HEAD_DIM], or None where scores are only compared
    block_table_ptr,  # [batch, table_width]
    context_lens_ptr,  # [batch]
    kv_start_ptr,
    key_mask_ptr,
    scale,
    softcap,
    q_len,
    num_blocks,
    table_width,
    key_mask_start,
    key_mask_width,
    window,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    q_dim_stride,
    k_head_stride,
    v_head_stride,
    k_scale_head_stride,
    v_scale_head_stride,
    table_stride,
    key_mask_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # HEAD_DIM, rounded up to a power of two, at least PART
    V_PART: tl.constexpr,  # elements of V per product, at most PART
    ROTATED: tl.constexpr,  # size of the Hadamard blocks, 1 without rotation
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # query rows of this program, 8 or 16
    STREAMS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INTEGER: tl.constexpr,
):
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    row_tiles = (GROUP * q_len + ROWS - 1) // ROWS
    head, row_tile = (tl.program_id(1) // row_tiles).to(tl.int64), tl.program_id(1) % row_tiles
    num_q_heads = tl.num_programs(1) // row_tiles * GROUP
    sequence = tl.program_id(2).to(tl.int64)
    chunk_tokens: tl.constexpr = STREAMS * TOKENS
    groups_per_block: tl.constexpr = BLOCK_SIZE // 16
    parts: tl.constexpr = (HEAD_DIM + PART - 1) // PART
    v_parts: tl.constexpr = (V_DIM + V_PART - 1) // V_PART
    # An unrotated query may have outliers that take the precision of its other elements.
    third_term: tl.constexpr = INTEGER and ROTATED == 1

    # The positions that some row sees lie in [first, length), those that all rows see in [first_by_all, oldest].
    length = tl.load(context_lens_ptr + sequence)
    oldest = length - q_len
    first = 0
    if kv_start_ptr is not None:
        first = tl.maximum(tl.load(kv_start_ptr + sequence), 0)
    first_by_all = first
    if HAS_WINDOW:
        first_by_all = tl.maximum(first, length - window)
        first = tl.maximum(first, oldest - window + 1)
    begin = first // 16 * 16
    chunks = tl.maximum(length - begin + chunk_tokens - 1, 0) // chunk_tokens
    share = (chunks + num_splits - 1) // num_splits
    chunk_end = tl.minimum((split + 1) * share, chunks)

    rows = row_tile * ROWS + tl.arange(0, 2 * ROWS) % ROWS
    dims = tl.arange(0, DIMS)
    q_ptrs = (
        q_ptr + sequence * q_batch_stride + (head * GROUP + rows // q_len) * q_head_stride + rows % q_len * q_row_stride
    )
    q_mask = (rows < GROUP * q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptrs[:, None] + dims[None, :] * q_dim_stride, mask=q_mask, other=0.0).to(tl.float32)
    log2_scale = scale
    if not HAS_SOFTCAP:
        log2_scale *= LOG2_E
    if key_center_ptr is not None:
        center = tl.load(key_center_ptr + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        bias = rows_of_terms(tl.sum(q * center[None, :], axis=1) * log2_scale, ROWS)
    if ROTATED > 1:
        q = hadamard(q, 2 * ROWS, DIMS, ROTATED)
    terms, rest, unit = split_query(q, ROWS, third_term, INTEGER)
    unit = rows_of_terms(unit * log2_scale, ROWS)
    q_parts = ()
    rest_parts = ()
    for part in tl.static_range(parts):
        q_parts = q_parts + (query_part(terms, part, STREAMS, ROWS, DIMS),)  # type: ignore[assignment]
        rest_parts = rest_parts + (query_part(rest, part, STREAMS, ROWS, DIMS),)  # type: ignore[assignment]

    k_ptr += head * k_head_stride
    v_ptr += head * v_head_stride
    k_scales_ptr += head * k_scale_head_stride
    v_scales_ptr += head * v_scale_head_stride
    table_row_ptr = block_table_ptr + sequence * table_stride
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    stream = tl.arange(0, STREAMS)
    c = tl.arange(0, 8)
    highest = tl.full((STREAMS, ROWS), float("-inf"), tl.float32)
    total = tl.zeros((STREAMS, ROWS), tl.float32)
    sums = ()
    for _part in tl.static_range(v_parts):
        sums = sums + (tl.zeros((STREAMS, ROWS, V_PART), tl.float32),)  # type: ignore[assignment]
    for chunk in range(split * share, chunk_end):
        start = begin + chunk * chunk_tokens
        stream_start = start + stream * TOKENS
        groups = stream_start[:, None] // 16 + (c // 2)[None, :]
        ids, there = block_ids(
            table_row_ptr, groups // groups_per_block, groups < table_width * groups_per_block, num_blocks
        )
        # A hole's K and V are read from block 0, as masks would cost a register move per four bytes: their weight is 0.
        k_base = k_ptr + (ids * BLOCK_SIZE + groups % groups_per_block * 16 + (c % 2)[None, :]) * HEAD_DIM
        scores = key_scores(
            q_parts, rest_parts, k_base, STREAMS, ROWS, HEAD_DIM, parts, third_term, INTEGER
        )  # [STREAMS, ROWS, TOKENS]

        groups = stream_start[:, None] // 16 + tl.arange(0, 4)[None, :]
        ids, there = block_ids(
            table_row_ptr, groups // groups_per_block, groups < table_width * groups_per_block, num_blocks
        )
        slots = groups % groups_per_block * 16
        k_scales = load_scales(k_scales_ptr, ids * BLOCK_SIZE + slots, there, STREAMS, ROWS)
        v_scales = load_scales(v_scales_ptr, ids * BLOCK_SIZE + slots, there, STREAMS, ROWS)
        # A faulty value row is seen by the queries whose score it spoils, and by no others.
        scores *= (k_scales + v_scales * 0.0) * unit[None, :, None]
        if key_center_ptr is not None:
            scores += bias[None, :, None]
        if HAS_SOFTCAP:
            scores = softcap * LOG2_E * tanh(scores / softcap)

        tokens = stream_start[:, None] + tokens_of_columns()[None, :]
        exists = groups_to_columns(there, STREAMS)
        if key_mask_ptr is not None:
            columns = tokens - key_mask_start
            known = (columns >= 0) & (columns < key_mask_width)
            exists &= tl.load(key_mask_ptr + sequence * key_mask_stride + columns, mask=known, other=0) != 0
            v_scales = tl.where(exists[:, None, :], v_scales, 0.0)
        scores = tl.where(exists[:, None, :], scores, float("-inf"))
        # This comparison, and `first` loaded again with a third term, keep three programs on a multiprocessor of sm_90.
        if (start < first_by_all) | (oldest < start + chunk_tokens - 1):
            position = oldest + rows % q_len
            least = first
            if third_term and kv_start_ptr is not None:
                least = tl.load(kv_start_ptr + sequence)
            visible = (tokens >= least)[:, None, :] & (tokens[:, None, :] <= position[None, :, None])
            if HAS_WINDOW:
                visible &= tokens[:, None, :] > (position - window)[None, :, None]
            scores = tl.where(visible, scores, float("-inf"))
            v_scales = tl.where(visible, v_scales, 0.0)

        new_highest = tl.maximum(highest, tl.max(scores, axis=2))
        shift = exponent_shift(new_highest)
        decay = tl.exp2(highest - shift)
        highest = new_highest
        weights = tl.exp2(scores - shift[:, :, None])
        total = total * decay + tl.sum(weights, axis=2)
        p_terms, p_unit = split_weights(weights * v_scales, STREAMS, ROWS, INTEGER)
        v_base = v_ptr + ids * (BLOCK_SIZE * V_DIM) + slots
        new_sums = ()
        for j in tl.static_range(v_parts):
            v = load_value_part(v_base, j, STREAMS, V_DIM, V_PART, BLOCK_SIZE)
            new = weighted_values(p_terms, v, STREAMS, ROWS, V_PART, INTEGER) * p_unit[:, :, None]
            new_sums = new_sums + (sums[j] * decay[:, :, None] + new,)  # type: ignore[assignment]
        sums = new_sums

    # The streams meet.
    top = tl.max(highest, axis=0)
    weight = tl.exp2(highest - exponent_shift(top)[None, :])
    row_exists = rows < GROUP * q_len
    stats_ptr = partial_ptr + tl.num_programs(2).to(tl.int64) * num_q_heads * q_len * num_splits * V_DIM
    partial_rows = ((sequence * num_q_heads + head * GROUP) * q_len + rows) * num_splits + split
    tl.store(stats_ptr + partial_rows * 2, top, mask=row_exists)
    tl.store(stats_ptr + partial_rows * 2 + 1, tl.sum(total * weight, axis=0), mask=row_exists)
    for part in tl.static_range(v_parts):
        v_dims = part * V_PART + tl.arange(0, V_PART)
        joined = tl.sum(sums[part] * weight[:, :, None], axis=0)
        stored = row_exists[:, None] & (v_dims < V_DIM)[None, :]
        tl.store(partial_ptr + partial_rows[:, None] * V_DIM + v_dims[None, :], joined, mask=stored)


@triton.jit
def rows_of_terms(x, ROWS: tl.constexpr):
    """``[2 * ROWS]``, the same rows twice -> ``[ROWS]``."""
    return tl.max(tl.reshape(x, (2, ROWS)), axis=0)
