"""Decode attention in Triton: split over the context, in the integer domain (`triton_tiles`), then joined."""

# ruff: noqa: RUF005 (Triton compiles no starred tuple displays)

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .conditioning import hadamard_block
from .storage import KvCacheQuant
from .triton_primitives import LOG2_E, block_ids, exponent_shift, hadamard, tanh
from .triton_tiles import (
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
#: Programs that one multiprocessor should have at hand, to hide the latency of memory.
PROGRAMS_PER_PROCESSOR = 3
#: Registers per thread, by (chip, products per key row, third term), where the compiler's own choice would keep a third
#: program from a multiprocessor or spill inside the loop (docs/gpu.md).
MAX_REGISTERS = {("sm_90", 2, True): 168, ("sm_90", 4, False): 208, ("sm_100", 4, False): 224}


@dataclass(frozen=True)
class Chip:
    """What the launcher must know of a device."""

    name: str  # "sm_90", "gfx942", ...
    num_processors: int


@triton.jit
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
        if (start < first_by_all) | (start + chunk_tokens > oldest + 1):
            position = oldest + rows % q_len
            visible = (tokens >= first)[:, None, :] & (tokens[:, None, :] <= position[None, :, None])
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
def decode_constants(
    group: int, q_len: int, head_dim: int, v_dim: int, block_size: int, rotated: bool, integer: bool, chip: Chip
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Row tiles, and the constants and options of both kernels, worked out once per kind of call."""
    rows = 8 if group * q_len <= 8 else 16
    registers = MAX_REGISTERS.get((chip.name, -(-head_dim // PART.value), integer and not rotated))
    decode = dict(
        GROUP=group,
        HEAD_DIM=head_dim,
        V_DIM=v_dim,
        DIMS=max(PART.value, triton.next_power_of_2(head_dim)),
        V_PART=max(16, min(PART.value, triton.next_power_of_2(v_dim))),
        ROTATED=hadamard_block(head_dim) if rotated else 1,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        STREAMS=STREAMS,
        INTEGER=integer,
        num_warps=STREAMS,
        num_stages=1,
        enable_fp_fusion=True,
    )
    if registers is not None:
        decode["maxnreg"] = registers
    reduce = dict(
        V_DIM=v_dim,
        DIMS=triton.next_power_of_2(v_dim),
        ROTATED=hadamard_block(v_dim) if rotated else 1,
        SPLIT_TILE=16,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return -(-group * q_len // rows), decode, reduce


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
    *,
    chip: Chip,
    integer: bool = True,
) -> None:
    """`reference.decode` on a GPU: two launches, whose grids depend on shapes alone.

    Args:
        chip: its multiprocessors decide into how many splits the context falls.
        integer: multiply int8 with int8; False multiplies in float16, for chips whose matrix unit knows no int8.
    """
    batch, num_q_heads, q_len, head_dim = q.shape
    kv_heads, num_blocks, block_size, _ = cache.k.shape
    v_dim, table_width = cache.v.shape[3], block_table.shape[1]
    row_tiles, decode, reduce = decode_constants(
        num_q_heads // kv_heads, q_len, head_dim, v_dim, block_size, cache.rotation is not None, integer, chip
    )
    chunks = -(-table_width * block_size // CHUNK)
    programs = batch * kv_heads * row_tiles
    splits = max(1, min(chunks, -(-PROGRAMS_PER_PROCESSOR * chip.num_processors // programs)))
    num_rows = batch * num_q_heads * q_len
    partial = torch.empty(num_rows * splits * (v_dim + 2), dtype=torch.float32, device=q.device)
    # Without softcap and sinks the keys' centre moves all scores of a row alike, and softmax does not see it.
    absolute = softcap is not None or sinks is not None
    decode_kernel[(splits, kv_heads * row_tiles, batch)](
        partial,
        q,
        cache.k,
        cache.v,
        cache.k_scales,
        cache.v_scales,
        cache.key_center if absolute else None,
        block_table,
        context_lens,
        kv_start,
        key_mask,
        float(scale),
        float(softcap or 0.0),
        q_len,
        num_blocks,
        table_width,
        key_mask_start,
        0 if key_mask is None else key_mask.shape[1],
        window or 0,
        *q.stride(),
        cache.k.stride(0),
        cache.v.stride(0),
        cache.k_scales.stride(0),
        cache.v_scales.stride(0),
        block_table.stride(0),
        0 if key_mask is None else key_mask.stride(0),
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        **decode,
    )
    reduce_kernel[(num_rows,)](
        out,
        partial,
        sinks,
        num_q_heads,
        q_len,
        splits,
        *out.stride()[:3],
        **reduce,
    )
