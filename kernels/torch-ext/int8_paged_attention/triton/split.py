"""The first launch of decode attention: each program reads its share of the blocks, in the integer domain."""

# ruff: noqa: RUF005 (Triton compiles no starred tuple displays)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .primitives import LOG2_E, exponent_shift, tanh
from .query import parts_of_rest, query_parts, rotate_query, split_query
from .schedule import CHUNK, chunks_between, cut_evenly, positions_of, visible_tokens
from .tiles import (
    PART,
    TOKENS,
    find_groups,
    groups_to_columns,
    key_scores,
    load_value_part,
    scales_of_groups,
    split_weights,
    sum_of_streams,
    tokens_of_columns,
    value_base,
    weighted_values,
)


@triton.jit(
    do_not_specialize=(
        "batch",
        "kv_heads",
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
    partial_ptr,  # float32: sums of values, not yet divided, [slots, rows, V_DIM], and after them [slots, rows, 2]:
    # base-2 maximum and denominator; slots as `schedule` tells, rows those of a unit
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
    batch,
    kv_heads,
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
    table_stride,
    key_mask_stride,
    SEQUENCES: tl.constexpr,  # 1, or a power of two that is at least ``batch``
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # HEAD_DIM, rounded up to a power of two, at least PART
    V_PART: tl.constexpr,  # elements of V per product, at most PART
    V_FIRST: tl.constexpr,  # whether V is asked for before the product with K, which takes registers and saves trips
    ROTATED: tl.constexpr,  # size of the Hadamard blocks, 1 without rotation
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # query rows of a unit, 8 or 16
    STREAMS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INTEGER: tl.constexpr,
):
    parts: tl.constexpr = (HEAD_DIM + PART - 1) // PART
    v_parts: tl.constexpr = (V_DIM + V_PART - 1) // V_PART
    # An unrotated query may have outliers that take the precision of its other elements.
    third_term: tl.constexpr = INTEGER and ROTATED == 1
    # Scales that are asked for before the product with K stay in registers during it, and a third term leaves none; on
    # sm_80 it does (`query.parts_of_rest`).
    scales_first: tl.constexpr = V_FIRST or not third_term or not cuda_capability_geq(9)
    program, programs = tl.program_id(0), tl.num_programs(0)
    row_tiles = (GROUP * q_len + ROWS - 1) // ROWS
    units = kv_heads * row_tiles

    # This program's positions, and the sequence and unit that the first of them belongs to.
    positions, share, lead = cut_evenly(
        context_lens_ptr, kv_start_ptr, batch, units, programs, q_len, window, HAS_WINDOW, SEQUENCES
    )
    ends = tl.cumsum(positions, axis=0) * units
    position = program * share
    stop = tl.minimum(position + share, tl.max(ends, axis=0))
    sequence = tl.sum((ends <= position).to(tl.int32), axis=0)
    unit_start = tl.max(tl.where(ends <= position, ends, 0), axis=0)
    mine = tl.sum(tl.where(tl.arange(0, SEQUENCES) == sequence, positions, 0), axis=0)
    unit = (position - unit_start) // tl.maximum(mine, 1)
    unit_start += unit * mine

    stream = tl.arange(0, STREAMS)
    c = tl.arange(0, 8)
    rows_of_unit = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    log2_scale = scale
    if not HAS_SOFTCAP:
        log2_scale *= LOG2_E
    while position < stop:
        length, first, first_by_all = visible_tokens(
            context_lens_ptr, kv_start_ptr, sequence, True, q_len, window, HAS_WINDOW
        )
        oldest = length - q_len
        begin = first // 16 * 16
        chunks = chunks_between(first, length)
        chunk = tl.maximum(position - unit_start - lead, 0)
        chunk_end = tl.minimum(stop - unit_start - lead, chunks)
        if chunk < chunk_end:
            head, row_tile = (unit // row_tiles).to(tl.int64), unit % row_tiles
            rows = row_tile * ROWS + rows_of_unit
            q_ptrs = q_ptr + sequence.to(tl.int64) * q_batch_stride
            q_ptrs += (head * GROUP + rows // q_len) * q_head_stride + rows % q_len * q_row_stride
            q_mask = (rows < GROUP * q_len)[:, None] & (dims < HEAD_DIM)[None, :]
            q = tl.load(q_ptrs[:, None] + dims[None, :] * q_dim_stride, mask=q_mask, other=0.0).to(tl.float32)
            if key_center_ptr is not None:
                center = tl.load(key_center_ptr + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
                bias = tl.sum(q * center[None, :], axis=1) * log2_scale
            if ROTATED > 1:
                # A thread loads 16 bytes of a row, or less where there are more threads than that.
                in_thread: tl.constexpr = min(
                    128 // q_ptr.dtype.element_ty.primitive_bitwidth, ROWS * DIMS // (32 * STREAMS)
                )
                q = rotate_query(q, ROWS, DIMS, ROTATED, in_thread)
            terms, left, unit_of_scores = split_query(q, ROWS, DIMS, third_term, INTEGER)
            unit_of_scores *= log2_scale
            q_parts = query_parts(terms, STREAMS, ROWS, DIMS)
            left_parts = q_parts
            if third_term:
                left_parts = parts_of_rest(left, STREAMS, ROWS, DIMS)

            first_block = unit // row_tiles * num_blocks
            table_row_ptr = block_table_ptr + sequence.to(tl.int64) * table_stride
            highest = tl.full((STREAMS, ROWS), float("-inf"), tl.float32)
            total = tl.zeros((STREAMS, ROWS), tl.float32)
            sums = ()
            for _part in tl.static_range(v_parts):
                sums = sums + (tl.zeros((STREAMS, ROWS, V_PART), tl.float32),)  # type: ignore[assignment]
            for chunk_index in range(chunk, chunk_end):
                start = begin + chunk_index * CHUNK
                stream_start = start + stream * TOKENS
                if scales_first:
                    places, there = find_groups(
                        table_row_ptr, stream_start[:, None] // 16 + tl.arange(0, 4)[None, :], table_width, num_blocks,
                        first_block, BLOCK_SIZE,
                    )  # fmt: skip
                    k_scales, v_scales = scales_of_groups(k_scales_ptr, v_scales_ptr, places, there, STREAMS, ROWS)
                if V_FIRST:
                    v_base = value_base(v_ptr, places, V_DIM, BLOCK_SIZE)
                    values = ()
                    for j in tl.static_range(v_parts):
                        values = values + (load_value_part(v_base, j, STREAMS, V_DIM, V_PART, BLOCK_SIZE),)  # type: ignore[assignment]
                k_groups = stream_start[:, None] // 16 + (c // 2)[None, :]
                k_places, _ = find_groups(table_row_ptr, k_groups, table_width, num_blocks, first_block, BLOCK_SIZE)
                # A hole's K and V are read from block 0, as masks would cost a register move per four bytes: their
                # weight is 0.
                k_base = k_ptr + (k_places.to(tl.int64) * 16 + (c % 2)[None, :]) * HEAD_DIM
                scores = key_scores(
                    q_parts, left_parts, k_base, STREAMS, ROWS, HEAD_DIM, parts, third_term, INTEGER
                )  # [STREAMS, ROWS, TOKENS]
                if not scales_first:
                    places, there = find_groups(
                        table_row_ptr, stream_start[:, None] // 16 + tl.arange(0, 4)[None, :], table_width, num_blocks,
                        first_block, BLOCK_SIZE,
                    )  # fmt: skip
                    k_scales, v_scales = scales_of_groups(k_scales_ptr, v_scales_ptr, places, there, STREAMS, ROWS)
                # A faulty value row is seen by the queries whose score it spoils, and by no others.
                scores *= (k_scales + v_scales * 0.0) * unit_of_scores[None, :, None]
                if key_center_ptr is not None:
                    scores += bias[None, :, None]
                if HAS_SOFTCAP:
                    scores = softcap * LOG2_E * tanh(scores / softcap)

                tokens = stream_start[:, None] + tokens_of_columns()[None, :]
                exists = groups_to_columns(there, STREAMS)
                if key_mask_ptr is not None:
                    columns = tokens - key_mask_start
                    known = (columns >= 0) & (columns < key_mask_width)
                    mask_row_ptr = key_mask_ptr + sequence.to(tl.int64) * key_mask_stride
                    exists &= tl.load(mask_row_ptr + columns, mask=known, other=0) != 0
                    v_scales = tl.where(exists[:, None, :], v_scales, 0.0)
                scores = tl.where(exists[:, None, :], scores, float("-inf"))
                if (start < first_by_all) | (oldest < start + CHUNK - 1):
                    row_positions = oldest + rows % q_len
                    visible = (tokens >= first)[:, None, :] & (tokens[:, None, :] <= row_positions[None, :, None])
                    if HAS_WINDOW:
                        visible &= tokens[:, None, :] > (row_positions - window)[None, :, None]
                    scores = tl.where(visible, scores, float("-inf"))
                    v_scales = tl.where(visible, v_scales, 0.0)

                new_highest = tl.maximum(highest, tl.max(scores, axis=2))
                shift = exponent_shift(new_highest)
                decay = tl.exp2(highest - shift)
                highest = new_highest
                weights = tl.exp2(scores - shift[:, :, None])
                total = total * decay + tl.sum(weights, axis=2)
                p_terms, p_unit = split_weights(weights * v_scales, STREAMS, ROWS, INTEGER)
                if not V_FIRST:
                    v_base = value_base(v_ptr, places, V_DIM, BLOCK_SIZE)
                new_sums = ()
                for j in tl.static_range(v_parts):
                    v = values[j] if V_FIRST else load_value_part(v_base, j, STREAMS, V_DIM, V_PART, BLOCK_SIZE)
                    new = weighted_values(p_terms, v, STREAMS, ROWS, V_PART, INTEGER) * p_unit[:, :, None]
                    new_sums = new_sums + (sums[j] * decay[:, :, None] + new,)  # type: ignore[assignment]
                sums = new_sums

            # The streams meet.
            top = tl.max(highest, axis=0)
            weight = tl.exp2(highest - exponent_shift(top)[None, :])
            row_exists = rows < GROUP * q_len
            rows_kept = tl.minimum(GROUP * q_len, ROWS).to(tl.int64)
            partial_rows = (program + sequence * units + unit) * rows_kept + rows_of_unit
            stats_ptr = partial_ptr + (programs + batch * units - 1) * rows_kept * V_DIM
            tl.store(stats_ptr + partial_rows * 2, top, mask=row_exists)
            tl.store(stats_ptr + partial_rows * 2 + 1, tl.sum(total * weight, axis=0), mask=row_exists)
            for part in tl.static_range(v_parts):
                v_dims = part * V_PART + tl.arange(0, V_PART)
                joined = sum_of_streams(sums[part] * weight[:, :, None], ROWS, V_PART)
                stored = row_exists[:, None] & (v_dims < V_DIM)[None, :]
                tl.store(partial_ptr + partial_rows[:, None] * V_DIM + v_dims[None, :], joined, mask=stored)

        unit_start += positions_of(chunks, share, lead)
        position = unit_start
        unit += 1
        if unit == units:
            unit = 0
            sequence += 1
