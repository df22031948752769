"""Attention with fresh keys and values in Triton: a chunk of new rows over a past in int8 blocks, one launch
(`extend_kernel`); the past of a long chunk is read before (`long_chunks`)."""

from __future__ import annotations

import torch
import triton

from ..calls import Scoring, Tokens
from ..checks import clamp_mask_start, clamp_window
from ..conditioning import hadamard_block
from ..first_tokens import FirstTokens
from ..layouts import check_append, check_options, check_queries
from ..storage import KvCacheQuant
from .extend_kernel import extend_kernel
from .launch import launch
from .layouts import NOTE, first_layout, first_pointers, in_32_bits, layer_of, tokens_of
from .long_chunks import attend_past, serves


def launch_extend(
    out: torch.Tensor,
    q: torch.Tensor,
    storage: KvCacheQuant,
    tokens: Tokens,
    scoring: Scoring,
    fresh: tuple[torch.Tensor, torch.Tensor],
    first_tokens: FirstTokens | None = None,
) -> None:
    """`reference.attend` with ``fresh`` keys and values, which have q's dtype, on a GPU."""
    layout, kind, head_strides = storage.notes.get(NOTE) or layer_of(storage)
    held = tokens.notes.get(NOTE) or tokens_of(tokens)
    check_queries(layout, out, q)
    batch, num_q_heads, chunk, _ = q.shape
    k_new, v_new = fresh
    check_append(layout, held, k_new, v_new)
    if k_new.dtype != q.dtype or k_new.shape[2] != chunk or len(k_new) != batch:
        raise ValueError(
            f"the chunk's keys are {k_new.dtype} {list(k_new.shape)}, its queries {q.dtype} {list(q.shape)}"
        )
    key_mask, sink_logits = check_options(layout, batch, num_q_heads, scoring, first_layout(first_tokens))
    capacity = held.max_blocks * layout.block_size + chunk
    if key_mask is not None:
        key_mask = from_position_0(key_mask, clamp_mask_start(scoring.key_mask_start, key_mask, capacity))
    softcap, window = scoring.softcap, clamp_window(tokens.window, capacity)
    q, k_new, v_new = in_32_bits(q), in_32_bits(k_new), in_32_bits(v_new)
    group = num_q_heads // layout.num_kv_heads
    rows, columns = (32, 64) if max(kind.head_dim, kind.v_dim) > 128 or q.dtype == torch.float32 else (64, 64)
    past = (None, None)
    if serves(q, storage, tokens, scoring):
        past = attend_past(q, storage, tokens, scoring, first_tokens)
    arguments = (
        out,
        q,
        k_new,
        v_new,
        storage.k,
        storage.v,
        storage.k_scales,
        storage.v_scales,
        storage.key_center,
        tokens.block_table,
        tokens.context_lens_before,
        tokens.kv_start,
        key_mask,
        sink_logits,
        *past,
        *first_pointers(first_tokens),
        float(scoring.scale),
        float(softcap or 0.0),
        chunk,
        layout.num_blocks,
        held.max_blocks,
        0 if key_mask is None else key_mask.shape[1],
        window or 0,
        *out.stride()[:3],
        *q.stride(),
        *k_new.stride(),
        *v_new.stride(),
        *head_strides,
        held.table_stride,
        0 if key_mask is None else key_mask.stride()[0],
    )
    launch(
        extend_kernel,
        (-(-group * chunk // rows), layout.num_kv_heads, batch),
        arguments,
        GROUP=group,
        HEAD_DIM=kind.head_dim,
        V_DIM=kind.v_dim,
        DIMS=max(16, triton.next_power_of_2(kind.head_dim)),
        V_DIMS=max(16, triton.next_power_of_2(kind.v_dim)),
        K_ROTATED=hadamard_block(kind.head_dim) if kind.rotated else 1,
        V_ROTATED=hadamard_block(kind.v_dim) if kind.rotated else 1,
        BLOCK_SIZE=kind.block_size,
        ROWS=rows,
        TOKENS=columns,
        FIRST_TOKENS=first_tokens.num_tokens if first_tokens is not None else 0,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )


def from_position_0(key_mask: torch.Tensor, start: int) -> torch.Tensor:
    """A mask ``[batch, columns]`` whose first column is position ``start``, as one that begins at position 0."""
    if start > 0:
        return torch.nn.functional.pad(key_mask, (start, 0))
    return key_mask[:, -start:] if start else key_mask
