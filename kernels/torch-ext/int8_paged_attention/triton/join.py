"""The second launch of decode attention: it joins what the programs left, and first tokens in full precision."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..calls import Scoring, Tokens
from ..checks import clamp_window
from ..conditioning import hadamard_block
from ..first_tokens import FirstTokens
from ..storage import KvCacheQuant
from .launch import launch
from .layouts import first_pointers
from .primitives import LOG2_E, exponent_shift, first_positions, hadamard, tanh
from .schedule import chunks_between, cut_evenly, visible_tokens


@triton.jit(
    do_not_specialize=("batch", "programs", "key_mask_start", "key_mask_width", "key_mask_stride", "window"),
    do_not_specialize_on_alignment=("key_mask_ptr",),
)
def reduce_kernel(
    out_ptr,  # [batch, q_heads, q_len, V_DIM]
    partial_ptr,  # as the decode kernel leaves it
    sink_logits_ptr,  # [q_heads]
    context_lens_ptr,  # [batch]
    blocks_start_ptr,  # [batch], where each sequence's part in the blocks begins
    batch,
    num_q_heads,
    q_len,
    programs,
    window,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    q_ptr,  # [batch, q_heads, q_len, HEAD_DIM]; this and what follows for first tokens only, None and 0 without
    first_tokens_k_ptr,  # [rows, kv_heads, FIRST_TOKENS, HEAD_DIM]
    first_tokens_v_ptr,  # [rows, kv_heads, FIRST_TOKENS, V_DIM]
    first_tokens_row_ptr,  # [batch]
    first_tokens_first_ptr,
    first_tokens_stop_ptr,
    key_center_ptr,  # [kv_heads, HEAD_DIM], where scores are only compared and those of the blocks lack its part
    kv_start_ptr,
    key_mask_ptr,
    scale,
    softcap,
    key_mask_start,
    key_mask_width,
    key_mask_stride,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    q_dim_stride,
    V_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # V_DIM, rounded up to a power of two
    ROTATED: tl.constexpr,
    SLOT_TILE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K_DIMS: tl.constexpr,
    FIRST_TOKENS: tl.constexpr,
    FIRST_TILE: tl.constexpr,  # FIRST_TOKENS, rounded up to a power of two
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Join what is there of one query row, apply its sink, rotate back, add the first tokens, divide."""
    row = tl.program_id(0).to(tl.int64)
    head, sequence, i = row // q_len % num_q_heads, row // (q_len * num_q_heads), row % q_len
    # The slots of the row's unit (`schedule`).
    row_tiles = (GROUP * q_len + ROWS - 1) // ROWS
    units = num_q_heads // GROUP * row_tiles
    row_of_head = head % GROUP * q_len + i
    unit = head // GROUP * row_tiles + row_of_head // ROWS
    positions, share, lead = cut_evenly(
        context_lens_ptr, blocks_start_ptr, batch, units, programs, q_len, window, HAS_WINDOW, SEQUENCES
    )
    sequences = tl.arange(0, SEQUENCES)
    mine = tl.sum(tl.where(sequences == sequence, positions, 0), axis=0)
    first_chunk = tl.sum(tl.where(sequences < sequence, positions, 0), axis=0) * units + unit * mine + lead
    length, first, _ = visible_tokens(context_lens_ptr, blocks_start_ptr, sequence, True, q_len, window, HAS_WINDOW)
    chunks = chunks_between(first, length)
    first_program = first_chunk // tl.maximum(share, 1)
    num_slots = tl.where(chunks > 0, (first_chunk + chunks - 1) // tl.maximum(share, 1) - first_program + 1, 0)
    rows_kept = tl.minimum(GROUP * q_len, ROWS)
    slot = first_program + sequence * units + unit

    stats_ptr = partial_ptr + (programs + batch * units - 1).to(tl.int64) * rows_kept * V_DIM
    dims = tl.arange(0, DIMS)
    slots = tl.arange(0, SLOT_TILE)
    top = float("-inf")
    total = 0.0
    if sink_logits_ptr is not None:
        top = tl.load(sink_logits_ptr + head).to(tl.float32) * LOG2_E
        total = 1.0
    acc = tl.zeros((DIMS,), tl.float32)
    for begin in range(0, num_slots, SLOT_TILE):
        valid = begin + slots < num_slots
        at = (slot + begin + slots) * rows_kept + row_of_head % ROWS
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
    if ROTATED > 1:
        acc = tl.reshape(hadamard(tl.reshape(acc, (1, DIMS)), 1, DIMS, ROTATED), (DIMS,))
    if first_tokens_k_ptr is not None:
        position = length - q_len + i
        tokens, seen = first_positions(
            sequence,
            first_tokens_first_ptr,
            first_tokens_stop_ptr,
            kv_start_ptr,
            key_mask_ptr,
            key_mask_start,
            key_mask_width,
            key_mask_stride,
            FIRST_TOKENS,
            FIRST_TILE,
        )
        seen &= tokens <= position
        if HAS_WINDOW:
            seen &= tokens > position - window
        at = tl.load(first_tokens_row_ptr + sequence).to(tl.int64) * (num_q_heads // GROUP) + head // GROUP
        at = at * FIRST_TOKENS + tl.arange(0, FIRST_TILE)
        k_dims = tl.arange(0, K_DIMS)
        q_row_ptr = q_ptr + sequence * q_batch_stride + head * q_head_stride + i * q_row_stride
        q = tl.load(q_row_ptr + k_dims * q_dim_stride, mask=k_dims < HEAD_DIM, other=0.0).to(tl.float32)
        mask = seen[:, None] & (k_dims < HEAD_DIM)[None, :]
        k = tl.load(first_tokens_k_ptr + at[:, None] * HEAD_DIM + k_dims[None, :], mask=mask, other=0.0).to(tl.float32)
        mask = seen[:, None] & (dims < V_DIM)[None, :]
        v = tl.load(first_tokens_v_ptr + at[:, None] * V_DIM + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        # A fault in a key or a value spoils the score, and with it the rows that see it.
        fault = tl.sum(k * 0.0, axis=1) + tl.sum(v * 0.0, axis=1)
        if key_center_ptr is not None:
            center = tl.load(key_center_ptr + head // GROUP * HEAD_DIM + k_dims, mask=k_dims < HEAD_DIM, other=0.0)
            k -= center[None, :]
        scores = tl.sum(k * q[None, :], axis=1) * scale
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        scores = tl.where(seen, scores * LOG2_E + fault, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        shift = exponent_shift(new_top)
        weights = tl.exp2(scores - shift)
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay + tl.sum(v * weights[:, None], axis=0)
    out = acc / tl.where(total == 0.0, 1.0, total)
    out_row_ptr = out_ptr + sequence * out_batch_stride + head * out_head_stride + i * out_row_stride
    tl.store(out_row_ptr + dims, out.to(out_ptr.dtype.element_ty), mask=dims < V_DIM)


@functools.lru_cache(maxsize=1024)
def join_constants(
    group: int, head_dim: int, v_dim: int, rotated: bool, first_tokens: int, windowed: bool, capped: bool
) -> dict[str, Any]:
    """The kernel's constants and options, worked out once per kind of call."""
    return dict(
        V_DIM=v_dim,
        DIMS=triton.next_power_of_2(v_dim),
        ROTATED=hadamard_block(v_dim) if rotated else 1,
        SLOT_TILE=16,
        GROUP=group,
        HEAD_DIM=head_dim,
        K_DIMS=triton.next_power_of_2(head_dim),
        FIRST_TOKENS=first_tokens,
        FIRST_TILE=triton.next_power_of_2(first_tokens),
        HAS_WINDOW=windowed,
        HAS_SOFTCAP=capped,
        num_warps=4,
        enable_fp_fusion=True,
    )


class Cut(NamedTuple):
    """How the first launch has cut its work (`schedule`).

    Attributes:
        programs: how many there are.
        rows: query rows of a unit.
        sequences: 1, or a power of two that is at least the batch.
        blocks_start: int32 ``[batch]``, where each sequence's part in the blocks begins; ``None``: at 0.
    """

    programs: int
    rows: int
    sequences: int
    blocks_start: torch.Tensor | None


def launch_join(
    out: torch.Tensor,
    partial: torch.Tensor,
    q: torch.Tensor,
    storage: KvCacheQuant,
    tokens: Tokens,
    scoring: Scoring,
    first_tokens: FirstTokens | None,
    cut: Cut,
) -> None:
    """Write ``out`` ``[batch, num_q_heads, q_len, v_head_dim]`` from the sums that the programs left in ``partial``.

    The other arguments are those of `reference.attend`, as `launch_decode` has checked them, and how the work was
    cut.
    """
    batch, num_q_heads, q_len, v_dim = out.shape
    rotated = storage.rotation is not None
    group, window = num_q_heads // storage.k.shape[0], tokens.window
    if window is not None:
        window = clamp_window(window, tokens.block_table.shape[1] * storage.block_size)
    if first_tokens is None:
        for_first_tokens: tuple = (None,) * 9 + (0.0, 0.0) + (0,) * 7
        constants = join_constants(group, 1, v_dim, rotated, 1, window is not None, False)
    else:
        scale, softcap, sink_logits, key_mask, key_mask_start = scoring
        center = storage.key_center if softcap is None and sink_logits is None else None
        mask = (0, 0) if key_mask is None else (key_mask.shape[1], key_mask.stride(0))
        for_first_tokens = (
            q, *first_pointers(first_tokens), center, tokens.kv_start, key_mask, float(scale),
            float(softcap or 0.0), key_mask_start, *mask, *q.stride(),
        )  # fmt: skip
        special = (window is not None, softcap is not None)
        constants = join_constants(group, q.shape[3], v_dim, rotated, first_tokens.k.shape[2], *special)
    arguments = (
        out,
        partial,
        scoring[2],
        tokens.context_lens,
        cut.blocks_start,
        batch,
        num_q_heads,
        q_len,
        cut.programs,
        window or 0,
        *out.stride()[:3],
        *for_first_tokens,
    )
    sizes = dict(ROWS=cut.rows, SEQUENCES=cut.sequences)
    launch(reduce_kernel, (batch * num_q_heads * q_len,), arguments, **sizes, **constants)
