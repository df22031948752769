"""Paged int8 KV cache kernels: allocate, append, attend, gather, copy.

Pure functions over tensors; they know neither transformers nor a cache class. The names follow the INT8 KV cache of
a Rust inference engine. The memory layout is defined in `storage`, the arithmetic in `reference`.
"""

from __future__ import annotations

import torch

from .backends import BACKENDS, load_backend, resolve_backend, why_unavailable
from .checks import (
    FLOAT_DTYPES,
    MAX_HEAD_DIM,
    check_block_ids,
    check_destinations,
    check_geometry,
    check_lengths,
    check_sink_tokens,
    check_tensor,
)
from .conditioning import ROTATIONS, mean_key
from .sink_tokens import MAX_SINK_TOKENS, SinkTokens
from .storage import TILE_ORDERS, KvCacheQuant

__all__ = [
    "BACKENDS",
    "FLOAT_DTYPES",
    "MAX_DECODE_ROWS",
    "MAX_HEAD_DIM",
    "MAX_SINK_TOKENS",
    "ROTATIONS",
    "TILE_ORDERS",
    "KvCacheQuant",
    "SinkTokens",
    "alloc_paged_int8_layer",
    "copy_blocks",
    "gather_dense",
    "int8_kv_append_paged",
    "int8_paged_decode_attention",
    "load_backend",
    "mean_key",
    "resolve_backend",
    "why_unavailable",
]

#: Most query rows per sequence that one decode call takes.
MAX_DECODE_ROWS = 16


def alloc_paged_int8_layer(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    v_head_dim: int | None = None,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    tile_order: str | None = None,
    rotation: str | None = None,
    center_keys: bool = False,
) -> KvCacheQuant:
    """Allocate the storage of one attention layer.

    The memory is uninitialised: no function reads a slot before a token was appended there.

    Args:
        num_blocks: blocks to allocate; 0 is allowed.
        block_size: tokens per block, a multiple of 16.
        num_kv_heads: key/value heads.
        head_dim: elements of a key row, at most 1024. Rows of more than 256 are served by the reference backend.
        v_head_dim: elements of a value row; default ``head_dim``.
        device: where the blocks live.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; ``None`` takes the best one for the device.
        tile_order: one of ``TILE_ORDERS``; default the backend's own, the only one it reads unless it is the reference.
        rotation: ``"hadamard"`` rotates rows before quantization; ``None`` does not.
        center_keys: allocate a key centre, zero at first (``cache.key_center``). Set its values before the
            first append.

    Returns:
        The storage.

    Raises:
        ValueError: impossible sizes, an unknown name, or a backend that cannot serve this device or geometry.
    """
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    check_geometry(num_blocks, block_size, num_kv_heads, head_dim, v_head_dim)
    if rotation is not None and rotation not in ROTATIONS:
        raise ValueError(f"unknown rotation {rotation!r}; choose one of {', '.join(ROTATIONS)}, or None")
    device = torch.device(device)
    module = resolve_backend(backend, device, block_size, head_dim, v_head_dim)
    order = module.TILE_ORDER if tile_order is None else tile_order
    if order not in TILE_ORDERS:
        raise ValueError(f"unknown tile_order {tile_order!r}; choose one of {', '.join(TILE_ORDERS)}")
    if order != module.TILE_ORDER and module.NAME != "reference":
        raise ValueError(f"backend {module.NAME!r} reads tile_order {module.TILE_ORDER!r}, not {order!r}")
    if order == "dot4" and head_dim % 4:
        raise ValueError(f"tile_order 'dot4' needs a head_dim that is a multiple of 4, got {head_dim}")
    slots = (num_kv_heads, num_blocks, block_size)
    return KvCacheQuant(
        k=module.empty((*slots, head_dim), torch.int8, device),
        v=module.empty((*slots, v_head_dim), torch.int8, device),
        k_scales=module.empty(slots, torch.float16, device),
        v_scales=module.empty(slots, torch.float16, device),
        backend=module.NAME,
        tile_order=order,
        rotation=rotation,
        key_center=torch.zeros(num_kv_heads, head_dim, device=device) if center_keys else None,
    )


def int8_kv_append_paged(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    cache: KvCacheQuant,
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
        cache: the layer's storage, modified in place.
        block_table: int32 ``[batch, max_blocks]`` physical block of each logical one, on the cache's device.
        context_lens_before: int32 ``[batch]`` tokens each sequence had before this call.
        backend: name of the backend to use instead of the storage's own: only ``"reference"`` reads others' tiles.

    Raises:
        ValueError: wrong shape, dtype or device; on the CPU also a block id or a length out of range.
            Nothing is written then. On other devices such tokens are dropped, as no call waits for the device.

    Source: ``int8_kv_append_paged`` of the Rust engine; arithmetic in DESIGN.md section 2.
    """
    device, heads = cache.device, cache.num_kv_heads
    check_tensor(block_table, "block_table", shape=(None, None), dtypes=(torch.int32,), device=device)
    batch, max_blocks = block_table.shape
    check_tensor(k_new, "k_new", shape=(batch, heads, None, cache.head_dim), dtypes=FLOAT_DTYPES, device=device)
    tokens = k_new.shape[2]
    check_tensor(v_new, "v_new", shape=(batch, heads, tokens, cache.v_head_dim), dtypes=(k_new.dtype,), device=device)
    check_tensor(context_lens_before, "context_lens_before", shape=(batch,), dtypes=(torch.int32,), device=device)
    check_block_ids(block_table, "block_table", cache.num_blocks)
    check_lengths(context_lens_before, "context_lens_before", max_blocks * cache.block_size, new_tokens=tokens)
    _backend_of(cache, backend).append(k_new, v_new, cache, block_table, context_lens_before)


def int8_paged_decode_attention(
    q: torch.Tensor,
    cache: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    kv_start: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    key_mask_start: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    sink_tokens: SinkTokens | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of the last ``q_len`` positions over the whole paged context, straight from the int8 blocks.

    Query row i of sequence b stands at position ``p = context_lens[b] - q_len + i`` and sees the keys j with

    * ``j <= p``, ``j < context_lens[b]``, and a table entry that is not negative;
    * ``j >= kv_start[b]``, if given;
    * ``j > p - window``, if given;
    * ``key_mask[b, j - key_mask_start]``, if given; columns outside the mask count as False.

    With ``sink_tokens`` the first tokens are read from there, in full precision, whether or not the table has them.

    ``out = softmax(softcap * tanh(scale * q.k / softcap)) . v``, with the head's sink logit in the
    softmax's denominator. A row that sees no key is 0. A key or value row that held NaN or infinity makes the
    rows that see it NaN, and no others.

    Args:
        q: ``[batch, num_q_heads, q_len, head_dim]``, float32, float16 or bfloat16; ``num_q_heads`` a multiple of
            ``num_kv_heads``; q_len 1 to 16. Query head h reads key/value head ``h * num_kv_heads // num_q_heads``.
        cache: the layer's storage; the q_len tokens have been appended.
        block_table: int32 ``[batch, max_blocks]``.
        context_lens: int32 ``[batch]``, the q_len tokens included.
        scale: factor on q.k, usually ``head_dim ** -0.5``.
        kv_start: int32 ``[batch]`` first position to read: left padding is skipped, not read and masked.
        key_mask: bool ``[batch, columns]``, True where a key may be seen.
        key_mask_start: position of the mask's first column.
        window: sliding window in tokens, the row's own position included.
        softcap: bound on the scores, as in Gemma 2.
        sinks: ``[num_q_heads]`` logits, as in gpt-oss.
        sink_tokens: first tokens in full precision (`SinkTokens`).
        out: ``[batch, num_q_heads, q_len, v_head_dim]`` of q's dtype to write to, last axis contiguous.
        backend: name of the backend to use instead of the storage's own: only ``"reference"`` reads others' tiles. It
            also takes a float64 q and then computes in float64.

    Returns:
        ``out``.

    Raises:
        ValueError: wrong shape, dtype or device; on the CPU also a block id or a length out of range.
            On other devices such blocks are not read.

    Source: ``int8_paged_decode_attention`` of the Rust engine; tests/kernels/test_decode.py shows its use.
    """
    device = cache.device
    check_tensor(block_table, "block_table", shape=(None, None), dtypes=(torch.int32,), device=device)
    batch = block_table.shape[0]
    module = _backend_of(cache, backend)
    dtypes = (*FLOAT_DTYPES, torch.float64) if module.NAME == "reference" else FLOAT_DTYPES
    check_tensor(q, "q", shape=(batch, None, None, cache.head_dim), dtypes=dtypes, device=device)
    num_q_heads, q_len = q.shape[1:3]
    if num_q_heads == 0 or num_q_heads % cache.num_kv_heads:
        raise ValueError(
            f"q has {num_q_heads} heads, which is no multiple of the cache's {cache.num_kv_heads} KV heads"
        )
    if not 1 <= q_len <= MAX_DECODE_ROWS:
        raise ValueError(
            f"q_len must be between 1 and {MAX_DECODE_ROWS}, got {q_len}; gather_dense serves longer chunks"
        )
    check_tensor(block_table, "block_table", shape=(None, None), dtypes=(torch.int32,), device=device)
    check_tensor(context_lens, "context_lens", shape=(batch,), dtypes=(torch.int32,), device=device)
    check_block_ids(block_table, "block_table", cache.num_blocks)
    check_lengths(context_lens, "context_lens", block_table.shape[1] * cache.block_size)
    if kv_start is not None:
        check_tensor(kv_start, "kv_start", shape=(batch,), dtypes=(torch.int32,), device=device)
    if key_mask is not None:
        check_tensor(key_mask, "key_mask", shape=(batch, None), dtypes=(torch.bool,), device=device)
    if sinks is not None:
        check_tensor(sinks, "sinks", shape=(num_q_heads,), dtypes=dtypes, device=device)
    if sink_tokens is not None:
        check_sink_tokens(sink_tokens, cache, batch)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    shape = (batch, num_q_heads, q_len, cache.v_head_dim)
    if out is None:
        out = torch.empty(shape, dtype=q.dtype, device=device)
    else:
        check_tensor(out, "out", shape=shape, dtypes=(q.dtype,), device=device)
        if out.stride(-1) != 1:
            raise ValueError(f"out must be contiguous in its last axis, got stride {out.stride(-1)}")
    module.decode(
        out, q, cache, block_table, context_lens, scale, kv_start, key_mask, key_mask_start, window, softcap, sinks,
        sink_tokens,
    )  # fmt: skip
    return out


def gather_dense(
    cache: KvCacheQuant,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype = torch.float32,
    sink_tokens: SinkTokens | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize positions ``start`` to ``stop`` of every sequence, as the model computed them: rotation and key
    centre undone.

    Args:
        cache: the layer's storage.
        block_table: int32 ``[batch, max_blocks]``.
        lens: int32 ``[batch]`` tokens per sequence; positions past them, and positions whose table entry is negative,
            are 0.
        start: first position.
        stop: position after the last; default all that the table covers.
        dtype: of the result.
        sink_tokens: first tokens in full precision, which take their places.
        backend: name of the backend to use instead of the storage's own: only ``"reference"`` reads others' tiles.

    Returns:
        Keys ``[batch, num_kv_heads, stop - start, head_dim]`` and values
        ``[batch, num_kv_heads, stop - start, v_head_dim]``.

    Raises:
        ValueError: wrong shape, dtype or device; on the CPU also a block id or a length out of range.
    """
    check_tensor(block_table, "block_table", shape=(None, None), dtypes=(torch.int32,), device=cache.device)
    check_tensor(lens, "lens", shape=(block_table.shape[0],), dtypes=(torch.int32,), device=cache.device)
    check_block_ids(block_table, "block_table", cache.num_blocks)
    capacity = block_table.shape[1] * cache.block_size
    check_lengths(lens, "lens", capacity)
    stop = capacity if stop is None else stop
    if not 0 <= start <= stop <= capacity:
        raise ValueError(f"need 0 <= start <= stop <= {capacity} (what block_table covers), got {start} and {stop}")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if sink_tokens is not None:
        check_sink_tokens(sink_tokens, cache, len(block_table))
    k, v = _backend_of(cache, backend).gather(cache, block_table, lens, start, stop, dtype)
    return (k, v) if sink_tokens is None else sink_tokens.put_both(k, v, start)


def copy_blocks(cache: KvCacheQuant, src: torch.Tensor, dst: torch.Tensor, *, backend: str | None = None) -> None:
    """Copy whole blocks, all heads, values and scales: block ``dst[i]`` becomes block ``src[i]``, in place.

    Args:
        cache: the layer's storage, modified in place.
        src: int32 ``[count]`` block ids to read.
        dst: int32 ``[count]`` block ids to write: no id twice, and none that stands in ``src``.

    Raises:
        ValueError: wrong shape, dtype or device; on the CPU also an id out of range, or one that is copied to twice
            or copied from and to.
    """
    check_tensor(src, "src", shape=(None,), dtypes=(torch.int32,), device=cache.device)
    check_tensor(dst, "dst", shape=(src.shape[0],), dtypes=(torch.int32,), device=cache.device)
    for name, ids in (("src", src), ("dst", dst)):
        check_block_ids(ids, name, cache.num_blocks, lowest=0)
    check_destinations(src, dst)
    _backend_of(cache, backend).copy(cache, src, dst)


def _backend_of(cache: KvCacheQuant, override: str | None):
    if override is None or override == cache.backend:
        return load_backend(cache.backend)
    if override != "reference":
        raise ValueError(
            f"the cache's tiles belong to backend {cache.backend!r}; only 'reference' reads others' tiles, "
            f"not {override!r}"
        )
    return load_backend("reference")
