"""Paged int8 KV cache kernels: allocate, append, attend, gather, copy.

Pure functions over tensors; they know neither transformers nor a cache class. The names follow the INT8 KV cache of
a Rust inference engine. The memory layout is defined in `storage`, the arithmetic in `reference` and `formats`.
"""

from __future__ import annotations

import torch

from .allocation import alloc_paged_int8_layer, grow_paged_int8_layer
from .backends import (
    BACKENDS,
    Backend,
    backend_of,
    load_backend,
    register_backend,
    resolve_backend,
    why_unavailable,
)
from .calls import MAX_DECODE_ROWS, Scoring, Tokens
from .checks import (
    FLOAT_DTYPES,
    MAX_HEAD_DIM,
    check_block_ids,
    check_destinations,
    check_first_tokens,
    check_lengths,
    check_range,
    check_tensor,
)
from .conditioning import ROTATIONS, mean_key
from .decode_attention import int8_paged_decode_attention
from .first_tokens import MAX_FIRST_TOKENS, FirstTokens
from .formats import FORMATS, INT8, Format, format_called, register_format
from .ragged_attention import int8_paged_ragged_attention
from .storage import (
    TILE_ORDERS,
    KvCacheQuant,
    Segment,
    in_segments,
    read_blocks,
    rows_to_tiles,
    tiles_to_rows,
    write_blocks,
)

__all__ = [
    "BACKENDS",
    "FLOAT_DTYPES",
    "FORMATS",
    "INT8",
    "MAX_DECODE_ROWS",
    "MAX_FIRST_TOKENS",
    "MAX_HEAD_DIM",
    "ROTATIONS",
    "TILE_ORDERS",
    "Backend",
    "FirstTokens",
    "Format",
    "KvCacheQuant",
    "Scoring",
    "Segment",
    "Tokens",
    "alloc_paged_int8_layer",
    "copy_blocks",
    "format_called",
    "gather_dense",
    "grow_paged_int8_layer",
    "in_segments",
    "int8_kv_append_paged",
    "int8_paged_decode_attention",
    "int8_paged_ragged_attention",
    "load_backend",
    "mean_key",
    "read_blocks",
    "register_backend",
    "register_format",
    "resolve_backend",
    "rows_to_tiles",
    "tiles_to_rows",
    "why_unavailable",
    "write_blocks",
]


def int8_kv_append_paged(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    storage: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens_before: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Quantize new keys and values and write them into their slots, in place.

    Row t of sequence b goes to position ``p = context_lens_before[b] + t``, that is slot ``p % block_size`` of block
    ``block_table[b, p // block_size]``. A token whose table entry is negative is not stored.

    Args:
        k_new: ``[batch, num_kv_heads, new_tokens, head_dim]``, float32, float16 or bfloat16, any strides.
        v_new: ``[batch, num_kv_heads, new_tokens, v_head_dim]``, same dtype.
        storage: the layer's storage, modified in place.
        block_table: int32 ``[batch, max_blocks]`` physical block of each logical one, on the storage's device.
        context_lens_before: int32 ``[batch]`` tokens each sequence had before this call.
        backend: name of the backend to use instead of the storage's own: only ``"reference"`` reads others' tiles.

    Raises:
        ValueError: wrong shape, dtype or device; on the CPU also a block id or a length out of range.
            Nothing is written then. On other devices such tokens are dropped, as no call waits for the device.

    Source: ``int8_kv_append_paged`` of the Rust engine; arithmetic in DESIGN.md section 2.
    """
    device, heads = storage.device, storage.num_kv_heads
    check_tensor(block_table, "block_table", shape=(None, None), dtypes=(torch.int32,), device=device)
    batch, max_blocks = block_table.shape
    check_tensor(k_new, "k_new", shape=(batch, heads, None, storage.head_dim), dtypes=FLOAT_DTYPES, device=device)
    tokens = k_new.shape[2]
    check_tensor(v_new, "v_new", shape=(batch, heads, tokens, storage.v_head_dim), dtypes=(k_new.dtype,), device=device)
    check_tensor(context_lens_before, "context_lens_before", shape=(batch,), dtypes=(torch.int32,), device=device)
    check_block_ids(block_table, "block_table", storage.num_blocks)
    check_lengths(context_lens_before, "context_lens_before", max_blocks * storage.block_size, new_tokens=tokens)
    backend_of(storage, backend).append(k_new, v_new, storage, Tokens.at(block_table, context_lens_before))


def gather_dense(
    storage: KvCacheQuant,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype = torch.float32,
    first_tokens: FirstTokens | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize positions ``start`` to ``stop`` of every sequence, as the model computed them: rotation and key
    centre undone.

    Args:
        storage: the layer's storage.
        block_table: int32 ``[batch, max_blocks]``.
        lens: int32 ``[batch]`` tokens per sequence; positions past them, and positions whose table entry is negative,
            are 0.
        start: first position.
        stop: position after the last; default all that the table covers.
        dtype: of the result.
        first_tokens: first tokens in full precision, which take their places.
        backend: name of the backend to use instead of the storage's own: only ``"reference"`` reads others' tiles.

    Returns:
        Keys ``[batch, num_kv_heads, stop - start, head_dim]`` and values
        ``[batch, num_kv_heads, stop - start, v_head_dim]``.

    Raises:
        ValueError: wrong shape, dtype or device; on the CPU also a block id or a length out of range.
    """
    check_tensor(block_table, "block_table", shape=(None, None), dtypes=(torch.int32,), device=storage.device)
    check_tensor(lens, "lens", shape=(block_table.shape[0],), dtypes=(torch.int32,), device=storage.device)
    check_block_ids(block_table, "block_table", storage.num_blocks)
    capacity = block_table.shape[1] * storage.block_size
    check_lengths(lens, "lens", capacity)
    start, stop = check_range(start, stop, capacity)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if first_tokens is not None:
        check_first_tokens(first_tokens, storage, len(block_table))
    k, v = backend_of(storage, backend).gather(storage, Tokens.at(block_table, lens), start, stop, dtype)
    return (k, v) if first_tokens is None else first_tokens.put_both(k, v, start)


def copy_blocks(storage: KvCacheQuant, src: torch.Tensor, dst: torch.Tensor, *, backend: str | None = None) -> None:
    """Copy whole blocks, all heads, values and scales: block ``dst[i]`` becomes block ``src[i]``, in place.

    Args:
        storage: the layer's storage, modified in place.
        src: int32 ``[count]`` block ids to read.
        dst: int32 ``[count]`` block ids to write: no id twice, and none that stands in ``src``.

    Raises:
        ValueError: wrong shape, dtype or device; on the CPU also an id out of range, or one that is copied to twice
            or copied from and to.
    """
    check_tensor(src, "src", shape=(None,), dtypes=(torch.int32,), device=storage.device)
    check_tensor(dst, "dst", shape=(src.shape[0],), dtypes=(torch.int32,), device=storage.device)
    for name, ids in (("src", src), ("dst", dst)):
        check_block_ids(ids, name, storage.num_blocks, lowest=0)
    check_destinations(src, dst)
    backend_of(storage, backend).copy(storage, src, dst)
