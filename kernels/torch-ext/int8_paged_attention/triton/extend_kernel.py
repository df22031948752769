"""The kernel of extend attention: a chunk of new rows over a past in int8 blocks, as in chunked prefill.

The past is read from its blocks, tile by tile, and dequantized in registers, unless it has been read already
(`long_chunks`); the chunk's own keys and values are taken in full precision. The past comes first, in the conditioned
domain; then the sums are rotated back once, and the chunk follows in the model's own domain, and after it the first
tokens in full precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LOG2_E, block_ids, exponent_shift, hadamard, tanh


@triton.jit
def to_base_2(scores, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scaled scores -> exponents of two, after the softcap."""
    if HAS_SOFTCAP:
        scores = softcap * tanh(scores / softcap)
    return scores * LOG2_E


@triton.jit
def in_mask(row_ptr, tokens, width):
    """Whether each token's column is True in a row of the key mask; those outside of it are not."""
    return tl.load(row_ptr + tokens, mask=(tokens >= 0) & (tokens < width), other=0) != 0


@triton.jit(
    do_not_specialize=(
        "chunk",
        "num_blocks",
        "table_width",
        "table_stride",
        "key_mask_width",
        "key_mask_stride",
        "window",
    ),
    do_not_specialize_on_alignment=("key_mask_ptr",),
)
def extend_kernel(
    out_ptr,  # [batch, q_heads, chunk, V_DIM]
    q_ptr,  # [batch, q_heads, chunk, HEAD_DIM]
    k_new_ptr,  # [batch, kv_heads, chunk, HEAD_DIM]
    v_new_ptr,  # [batch, kv_heads, chunk, V_DIM]
    k_ptr,  # [kv_heads, num_blocks, BLOCK_SIZE, HEAD_DIM]
    v_ptr,  # [kv_heads, num_blocks, V_DIM, BLOCK_SIZE]
    k_scales_ptr,  # [kv_heads, num_blocks, BLOCK_SIZE]
    v_scales_ptr,
    key_center_ptr,  # [kv_heads, HEAD_DIM] or None
    block_table_ptr,  # [batch, table_width]
    past_lens_ptr,  # [batch]
    kv_start_ptr,
    key_mask_ptr,
    sink_logits_ptr,
    past_means_ptr,  # [batch, chunk, GROUP, kv_heads, V_DIM] what `long_chunks` has made of the past, or None
    past_logs_ptr,  # [batch, chunk, GROUP, kv_heads]
    first_tokens_k_ptr,  # [rows, kv_heads, FIRST_TOKENS, HEAD_DIM] or None
    first_tokens_v_ptr,  # [rows, kv_heads, FIRST_TOKENS, V_DIM]
    first_tokens_row_ptr,  # [batch]
    first_tokens_first_ptr,
    first_tokens_stop_ptr,
    scale,
    softcap,
    chunk,
    num_blocks,
    table_width,
    key_mask_width,
    window,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    q_dim_stride,
    k_new_batch_stride,
    k_new_head_stride,
    k_new_row_stride,
    k_new_dim_stride,
    v_new_batch_stride,
    v_new_head_stride,
    v_new_row_stride,
    v_new_dim_stride,
    k_head_stride,
    v_head_stride,
    k_scale_head_stride,
    v_scale_head_stride,
    table_stride,
    key_mask_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # HEAD_DIM, rounded up to a power of two
    V_DIMS: tl.constexpr,
    K_ROTATED: tl.constexpr,  # size of the Hadamard blocks, 1 without rotation
    V_ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FIRST_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One program takes ROWS query rows of one key/value head: rows of a position stand together, group by group."""
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_exists = rows < GROUP * chunk
    q_head, row = head * GROUP + rows % GROUP, rows // GROUP
    first_row = tl.program_id(0) * ROWS // GROUP
    last_row = tl.minimum(((tl.program_id(0) + 1) * ROWS - 1) // GROUP, chunk - 1)
    dims, v_dims = tl.arange(0, DIMS), tl.arange(0, V_DIMS)
    # float32 queries are multiplied in float32; others in their own precision, and with the past in float16.
    past_dtype: tl.constexpr = tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.float16
    new_dtype: tl.constexpr = q_ptr.dtype.element_ty

    past = tl.load(past_lens_ptr + sequence)
    first = 0
    if kv_start_ptr is not None:
        first = tl.maximum(tl.load(kv_start_ptr + sequence), 0)
    if first_tokens_k_ptr is not None:
        first = tl.maximum(first, tl.load(first_tokens_stop_ptr + sequence))
    position = past + row
    first_seen = first
    if HAS_WINDOW:
        first_seen = tl.maximum(first, past + first_row - window + 1)

    q_ptrs = q_ptr + sequence * q_batch_stride + q_head * q_head_stride + row.to(tl.int64) * q_row_stride
    q_mask = row_exists[:, None] & (dims < HEAD_DIM)[None, :]
    q_new = tl.load(q_ptrs[:, None] + dims[None, :] * q_dim_stride, mask=q_mask, other=0.0)
    q = q_new.to(tl.float32) * scale
    bias = tl.zeros((ROWS,), tl.float32)
    if key_center_ptr is not None:
        center = tl.load(key_center_ptr + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        bias = tl.sum(q * center[None, :], axis=1)
    if K_ROTATED > 1:
        q = hadamard(q, ROWS, DIMS, K_ROTATED)
    q_unit = tl.max(tl.abs(q), axis=1)
    q = (q * tl.where(q_unit > 1e-30, 1.0 / q_unit, 0.0)[:, None]).to(past_dtype)
    q_unit += tl.sum(q_new.to(tl.float32) * 0.0, axis=1)  # a fault in the query spoils its scores

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V_DIMS), tl.float32)
    if past_means_ptr is not None:
        at = ((sequence * chunk + row) * GROUP + rows % GROUP) * tl.num_programs(1) + head
        highest = (tl.load(past_logs_ptr + at, mask=row_exists, other=0.0) + bias) * LOG2_E
        total = tl.where(highest == float("-inf"), 0.0, 1.0)
        acc_mask = row_exists[:, None] & (v_dims < V_DIM)[None, :]
        acc = tl.load(past_means_ptr + at[:, None] * V_DIM + v_dims[None, :], mask=acc_mask, other=0.0)
    else:
        table_row_ptr = block_table_ptr + sequence * table_stride
        for start in range(first_seen // TOKENS * TOKENS, past, TOKENS):
            tokens = start + tl.arange(0, TOKENS)
            logical = tokens // BLOCK_SIZE
            # The same for all 16 tokens of a group, as the loads of V are told.
            covered = (tokens // 16 * 16 < past) & (logical < table_width)
            ids, there = block_ids(table_row_ptr, logical, covered, num_blocks)
            there &= (tokens >= first) & (tokens < past)
            if key_mask_ptr is not None:
                there &= in_mask(key_mask_ptr + sequence * key_mask_stride, tokens, key_mask_width)
            slots = ids * BLOCK_SIZE + tokens % BLOCK_SIZE
            k_ptrs = k_ptr + head * k_head_stride + slots[None, :] * HEAD_DIM + dims[:, None]
            k = tl.load(k_ptrs, mask=(dims < HEAD_DIM)[:, None], other=0)  # [DIMS, TOKENS]
            k_scales = tl.load(k_scales_ptr + head * k_scale_head_stride + slots, mask=there, other=0.0).to(tl.float32)
            v_scales = tl.load(v_scales_ptr + head * v_scale_head_stride + slots, mask=there, other=0.0).to(tl.float32)
            # A faulty value row is seen by the queries whose score it spoils, and by no others.
            k_scales += v_scales * 0.0
            scores = tl.dot(q, k.to(past_dtype), input_precision="ieee") * q_unit[:, None] * k_scales[None, :]
            scores = to_base_2(scores + bias[:, None], softcap, HAS_SOFTCAP)
            visible = tl.broadcast_to(there[None, :], (ROWS, TOKENS))
            if HAS_WINDOW:
                visible &= tokens[None, :] > (position - window)[:, None]
            scores = tl.where(visible, scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            shift = exponent_shift(new_highest)
            decay = tl.exp2(highest - shift)
            highest = new_highest
            weights = tl.exp2(scores - shift[:, None])
            total = total * decay + tl.sum(weights, axis=1)
            # Scales of V may be too large or too small for float16, their ratios to the tile's largest are not.
            weights = tl.where(visible, weights * v_scales[None, :], 0.0)
            largest = tl.max(weights, axis=1)
            weights *= tl.where(largest > 1e-30, 1.0 / largest, 0.0)[:, None]
            # Blocks hold 16 tokens or a multiple. A mask over tokens would make loads of single bytes of them: what is
            # not there is read from block 0, with weight 0.
            v_slots = tl.max_contiguous(tl.multiple_of(ids * (BLOCK_SIZE * V_DIM) + tokens % BLOCK_SIZE, 16), 16)
            v_ptrs = v_ptr + head * v_head_stride + v_slots[:, None] + v_dims[None, :] * BLOCK_SIZE
            v = tl.load(v_ptrs, mask=(v_dims < V_DIM)[None, :], other=0)  # [TOKENS, V_DIMS]
            sums = tl.dot(weights.to(past_dtype), v.to(past_dtype), input_precision="ieee")
            acc = acc * decay[:, None] + sums * largest[:, None]
    if V_ROTATED > 1:
        acc = hadamard(acc, ROWS, V_DIMS, V_ROTATED)

    k_new_ptr += sequence * k_new_batch_stride + head * k_new_head_stride
    v_new_ptr += sequence * v_new_batch_stride + head * v_new_head_stride
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_row - window + 1, 0) // TOKENS * TOKENS
    for start in range(begin, last_row + 1, TOKENS):
        new = start + tl.arange(0, TOKENS)
        new64 = new.to(tl.int64)
        k_mask = (new < chunk)[None, :] & (dims < HEAD_DIM)[:, None]
        k_new = tl.load(
            k_new_ptr + new64[None, :] * k_new_row_stride + dims[:, None] * k_new_dim_stride, mask=k_mask, other=0.0
        )
        scores = tl.dot(q_new, k_new.to(new_dtype), input_precision="ieee") * scale
        scores = to_base_2(scores, softcap, HAS_SOFTCAP)
        visible = (new[None, :] <= row[:, None]) & (past + new >= first)[None, :]
        if key_mask_ptr is not None:
            visible &= in_mask(key_mask_ptr + sequence * key_mask_stride, past + new, key_mask_width)[None, :]
        if HAS_WINDOW:
            visible &= new[None, :] > (row - window)[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        shift = exponent_shift(new_highest)
        decay = tl.exp2(highest - shift)
        highest = new_highest
        weights = tl.exp2(scores - shift[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        v_mask = (new < chunk)[:, None] & (v_dims < V_DIM)[None, :]
        v_new = tl.load(
            v_new_ptr + new64[:, None] * v_new_row_stride + v_dims[None, :] * v_new_dim_stride, mask=v_mask, other=0.0
        )
        sums = tl.dot(weights.to(new_dtype), v_new.to(new_dtype), input_precision="ieee")
        acc = acc * decay[:, None] + sums

    if first_tokens_k_ptr is not None:
        # One by one, as there are few: another product would take registers from the loops.
        at = (tl.load(first_tokens_row_ptr + sequence).to(tl.int64) * tl.num_programs(1) + head) * FIRST_TOKENS
        sink_first, sink_stop = tl.load(first_tokens_first_ptr + sequence), tl.load(first_tokens_stop_ptr + sequence)
        for i in range(tl.minimum(sink_stop - sink_first, FIRST_TOKENS)):
            token = sink_first + i
            seen = row_exists
            if kv_start_ptr is not None:
                seen &= token >= tl.load(kv_start_ptr + sequence)
            if key_mask_ptr is not None:
                seen &= in_mask(key_mask_ptr + sequence * key_mask_stride, token, key_mask_width)
            if HAS_WINDOW:
                seen &= token > position - window
            k_sink = tl.load(first_tokens_k_ptr + (at + i) * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0).to(
                tl.float32
            )
            v_sink = tl.load(first_tokens_v_ptr + (at + i) * V_DIM + v_dims, mask=v_dims < V_DIM, other=0.0).to(
                tl.float32
            )
            score = tl.sum(q_new.to(tl.float32) * k_sink[None, :], axis=1) * scale
            # A fault spoils the score, and with it the rows that see it.
            fault = tl.sum(k_sink * 0.0, axis=0) + tl.sum(v_sink * 0.0, axis=0)
            score = tl.where(seen, to_base_2(score, softcap, HAS_SOFTCAP) + fault, float("-inf"))
            new_highest = tl.maximum(highest, score)
            shift = exponent_shift(new_highest)
            decay = tl.exp2(highest - shift)
            highest = new_highest
            weight = tl.exp2(score - shift)
            total = total * decay + weight
            acc = acc * decay[:, None] + weight[:, None] * v_sink[None, :]

    if sink_logits_ptr is not None:
        sink = tl.load(sink_logits_ptr + q_head, mask=row_exists, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(highest, sink)
        acc *= tl.exp2(highest - top)[:, None]
        total = total * tl.exp2(highest - top) + tl.exp2(sink - top)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptrs = out_ptr + sequence * out_batch_stride + q_head * out_head_stride + row.to(tl.int64) * out_row_stride
    out_mask = row_exists[:, None] & (v_dims < V_DIM)[None, :]
    tl.store(out_ptrs[:, None] + v_dims[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
