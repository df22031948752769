"""Extend attention in Triton: a chunk of new rows over a past in int8 blocks (`triton_extend_kernel`), one launch."""

from __future__ import annotations

import torch
import triton

from .checks import clamp_window
from .conditioning import hadamard_block
from .first_tokens import FirstTokens
from .layouts import check_append, check_options, check_queries
from .storage import KvCacheQuant
from .triton_extend_kernel import extend_kernel
from .triton_layouts import first_layout, first_pointers, in_32_bits, layer_of


def launch_extend(
    out: torch.Tensor,
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    storage: KvCacheQuant,
    block_table: torch.Tensor,
    past_lens: torch.Tensor,
    scale: float,
    kv_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    first_tokens: FirstTokens | None = None,
) -> None:
    """Attention of a chunk over the past in the blocks and over itself, one launch.

    Row i of sequence b stands at position ``past_lens[b] + i``. It sees the past as stored and rows 0 to i of the
    chunk as given, both from ``kv_start`` on, inside the window, and where ``key_mask`` is True.

    Args:
        out: ``[batch, num_q_heads, chunk, v_head_dim]``, last axis contiguous.
        q: ``[batch, num_q_heads, chunk, head_dim]``.
        k_new: ``[batch, num_kv_heads, chunk, head_dim]`` keys of the chunk, as the model computed them; of q's dtype.
        v_new: ``[batch, num_kv_heads, chunk, v_head_dim]``.
        past_lens: int32 ``[batch]`` tokens before the chunk. Blocks past them are not read: whether the chunk has been
            appended already makes no difference.
        key_mask: bool ``[batch, columns]`` over positions from 0, the chunk's included, last axis contiguous.
        first_tokens: first tokens in full precision, of q's dtype; all lie in the past.
    """
    layout, head_strides = layer_of(storage)
    check_queries(layout, out, q)
    batch, num_q_heads, chunk, head_dim = q.shape
    block_table, past_lens = check_append(layout, k_new, v_new, block_table, past_lens)
    if k_new.dtype != q.dtype or k_new.shape[2] != chunk or len(k_new) != batch:
        raise ValueError(
            f"the chunk's keys are {k_new.dtype} {list(k_new.shape)}, its queries {q.dtype} {list(q.shape)}"
        )
    held = first_layout(first_tokens)
    kv_start, key_mask, sink_logits = check_options(
        layout, batch, num_q_heads, kv_start, key_mask, softcap, sink_logits, held
    )
    window = clamp_window(window, block_table.shape[1] * layout.block_size + chunk)
    q, k_new, v_new = in_32_bits(q), in_32_bits(k_new), in_32_bits(v_new)
    group = num_q_heads // storage.num_kv_heads
    rows, tokens = (32, 64) if max(head_dim, storage.v_head_dim) > 128 or q.dtype == torch.float32 else (64, 64)
    rotated = storage.rotation is not None
    extend_kernel[(-(-group * chunk // rows), storage.num_kv_heads, batch)](
        out,
        q,
        k_new,
        v_new,
        storage.k,
        storage.v,
        storage.k_scales,
        storage.v_scales,
        storage.key_center,
        block_table,
        past_lens,
        kv_start,
        key_mask,
        sink_logits,
        *first_pointers(first_tokens),
        float(scale),
        float(softcap or 0.0),
        chunk,
        storage.num_blocks,
        block_table.shape[1],
        0 if key_mask is None else key_mask.shape[1],
        window or 0,
        *out.stride()[:3],
        *q.stride(),
        *k_new.stride(),
        *v_new.stride(),
        *head_strides,
        block_table.stride()[0],
        0 if key_mask is None else key_mask.stride()[0],
        GROUP=group,
        HEAD_DIM=head_dim,
        V_DIM=storage.v_head_dim,
        DIMS=max(16, triton.next_power_of_2(head_dim)),
        V_DIMS=max(16, triton.next_power_of_2(storage.v_head_dim)),
        K_ROTATED=hadamard_block(head_dim) if rotated else 1,
        V_ROTATED=hadamard_block(storage.v_head_dim) if rotated else 1,
        BLOCK_SIZE=storage.block_size,
        ROWS=rows,
        TOKENS=tokens,
        SINK_TOKENS=first_tokens.num_tokens if first_tokens is not None else 0,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )
