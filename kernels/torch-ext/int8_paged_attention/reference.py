"""The oracle: every kernel in plain torch, on any device, any format and any tile order. Correct first, fast never."""

from __future__ import annotations

import torch

from .calls import Scoring, Tokens
from .conditioning import (
    condition_keys,
    condition_query,
    condition_values,
    restore_keys,
    restore_output,
)
from .first_tokens import FirstTokens
from .formats import FORMATS as FORMATS
from .formats import format_called
from .ragged import append_ragged, attend_ragged
from .storage import KvCacheQuant, Segment, in_segments, read_blocks, tiles_to_rows, write_blocks, write_rows

NAME = "reference"
TILE_ORDER = "row_major"
LONG_CHUNKS = False
SEGMENTS = True


def unavailable(device: torch.device, block_size: int, head_dim: int, v_head_dim: int) -> str | None:
    """Why this backend cannot serve such a layer, or None if it can. The reference always can."""
    return None


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, filled_slowly: bool = False
) -> torch.Tensor:
    """Uninitialised memory for a layer's storage."""
    return torch.empty(shape, dtype=dtype, device=device)


def filled(segment: Segment) -> None:
    """Nothing: its memory is like any other."""


def append(k_new: torch.Tensor, v_new: torch.Tensor, storage: KvCacheQuant, tokens: Tokens) -> None:
    """Quantize new rows and write them into their slots, in place; see ``int8_kv_append_paged``.

    Args:
        k_new: ``[batch, num_kv_heads, new_tokens, head_dim]``, float32, float16 or bfloat16.
        v_new: ``[batch, num_kv_heads, new_tokens, v_head_dim]``, same dtype.
        storage: the layer's, modified in place.
        tokens: the first new token stands at ``tokens.context_lens_before``. With ``cu_seqlens_q`` the rows are packed:
            ``[total_rows, num_kv_heads, dim]``.
    """
    if tokens.cu_seqlens_q is not None:
        return append_ragged(append, k_new, v_new, storage, tokens)
    positions = tokens.context_lens_before.long()[:, None] + torch.arange(k_new.shape[2], device=storage.device)
    blocks = tokens.block_table.long().gather(1, positions // storage.block_size)  # [batch, new_tokens]
    kept = ((blocks >= 0) & (blocks < storage.num_blocks)).flatten()
    blocks = blocks.flatten()[kept]
    slots = (positions % storage.block_size).flatten()[kept]
    for new, condition, values in ((k_new, condition_keys, False), (v_new, condition_values, True)):
        rows, row_scales = format_called(storage.format).quantize(condition(new.to(torch.float32), storage))
        rows = rows.transpose(0, 1).flatten(1, 2)[:, kept]  # [num_kv_heads, tokens of all sequences, dim]
        row_scales = row_scales.transpose(0, 1).flatten(1, 2)[:, kept]
        for segment, here, own in in_segments(storage, blocks):
            store, scales = (segment.v, segment.v_scales) if values else (segment.k, segment.k_scales)
            write_rows(store, storage.tile_order, own, slots[here], rows[:, here], values=values)
            scales[:, own, slots[here]] = row_scales[:, here]


def gather_quantized(
    storage: KvCacheQuant, block_table: torch.Tensor, lens: torch.Tensor, start: int, stop: int, *, values: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stored rows of positions ``start`` to ``stop``, in token order, still in the conditioned domain.

    Returns:
        Stored rows ``[batch, num_kv_heads, stop - start, dim]``; their scales ``[batch, num_kv_heads, stop - start]``;
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
        return store.new_zeros(*shape, store.shape[-1]), scales.new_zeros(shape), present
    read = read_blocks(storage, blocks.clamp(0, storage.num_blocks - 1).flatten())
    tiles, tile_scales = (read.v, read.v_scales) if values else (read.k, read.k_scales)
    tiles = tiles_to_rows(tiles, storage.tile_order, values=values)  # [num_kv_heads, batch * blocks, block_size, dim]
    rows = tiles.unflatten(1, blocks.shape).flatten(2, 3).transpose(0, 1)
    row_scales = tile_scales.unflatten(1, blocks.shape).flatten(2, 3).transpose(0, 1)
    inside = slice(start - first * storage.block_size, stop - first * storage.block_size)
    rows = torch.where(present[:, None, :, None], rows[:, :, inside], 0)
    row_scales = torch.where(present[:, None], row_scales[:, :, inside], 0.0)
    return rows, row_scales, present


def gather(
    storage: KvCacheQuant, tokens: Tokens, start: int, stop: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense keys ``[batch, num_kv_heads, stop - start, head_dim]`` and values of positions ``start`` to ``stop``; see
    ``gather_dense``. Positions from ``tokens.context_lens`` on, and those in holes, are 0."""
    there, dense = None, []
    for restore, values in ((restore_keys, False), (restore_output, True)):
        rows, scales, there = gather_quantized(
            storage, tokens.block_table, tokens.context_lens, start, stop, values=values
        )
        restored = restore(format_called(storage.format).restore(rows, scales, torch.float32), storage)
        dense.append(torch.where(there[:, None, :, None], restored, 0.0).to(dtype))
    return dense[0], dense[1]


def attend(
    out: torch.Tensor,
    q: torch.Tensor,
    storage: KvCacheQuant,
    tokens: Tokens,
    scoring: Scoring,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    first_tokens: FirstTokens | None = None,
) -> None:
    """Attention of every sequence's newest rows over all that they see; ``int8_paged_decode_attention`` lists it.

    Without ``fresh`` all keys come from the blocks: the rows' own tokens have been appended, and row i stands at
    position ``tokens.context_lens - q_len + i``. With ``fresh`` the blocks hold the past, row i stands at
    ``tokens.context_lens_before + i``, and the rows' own keys and values are those given; blocks of later positions are
    not read, so that it makes no difference whether the rows have been appended already.

    Args:
        out: ``[batch, num_q_heads, q_len, v_head_dim]`` of q's dtype, written to.
        q: ``[batch, num_q_heads, q_len, head_dim]``; float64 computes in float64, others in float32.
        storage: the layer's.
        tokens: where the sequences' tokens are. With ``cu_seqlens_q`` queries, outputs and fresh rows are packed:
            ``[total_rows, heads, dim]`` (`ragged.attend_ragged`).
        scoring: how they are scored.
        fresh: keys ``[batch, num_kv_heads, q_len, head_dim]`` and values ``[batch, num_kv_heads, q_len, v_head_dim]``
            of the rows' own tokens, as the model computed them.
        first_tokens: in full precision; with ``fresh`` all of them stand in the past.
    """
    if tokens.cu_seqlens_q is not None:
        return attend_ragged(attend, out, q, storage, tokens, scoring, fresh, first_tokens)
    batch, num_q_heads, q_len, head_dim = q.shape
    group = num_q_heads // storage.num_kv_heads
    lens = tokens.context_lens if fresh is None else tokens.context_lens_before
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = torch.arange(tokens.block_table.shape[1] * storage.block_size, device=q.device).expand(batch, -1)
    positions = lens[:, None] - (q_len if fresh is None else 0) + torch.arange(q_len, device=q.device)
    k, v, v_faulty, present = _stored(storage, tokens.block_table, lens, compute)
    if first_tokens is not None:
        first = _conditioned(first_tokens.k, first_tokens.v, storage, compute)
        for dense, rows in zip((k, v, v_faulty[..., None]), first, strict=True):
            first_tokens.put_into(dense, rows, 0)
        present |= first_tokens.covers(keys) & (keys < lens[:, None])
    if fresh is not None:
        k_new, v_new, faulty = _conditioned(*fresh, storage, compute)
        k, v, v_faulty = torch.cat([k, k_new], 2), torch.cat([v, v_new], 2), torch.cat([v_faulty, faulty[..., 0]], 2)
        keys = torch.cat([keys, positions], 1)
        present = torch.cat([present, present.new_ones(batch, q_len)], 1)

    q_rows = q.to(compute).reshape(batch, storage.num_kv_heads, group, q_len, head_dim)
    # [batch, kv_heads, group, q_len, keys]
    scores = scoring.scale * (condition_query(q_rows, storage) @ k[:, :, None].transpose(-1, -2))
    if storage.key_center is not None:
        scores = scores + scoring.scale * (q_rows @ storage.key_center.to(compute)[:, None, :, None])
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    visible = _visible(keys, positions, present, tokens, scoring)  # [batch, q_len, keys]
    if first_tokens is not None:
        visible &= (first_tokens.covers(keys) | (keys >= first_tokens.stop[:, None]))[:, None]
    visible = visible[:, None, None]
    scores = scores.masked_fill(~visible, -torch.inf)

    highest = scores.amax(-1, keepdim=True) if keys.shape[1] else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    if scoring.sink_logits is not None:
        sink = scoring.sink_logits.to(compute).reshape(1, storage.num_kv_heads, group, 1, 1)
        highest = torch.maximum(highest, sink)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    if scoring.sink_logits is not None:
        total = total + torch.exp(sink - highest)
    weights = weights / total.masked_fill(total == 0, 1.0)
    result = weights @ v[:, :, None]
    sees_fault = (visible & v_faulty[:, :, None, None]).any(-1, keepdim=True)
    result = result.masked_fill(sees_fault, torch.nan)
    out.copy_(restore_output(result, storage).reshape(batch, num_q_heads, q_len, storage.v_head_dim))


def _stored(
    storage: KvCacheQuant, block_table: torch.Tensor, lens: torch.Tensor, compute: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the blocks hold of all positions of the table, in the conditioned domain: keys and values
    ``[batch, num_kv_heads, positions, dim]``, which values are faulty (and 0), and where there is a token."""
    stop, form = block_table.shape[1] * storage.block_size, format_called(storage.format)
    k, k_scales, present = gather_quantized(storage, block_table, lens, 0, stop, values=False)
    v, v_scales, _ = gather_quantized(storage, block_table, lens, 0, stop, values=True)
    # 0 * NaN is NaN: a faulty value row may reach only the queries that see it.
    v_faulty = ~v_scales.isfinite()
    v = form.restore(v, v_scales.masked_fill(v_faulty, 0.0), compute)
    return form.restore(k, k_scales, compute), v, v_faulty, present


def _conditioned(
    k: torch.Tensor, v: torch.Tensor, storage: KvCacheQuant, compute: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values in full precision, ``[rows, num_kv_heads, tokens, dim]``, in the domain of the stored ones; and
    which values are faulty, ``[rows, num_kv_heads, tokens, 1]``. A faulty key is NaN all over, a faulty value 0."""
    k, v = k.to(compute), v.to(compute)
    k_sound, v_sound = (x.isfinite().all(-1, keepdim=True) for x in (k, v))
    k = condition_keys(k.masked_fill(~k_sound, torch.nan), storage)
    return k, condition_values(v.masked_fill(~v_sound, 0.0), storage), ~v_sound


def _visible(
    keys: torch.Tensor, positions: torch.Tensor, present: torch.Tensor, tokens: Tokens, scoring: Scoring
) -> torch.Tensor:
    """Which keys, at positions ``[batch, keys]``, rows at ``positions`` ``[batch, q_len]`` see, but for what first
    tokens hide: bool ``[batch, q_len, keys]``."""
    visible = present[:, None] & (keys[:, None] <= positions[..., None])
    if tokens.kv_start is not None:
        visible &= (keys >= tokens.kv_start[:, None])[:, None]
    if tokens.window is not None:
        visible &= keys[:, None] > positions[..., None] - tokens.window
    if scoring.key_mask is not None:
        width = scoring.key_mask.shape[1]
        columns = keys - scoring.key_mask_start
        seen = (columns >= 0) & (columns < width)
        if width:
            seen &= scoring.key_mask.gather(1, columns.clamp(0, width - 1))
        visible &= seen[:, None]
    return visible


def copy(storage: KvCacheQuant, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy whole blocks, all heads, in place; see ``copy_blocks``."""
    write_blocks(storage, dst.long(), read_blocks(storage, src.long()))
