"""The oracle: every kernel in plain torch, on any device and any tile order. Correct first, fast never."""

from __future__ import annotations

import torch

from .conditioning import (
    condition_keys,
    condition_query,
    condition_values,
    restore_keys,
    restore_output,
)
from .first_tokens import FirstTokens
from .storage import KvCacheQuant, tiles_to_rows, write_rows

NAME = "reference"
TILE_ORDER = "row_major"
FLOAT16_MAX = 65504.0


def unavailable(device: torch.device, block_size: int, head_dim: int, v_head_dim: int) -> str | None:
    """Why this backend cannot serve such a layer, or None if it can. The reference always can."""
    return None


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for a layer's storage."""
    return torch.empty(shape, dtype=dtype, device=device)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to int8 with one float16 scale each (DESIGN.md section 2).

    ``scale = float16(max|x| / 127)``, ``q = clamp(round_half_even(x / float32(scale)), -127, 127)``.
    A zero scale gives q = 0; a row that holds NaN or infinity gets scale NaN and q = 0; a scale above float16's
    largest number saturates there, and the row clips.

    Args:
        x: float32 ``[..., dim]``.

    Returns:
        int8 ``[..., dim]`` and float16 ``[...]``.
    """
    largest = x.abs().amax(dim=-1)
    # amax passes NaN on; infinity is a fault of the same kind.
    finite = largest < torch.inf
    scales = (largest / 127).clamp(max=FLOAT16_MAX).to(torch.float16)
    usable = finite & (scales > 0)
    divisor = torch.where(usable, scales.to(torch.float32), 1.0)[..., None]
    q = torch.round(torch.where(usable[..., None], x, 0.0) / divisor).clamp(-127, 127).to(torch.int8)
    return q, torch.where(finite, scales, torch.nan)


def append(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    storage: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens_before: torch.Tensor,
) -> None:
    tokens = k_new.shape[2]
    positions = context_lens_before.long()[:, None] + torch.arange(tokens, device=storage.device)  # [batch, tokens]
    blocks = block_table.long().gather(1, positions // storage.block_size)
    kept = ((blocks >= 0) & (blocks < storage.num_blocks)).flatten()
    blocks = blocks.flatten()[kept]
    slots = (positions % storage.block_size).flatten()[kept]
    for new, store, scales, condition, values in (
        (k_new, storage.k, storage.k_scales, condition_keys, False),
        (v_new, storage.v, storage.v_scales, condition_values, True),
    ):
        q, s = quantize_rows(condition(new.to(torch.float32), storage))
        q = q.transpose(0, 1).flatten(1, 2)[:, kept]  # [num_kv_heads, tokens of all sequences, dim]
        write_rows(store, storage.tile_order, blocks, slots, q, values=values)
        scales[:, blocks, slots] = s.transpose(0, 1).flatten(1, 2)[:, kept]


def gather_quantized(
    storage: KvCacheQuant, block_table: torch.Tensor, lens: torch.Tensor, start: int, stop: int, *, values: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stored rows of positions ``start`` to ``stop``, in token order, still in the conditioned domain.

    Returns:
        int8 ``[batch, num_kv_heads, stop - start, dim]``; float32 scales ``[batch, num_kv_heads, stop - start]``;
        bool ``[batch, stop - start]``, False where there is no token (past the length, or in a hole), where rows
        and scales are 0.
    """
    store, scales = (storage.v, storage.v_scales) if values else (storage.k, storage.k_scales)
    first, last = start // storage.block_size, -(-stop // storage.block_size)
    blocks = block_table[:, first:last].long()
    in_pool = (blocks >= 0) & (blocks < storage.num_blocks)
    positions = torch.arange(start, stop, device=storage.device)
    present = positions < lens[:, None]
    present &= in_pool.repeat_interleave(storage.block_size, 1)[:, start - first * storage.block_size :][
        :, : stop - start
    ]
    if not storage.num_blocks or not blocks.numel():
        shape = (len(block_table), storage.num_kv_heads, stop - start)
        return store.new_zeros(*shape, store.shape[-1]), scales.new_zeros(shape, dtype=torch.float32), present
    tiles = store[:, blocks.clamp(0, storage.num_blocks - 1)]  # [num_kv_heads, batch, blocks, block_size, dim]
    rows = tiles_to_rows(tiles, storage.tile_order, values=values).flatten(2, 3).transpose(0, 1)
    row_scales = scales[:, blocks.clamp(0, storage.num_blocks - 1)].flatten(2, 3).transpose(0, 1)
    inside = slice(start - first * storage.block_size, stop - first * storage.block_size)
    rows = torch.where(present[:, None, :, None], rows[:, :, inside], 0)
    row_scales = torch.where(present[:, None], row_scales[:, :, inside].to(torch.float32), 0.0)
    return rows, row_scales, present


def gather(
    storage: KvCacheQuant, block_table: torch.Tensor, lens: torch.Tensor, start: int, stop: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    k, k_scales, present = gather_quantized(storage, block_table, lens, start, stop, values=False)
    v, v_scales, _ = gather_quantized(storage, block_table, lens, start, stop, values=True)
    k_dense = restore_keys(k.to(torch.float32) * k_scales[..., None], storage)
    v_dense = restore_output(v.to(torch.float32) * v_scales[..., None], storage)
    there = present[:, None, :, None]
    return torch.where(there, k_dense, 0.0).to(dtype), torch.where(there, v_dense, 0.0).to(dtype)


def decode(
    out: torch.Tensor,
    q: torch.Tensor,
    storage: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_mask_start: int,
    window: int | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    first_tokens: FirstTokens | None = None,
) -> None:
    batch, num_q_heads, q_len, head_dim = q.shape
    group = num_q_heads // storage.num_kv_heads
    length = block_table.shape[1] * storage.block_size
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, k_scales, present = gather_quantized(storage, block_table, context_lens, 0, length, values=False)
    v, v_scales, _ = gather_quantized(storage, block_table, context_lens, 0, length, values=True)
    q_rows = q.to(compute).reshape(batch, storage.num_kv_heads, group, q_len, head_dim)
    k_dense = k.to(compute) * k_scales[..., None].to(compute)
    # 0 * NaN is NaN: a faulty value row may reach only the queries that see it.
    v_faulty = ~v_scales.isfinite()
    v_dense = v.to(compute) * v_scales.masked_fill(v_faulty, 0.0)[..., None].to(compute)
    keys = torch.arange(length, device=q.device)
    if first_tokens is not None:
        k_first, v_first = first_tokens.k.to(compute), first_tokens.v.to(compute)
        k_sound, v_sound = (x.isfinite().all(-1, keepdim=True) for x in (k_first, v_first))
        first_tokens.put_into(k_dense, condition_keys(k_first.masked_fill(~k_sound, torch.nan), storage), 0)
        first_tokens.put_into(v_dense, condition_values(v_first.masked_fill(~v_sound, 0.0), storage), 0)
        first_tokens.put_into(v_faulty[..., None], ~v_sound, 0)
        present |= first_tokens.covers(keys)
    # [batch, kv_heads, group, q_len, length]
    scores = scale * (condition_query(q_rows, storage) @ k_dense[:, :, None].transpose(-1, -2))
    if storage.key_center is not None:
        scores = scores + scale * (q_rows @ storage.key_center.to(compute)[:, None, :, None])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    positions = context_lens[:, None] - q_len + torch.arange(q_len, device=q.device)  # [batch, q_len]
    visible = present[:, None] & (keys <= positions[..., None])  # [batch, q_len, length]
    if kv_start is not None:
        visible &= keys >= kv_start[:, None, None]
    if first_tokens is not None:
        visible &= (first_tokens.covers(keys) | (keys >= first_tokens.stop[:, None]))[:, None]
    if window is not None:
        visible &= keys > positions[..., None] - window
    if key_mask is not None:
        columns = keys - key_mask_start
        known = (columns >= 0) & (columns < key_mask.shape[1])
        if key_mask.shape[1]:
            visible &= (known & key_mask[:, columns.clamp(0, key_mask.shape[1] - 1)])[:, None]
        else:
            visible &= False
    visible = visible[:, None, None]
    scores = scores.masked_fill(~visible, -torch.inf)

    highest = scores.amax(-1, keepdim=True) if length else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    if sink_logits is not None:
        sink = sink_logits.to(compute).reshape(1, storage.num_kv_heads, group, 1, 1)
        highest = torch.maximum(highest, sink)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + torch.exp(sink - highest)
    weights = weights / total.masked_fill(total == 0, 1.0)
    result = weights @ v_dense[:, :, None]
    sees_fault = (visible & v_faulty[:, :, None, None]).any(-1, keepdim=True)
    result = result.masked_fill(sees_fault, torch.nan)
    out.copy_(restore_output(result, storage).reshape(batch, num_q_heads, q_len, storage.v_head_dim))


def copy(storage: KvCacheQuant, src: torch.Tensor, dst: torch.Tensor) -> None:
    for store in (storage.k, storage.v, storage.k_scales, storage.v_scales):
        store[:, dst.long()] = store[:, src.long()]
