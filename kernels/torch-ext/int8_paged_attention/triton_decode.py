"""Decode attention in Triton, in the integer domain: K and V are never converted to floating point.

How the tensors meet the matrix unit (``mma.m16n8k32`` on NVIDIA):

* A query row is split into two int8 terms, ``q ~ step * (256 * high + low)``. The high terms of a tile's rows and their
  low terms are two halves of one matrix operand, so one int8 product serves both. Where no rotation has spread a
  query's outliers, a third term follows in a second product. The softmax weights, times the scales of V, are split
  against the tile's maximum.
* The axis that a product sums over may be in any order, as long as both operands agree. The order is chosen such that
  the 16 consecutive bytes that a thread loads from memory are the bytes that the matrix unit wants in its registers:
  neither K nor V passes through shared memory, and the weights stay in the threads that computed them.
* Each warp is a stream of its own: it reads its own tokens and keeps its own softmax. Streams meet once, at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .storage import KvCacheQuant
from .triton_primitives import LOG2_E, block_ids, exponent_shift, round_half_even, tanh

#: Warps of a program.
STREAMS = 4
#: Programs that one multiprocessor should have at hand, to hide the latency of memory.
PROGRAMS_PER_PROCESSOR = 3
#: Tokens that one warp reads per iteration: four groups of 16, the runs of V that a thread loads at once.
TOKENS = 64
#: 256 * 127 + 127: the largest number that two int8 terms make.
STEPS = tl.constexpr(32639.0)
#: Below this a divisor counts as 0, so that no quotient overflows.
TINY = tl.constexpr(1e-30)


@triton.jit
def int8_term(steps, is_high):
    """One term of int32 ``steps = 256 * high + low``: the low one is the low byte with its sign."""
    return tl.where(is_high, (steps + 128) >> 8, steps).to(tl.int8)


@triton.jit
def split_query(q, ROWS: tl.constexpr):
    """Float32 ``[2 * ROWS, dim]``, the same rows twice -> two int8 operands of that shape.

    The first holds the high over the low terms of q in steps of its largest element, the second zeros over what is
    left of it, in 1/256 of a step.
    """
    largest = tl.max(tl.abs(q), axis=1)
    in_steps = q * tl.where(largest > TINY, STEPS / largest, 0.0)[:, None]
    steps = round_half_even(in_steps)
    is_high = tl.arange(0, 2 * ROWS)[:, None] < ROWS
    rest = tl.minimum(round_half_even((in_steps - steps) * 256.0), 127.0)
    return int8_term(steps.to(tl.int32), is_high), tl.where(is_high, 0.0, rest).to(tl.int8)


@triton.jit
def score_products(q_terms, q_rest, k, STREAMS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Products of all three terms of the queries with k, float32 ``[STREAMS, ROWS, TOKENS]``, in 1/256 of a step.

    The third term's product is added to 256 times the second's, which takes no accumulator of its own.
    """
    product = tl.dot(q_terms, k, out_dtype=tl.int32)
    product *= tl.where(tl.arange(0, 2 * ROWS) < ROWS, 1, 256)[None, :, None]
    product = tl.dot(q_rest, k, product, out_dtype=tl.int32)
    terms = tl.reshape(product, (STREAMS, 2, ROWS, TOKENS)).to(tl.float32)
    return tl.sum(terms * tl.where(tl.arange(0, 2) == 0, 65536.0, 1.0)[None, :, None, None], axis=1)


@triton.jit
def join_terms(product, STREAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``256 * high + low`` of an int32 product ``[STREAMS, 2 * ROWS, COLUMNS]``, as float32."""
    terms = tl.reshape(product, (STREAMS, 2, ROWS, COLUMNS))
    return tl.sum(terms * tl.where(tl.arange(0, 2) == 0, 256, 1)[None, :, None, None], axis=1).to(tl.float32)


@triton.jit
def load_scales(head_ptr, offsets, there, STREAMS: tl.constexpr, ROWS: tl.constexpr):
    """Float32 scales ``[STREAMS, ROWS, 64]``, columns as the first product has them, equal for all rows.

    A thread loads the 16 scales of its token group, offsets ``[STREAMS, 4]``, eight at a time.
    """
    part = tl.arange(0, 2)[:, None, None, None, None] * 8
    lane = tl.zeros((2, STREAMS, 8, 4, 8), tl.int32) + tl.arange(0, 8)[None, None, None, None, :]
    mask = tl.broadcast_to(there[None, :, None, :, None], lane.shape)
    scales = tl.load(((head_ptr + offsets)[None, :, None, :, None] + lane) + part, mask=mask, other=0.0)
    scales = tl.reshape(scales, (2, STREAMS, 8, 4, 4, 2))  # [part, stream, row, t, pair, byte]
    scales = tl.reshape(tl.permute(scales, (1, 2, 0, 4, 3, 5)), (STREAMS, 1, 8, 64))
    scales = tl.broadcast_to(scales, (STREAMS, ROWS // 8, 8, 64))
    return tl.reshape(scales, (STREAMS, ROWS, 64)).to(tl.float32)


@triton.jit
def decode_kernel(
    out_ptr,  # [batch, q_heads, q_len, V_DIM], or partial sums [batch * q_heads * q_len, splits, V_DIM]
    stats_ptr,  # [batch * q_heads * q_len, splits, 2]: base-2 maximum and denominator
    q_ptr,  # [batch, q_heads, q_len, HEAD_DIM]
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    block_table_ptr,  # [batch, table_width]
    context_lens_ptr,
    kv_start_ptr,
    key_mask_ptr,
    sinks_ptr,
    bias_ptr,  # [batch, q_heads, q_len] added to every score of a row, or None
    scale,
    softcap,
    q_len,
    num_blocks,
    table_width,
    key_mask_start,
    key_mask_width,
    window,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    q_dim_stride,
    k_head_stride,
    k_block_stride,
    v_head_stride,
    v_block_stride,
    k_scale_head_stride,
    k_scale_block_stride,
    v_scale_head_stride,
    v_scale_block_stride,
    table_stride,
    key_mask_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLICES: tl.constexpr,  # ceil(HEAD_DIM / 64), a power of two
    V_PARTS: tl.constexpr,  # ceil(V_DIM / 8), a power of two
    ROWS: tl.constexpr,  # query rows of this program, 8 or 16
    STREAMS: tl.constexpr,  # warps
    TOKENS: tl.constexpr,
    THIRD_TERM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,  # write partial sums
):
    tl.static_assert(TOKENS == 64)
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    row_tiles = (GROUP * q_len + ROWS - 1) // ROWS
    kv_head, row_tile = tl.program_id(1) // row_tiles, tl.program_id(1) % row_tiles
    sequence = tl.program_id(2).to(tl.int64)
    head64 = kv_head.to(tl.int64)
    num_q_heads = tl.num_programs(1) // row_tiles * GROUP

    # Which positions the rows of this program see at all, and which ones all of its rows see.
    length = tl.load(context_lens_ptr + sequence)
    oldest = length - q_len
    first, first_by_all = 0, 0
    if kv_start_ptr is not None:
        first = tl.maximum(tl.load(kv_start_ptr + sequence), 0)
        first_by_all = first
    if HAS_WINDOW:
        first = tl.maximum(first, oldest - window + 1)
        first_by_all = tl.maximum(first_by_all, length - window)
    last_by_all = oldest + 1

    # This split's share, in chunks of one tile per stream.
    begin = first // 16 * 16
    chunks = tl.maximum(length - begin + STREAMS * TOKENS - 1, 0) // (STREAMS * TOKENS)
    share = (chunks + num_splits - 1) // num_splits
    chunk_begin = split * share
    chunk_end = tl.minimum(chunk_begin + share, chunks)

    # Queries, in the order of the reduction axis that 16-byte loads of K give: a thread's 16 bytes are its
    # operand bytes of two consecutive products.
    stream = tl.arange(0, STREAMS)
    k_axis = tl.arange(0, 64 * SLICES)
    q_dims = k_axis // 64 * 64 + k_axis // 4 % 4 * 16 + k_axis // 32 % 2 * 8 + k_axis // 16 % 2 * 4 + k_axis % 4
    m_rows = row_tile * ROWS + tl.arange(0, 2 * ROWS) % ROWS
    q_rows_ptr = q_ptr + sequence * q_batch_stride + (head64 * GROUP + m_rows // q_len) * q_head_stride
    q_rows_ptr += m_rows % q_len * q_row_stride
    q = tl.load(
        q_rows_ptr[:, None] + q_dims[None, :] * q_dim_stride,
        mask=(m_rows < GROUP * q_len)[:, None] & (q_dims < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    q_terms, q_rest = split_query(q, ROWS)
    q_terms = tl.broadcast_to(q_terms[None], (STREAMS, 2 * ROWS, 64 * SLICES))
    q_rest = tl.broadcast_to(q_rest[None], (STREAMS, 2 * ROWS, 64 * SLICES))
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    row_exists = rows < GROUP * q_len
    row_dims = tl.arange(0, 64 * SLICES)
    q = tl.load(
        (
            q_ptr
            + sequence * q_batch_stride
            + (head64 * GROUP + rows // q_len) * q_head_stride
            + rows % q_len * q_row_stride
        )[:, None]
        + row_dims[None, :] * q_dim_stride,
        mask=row_exists[:, None] & (row_dims < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    # A fault in the query makes its step NaN, and with it every score.
    q_step = tl.max(tl.abs(q), axis=1) / STEPS + tl.sum(q * 0.0, axis=1)
    score_step = q_step * scale
    if THIRD_TERM:
        score_step *= 1.0 / 256.0
    if not HAS_SOFTCAP:
        score_step *= LOG2_E
    flat_rows = (sequence * num_q_heads + head64 * GROUP) * q_len + rows
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + flat_rows, mask=row_exists, other=0.0)
        if not HAS_SOFTCAP:
            bias *= LOG2_E

    # Where each thread reads. Lane 4 * c + t of a warp holds 16 elements of key row c and 16 tokens of value row c.
    c = tl.arange(0, 8)
    t = tl.arange(0, 4)
    table_row_ptr = block_table_ptr + sequence * table_stride
    k_lane_ptr = k_ptr + head64 * k_head_stride
    v_lane_ptr = v_ptr + head64 * v_head_stride
    k_scales_ptr += head64 * k_scale_head_stride
    v_scales_ptr += head64 * v_scale_head_stride
    k_slice = tl.arange(0, SLICES)[:, None, None, None, None] * 64
    k_dim = tl.arange(0, 64)[None, None, None, None, :]
    k_step = tl.arange(0, 8)[None, :, None, None, None] * (2 * HEAD_DIM)
    v_part = tl.arange(0, V_PARTS)[:, None, None, None, None] * 8
    v_lane = c[None, None, :, None, None] * BLOCK_SIZE + tl.arange(0, 16)[None, None, None, None, :]

    highest = tl.full((STREAMS, ROWS), float("-inf"), tl.float32)
    total = tl.zeros((STREAMS, ROWS), tl.float32)
    acc = tl.zeros((STREAMS, ROWS, 8 * V_PARTS), tl.float32)
    for chunk in range(chunk_begin, chunk_end):
        chunk_start = begin + chunk * (STREAMS * TOKENS)
        starts = chunk_start + stream * TOKENS
        k_groups = starts[:, None] // 16 + (c // 2)[None, :]
        k_ids, k_there = block_ids(
            table_row_ptr, k_groups // (BLOCK_SIZE // 16), k_groups < table_width * (BLOCK_SIZE // 16), num_blocks
        )
        v_groups = starts[:, None] // 16 + t[None, :]
        v_ids, v_there = block_ids(
            table_row_ptr, v_groups // (BLOCK_SIZE // 16), v_groups < table_width * (BLOCK_SIZE // 16), num_blocks
        )
        # A hole's K and V are read from block 0, as masks would cost a register move per four bytes: their weight is 0.
        k_rows = k_groups % (BLOCK_SIZE // 16) * 16 + (c % 2)[None, :]
        k_base = k_lane_ptr + tl.where(k_there, k_ids, 0).to(tl.int64) * k_block_stride + k_rows * HEAD_DIM
        k_ptrs = (k_base[None, None, :, :, None] + k_dim) + (k_slice + k_step)  # [SLICES, 8, STREAMS, 8, 64]
        v_slots = v_groups % (BLOCK_SIZE // 16) * 16
        v_ids = tl.where(v_there, v_ids, 0).to(tl.int64)
        v_base = v_lane_ptr + v_ids * v_block_stride + v_slots
        v_ptrs = (v_base[None, :, None, :, None] + v_lane) + v_part * BLOCK_SIZE  # [V_PARTS, STREAMS, 8, 4, 16]
        if HEAD_DIM == 64 * SLICES:
            k = tl.load(k_ptrs)
        else:
            k = tl.load(k_ptrs, mask=tl.broadcast_to(k_slice + k_dim < HEAD_DIM, k_ptrs.shape), other=0)
        k_scales = load_scales(k_scales_ptr, v_ids * k_scale_block_stride + v_slots, v_there, STREAMS, ROWS)
        v_scales = load_scales(v_scales_ptr, v_ids * v_scale_block_stride + v_slots, v_there, STREAMS, ROWS)
        # A faulty value row is seen by the queries whose score it spoils, and by no others.
        k_scales += v_scales * 0.0

        k = tl.reshape(k, (SLICES, 8, STREAMS, 8, 4, 2, 2, 4))
        k = tl.permute(k, (2, 0, 5, 6, 4, 7, 1, 3))  # [STREAMS, SLICES, pair, half, t, byte, i, c]
        k = tl.reshape(k, (STREAMS, 64 * SLICES, TOKENS))
        if THIRD_TERM:
            scores = score_products(q_terms, q_rest, k, STREAMS, ROWS, TOKENS)
        else:
            scores = join_terms(tl.dot(q_terms, k, out_dtype=tl.int32), STREAMS, ROWS, TOKENS)
        scores = scores * (k_scales * score_step[None, :, None])
        if bias_ptr is not None:
            scores += bias[None, :, None]
        if HAS_SOFTCAP:
            scores = softcap * LOG2_E * tanh(scores / softcap)
        n = tl.arange(0, TOKENS)
        tokens = starts[:, None] + (n // 2 % 4 * 16 + n // 8 * 2 + n % 2)[None, :]
        exists = tl.reshape(tl.broadcast_to(v_there[:, None, :, None], (STREAMS, 8, 4, 2)), (STREAMS, TOKENS))
        if key_mask_ptr is not None:
            columns = tokens - key_mask_start
            known = (columns >= 0) & (columns < key_mask_width)
            exists &= tl.load(key_mask_ptr + sequence * key_mask_stride + columns, mask=known, other=0) != 0
            v_scales = tl.where(exists[:, None, :], v_scales, 0.0)
        scores = tl.where(exists[:, None, :], scores, float("-inf"))
        if (chunk_start < first_by_all) | (chunk_start + STREAMS * TOKENS > last_by_all):
            position = oldest + rows % q_len
            visible = tokens[:, None, :] <= position[None, :, None]
            visible &= (tokens >= first)[:, None, :]
            if HAS_WINDOW:
                visible &= tokens[:, None, :] > (position - window)[None, :, None]
            scores = tl.where(visible, scores, float("-inf"))
            v_scales = tl.where(visible, v_scales, 0.0)

        new_highest = tl.maximum(highest, tl.max(scores, axis=2))
        shift = exponent_shift(new_highest)
        weights = tl.exp2(scores - shift[:, :, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weights, axis=2)
        highest = new_highest

        weights *= v_scales
        largest = tl.max(weights, axis=2)
        inverse = tl.where(largest > TINY, STEPS / largest, 0.0)
        steps = (weights * inverse[:, :, None] + 0.5).to(tl.int32)
        steps = tl.reshape(steps, (STREAMS, ROWS, 2, 2, 2, 4, 2))  # [.., product, half, pair, t, byte]
        steps = tl.reshape(tl.permute(steps, (0, 1, 2, 3, 5, 4, 6)), (STREAMS, 1, ROWS, TOKENS))
        is_high = tl.arange(0, 2)[None, :, None, None] == 0
        p_terms = tl.reshape(int8_term(steps, is_high), (STREAMS, 2 * ROWS, TOKENS))
        if V_DIM == 8 * V_PARTS:
            v = tl.load(v_ptrs)
        else:
            v = tl.load(
                v_ptrs, mask=tl.broadcast_to(v_part + c[None, None, :, None, None] < V_DIM, v_ptrs.shape), other=0
            )
        v = tl.reshape(v, (V_PARTS, STREAMS, 8, 4, 2, 2, 4))
        v = tl.permute(v, (1, 4, 5, 3, 6, 0, 2))  # [STREAMS, product, half, t, byte, part, c]
        v = tl.reshape(v, (STREAMS, TOKENS, 8 * V_PARTS))
        weighted = join_terms(tl.dot(p_terms, v, out_dtype=tl.int32), STREAMS, ROWS, 8 * V_PARTS)
        acc = acc * decay[:, :, None] + weighted * (largest / STEPS)[:, :, None]

    # Streams meet.
    top = tl.max(highest, axis=0)
    part = tl.exp2(highest - exponent_shift(top)[None, :])
    total = tl.sum(total * part, axis=0)
    acc = tl.sum(acc * part[:, :, None], axis=0)
    dims = tl.arange(0, 8 * V_PARTS)
    stored = row_exists[:, None] & (dims < V_DIM)[None, :]
    if SPLIT:
        partial_rows = flat_rows * num_splits + split
        tl.store(out_ptr + partial_rows[:, None] * V_DIM + dims[None, :], acc, mask=stored)
        tl.store(stats_ptr + partial_rows * 2, top, mask=row_exists)
        tl.store(stats_ptr + partial_rows * 2 + 1, total, mask=row_exists)
    else:
        if sinks_ptr is not None:
            sink = (
                tl.load(sinks_ptr + kv_head * GROUP + rows // q_len, mask=row_exists, other=0.0).to(tl.float32) * LOG2_E
            )
            new_top = tl.maximum(top, sink)
            acc *= tl.exp2(top - new_top)[:, None]
            total = total * tl.exp2(top - new_top) + tl.exp2(sink - new_top)
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_rows_ptr = out_ptr + sequence * out_batch_stride + (head64 * GROUP + rows // q_len) * out_head_stride
        out_rows_ptr += rows % q_len * out_row_stride
        tl.store(out_rows_ptr[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def reduce_kernel(
    out_ptr,  # [batch, q_heads, q_len, V_DIM]
    partial_ptr,  # [batch * q_heads * q_len, splits, V_DIM]
    stats_ptr,  # [batch * q_heads * q_len, splits, 2]
    sinks_ptr,
    num_q_heads,
    q_len,
    num_splits,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    V_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # V_DIM, rounded up to a power of two
    SPLIT_TILE: tl.constexpr,
):
    """Join the splits of one query row; apply its sink."""
    row = tl.program_id(0).to(tl.int64)
    head = row // q_len % num_q_heads
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
        parts = tl.load(
            partial_ptr + at[:, None] * V_DIM + dims[None, :], mask=valid[:, None] & (dims < V_DIM)[None, :], other=0.0
        )
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        shift = exponent_shift(new_top)
        factors = tl.exp2(tops - shift)
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(totals * factors, axis=0)
        acc = acc * decay + tl.sum(parts * factors[:, None], axis=0)
        top = new_top
    out = acc / tl.where(total == 0.0, 1.0, total)
    out_row_ptr = out_ptr + row // (q_len * num_q_heads) * out_batch_stride + head * out_head_stride
    out_row_ptr += row % q_len * out_row_stride
    tl.store(out_row_ptr + dims, out.to(out_ptr.dtype.element_ty), mask=dims < V_DIM)


def launch_decode(
    out: torch.Tensor,
    q: torch.Tensor,
    cache: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_mask_start: int,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_processors: int,
) -> None:
    """Attend in the conditioned domain: ``q`` as `conditioning.condition_query` leaves it, ``out`` not yet restored.

    Args:
        bias: float32 ``[batch, num_q_heads, q_len]`` added to the scores of a row before softcap and sinks, or None.
        num_processors: multiprocessors to keep busy; decides into how many splits the context falls.
    """
    batch, num_q_heads, q_len, head_dim = q.shape
    group = num_q_heads // cache.num_kv_heads
    rows = 8 if group * q_len <= 8 else 16
    row_tiles = -(-group * q_len // rows)
    table_width = block_table.shape[1]
    programs = batch * cache.num_kv_heads * row_tiles
    chunks = -(-table_width * cache.block_size // (STREAMS * TOKENS))
    splits = max(1, min(chunks, -(-PROGRAMS_PER_PROCESSOR * num_processors // programs)))
    split = splits > 1
    if split:
        partial = torch.empty(
            batch * num_q_heads * q_len, splits, cache.v_head_dim, dtype=torch.float32, device=q.device
        )
        stats = torch.empty(batch * num_q_heads * q_len, splits, 2, dtype=torch.float32, device=q.device)
    decode_kernel[(splits, cache.num_kv_heads * row_tiles, batch)](
        partial if split else out,
        stats if split else None,
        q,
        cache.k,
        cache.v,
        cache.k_scales,
        cache.v_scales,
        block_table,
        context_lens,
        kv_start,
        key_mask,
        sinks,
        bias,
        float(scale),
        float(softcap or 0.0),
        q_len,
        cache.num_blocks,
        table_width,
        key_mask_start,
        0 if key_mask is None else key_mask.shape[1],
        window or 0,
        *out.stride()[:3],
        *q.stride(),
        *cache.k.stride()[:2],
        *cache.v.stride()[:2],
        *cache.k_scales.stride()[:2],
        *cache.v_scales.stride()[:2],
        block_table.stride(0),
        0 if key_mask is None else key_mask.stride(0),
        GROUP=group,
        HEAD_DIM=head_dim,
        V_DIM=cache.v_head_dim,
        BLOCK_SIZE=cache.block_size,
        SLICES=triton.next_power_of_2(-(-head_dim // 64)),
        V_PARTS=triton.next_power_of_2(-(-cache.v_head_dim // 8)),
        ROWS=rows,
        STREAMS=STREAMS,
        TOKENS=TOKENS,
        # A rotated query has no outlier that would take the precision of all its other elements.
        THIRD_TERM=cache.rotation is None,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        SPLIT=split,
        num_warps=STREAMS,
        num_stages=1,
        enable_fp_fusion=True,
    )
    if split:
        reduce_kernel[(batch * num_q_heads * q_len,)](
            out,
            partial,
            stats,
            sinks,
            num_q_heads,
            q_len,
            splits,
            *out.stride()[:3],
            V_DIM=cache.v_head_dim,
            DIMS=triton.next_power_of_2(cache.v_head_dim),
            SPLIT_TILE=16,
            num_warps=4,
            enable_fp_fusion=True,
        )
