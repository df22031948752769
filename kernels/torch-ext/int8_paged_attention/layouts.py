"""What native kernels may assume of the tensors whose addresses they get: dtype, device, shape and strides.

C and Triton follow addresses and know nothing of tensors, so every tensor passes through this file on its way to them.
What lives longer than a call, a layer's storage, its first tokens and a step's `Tokens`, is checked once; the rest in
every call, by comparisons that cost a tenth of a microsecond each. Only where one fails does `checks` find out what is
wrong. A layout that a kernel cannot read is copied, or refused where nobody may copy it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .calls import Scoring, Tokens, rows_contiguous
from .checks import (
    FLOAT_DTYPES,
    check_contiguous,
    check_disjoint,
    check_first_layout,
    check_native_geometry,
    check_softcap,
    check_tensor,
    clamp_window,
)
from .first_tokens import FirstTokens
from .formats import INT8
from .storage import KvCacheQuant


class LayerLayout(NamedTuple):
    """Sizes of a layer's storage, whose tensors have been checked."""

    device: torch.device
    num_kv_heads: int
    num_blocks: int
    block_size: int
    head_dim: int
    v_head_dim: int


class TokensLayout(NamedTuple):
    """Sizes of a batch's block table; it and the lengths beside it have been checked."""

    device: torch.device
    batch: int
    max_blocks: int
    table_stride: int


class FirstTokensLayout(NamedTuple):
    """Sizes of first tokens that have been checked."""

    device: torch.device
    batch: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int


def check_layer(storage: KvCacheQuant, backend: str, tile_order: str, *, segments: bool) -> LayerLayout:
    """Check the storage of a layer that ``backend`` is to read, which can read several ``segments`` or cannot."""
    if storage.format != INT8.name:
        raise ValueError(f"backend {backend!r} reads format {INT8.name!r}, not {storage.format!r}")
    if storage.tile_order != tile_order:
        raise ValueError(f"backend {backend!r} reads tile_order {tile_order!r}, not {storage.tile_order!r}")
    device = storage.k.device
    check_tensor(storage.k, "k", shape=(None,) * 4, dtypes=(INT8.dtype,), device=device)
    check_tensor(storage.v, "v", shape=(*storage.k.shape[:3], None), dtypes=(INT8.dtype,), device=device)
    check_native_geometry(storage)
    if storage.more and not segments:
        raise ValueError(f"backend {backend!r} reads storages of one segment, not of {len(storage.segments)}")
    heads, _, size, dim = storage.k.shape
    for segment in storage.segments:
        check_tensor(segment.k, "k", shape=(heads, None, size, dim), dtypes=(INT8.dtype,), device=device)
        slots = (heads, segment.num_blocks, size)
        check_tensor(segment.v, "v", shape=(*slots, storage.v_head_dim), dtypes=(INT8.dtype,), device=device)
        for name, x in (("k_scales", segment.k_scales), ("v_scales", segment.v_scales)):
            check_tensor(x, name, shape=slots, dtypes=(INT8.scale_dtype,), device=device)
        for name, x in segment._asdict().items():
            check_contiguous(x, name)
    if storage.key_center is not None:
        shape = (storage.num_kv_heads, storage.head_dim)
        check_tensor(storage.key_center, "key_center", shape=shape, dtypes=(torch.float32,), device=device)
        check_contiguous(storage.key_center, "key_center")
    return LayerLayout(device, heads, storage.num_blocks, size, storage.head_dim, storage.v_head_dim)


def check_first_tokens(first_tokens: FirstTokens) -> FirstTokensLayout:
    """Check the tensors of first tokens; `check_options` compares their sizes with a call's."""
    k, v, row = first_tokens.k, first_tokens.v, first_tokens.row
    check_tensor(k, "first_tokens.k", shape=(None,) * 4, dtypes=FLOAT_DTYPES, device=k.device)
    check_tensor(v, "first_tokens.v", shape=(*k.shape[:3], None), dtypes=(k.dtype,), device=k.device)
    check_tensor(row, "first_tokens.row", shape=(None,), dtypes=(torch.int32,), device=k.device)
    check_first_layout(first_tokens, len(row), k.shape[1], k.shape[3], v.shape[3], k.device)
    return FirstTokensLayout(k.device, len(row), k.shape[1], k.shape[3], v.shape[3])


def check_tokens(tokens: Tokens) -> TokensLayout:
    """Check the tensors of `Tokens`; the functions below compare their sizes with a call's."""
    table = tokens.block_table
    check_tensor(table, "block_table", shape=(None, None), dtypes=(torch.int32,), device=table.device)
    if table.stride()[-1] != 1 and table.shape[-1] > 1:
        raise ValueError(f"block_table must be contiguous in its last axis, got stride {table.stride()[-1]}")
    for name in ("context_lens_before", "context_lens", "kv_start"):
        x = getattr(tokens, name)
        if x is not None:
            check_tensor(x, name, shape=(len(table),), dtypes=(torch.int32,), device=table.device)
            check_contiguous(x, name)
    clamp_window(tokens.window, 1)
    return TokensLayout(table.device, table.shape[0], table.shape[1], table.stride()[0])


def check_batch(layout: LayerLayout, tokens: TokensLayout, batch: int) -> None:
    """Check that a call's tokens are those of its sequences, beside its storage."""
    if tokens.batch != batch:
        raise ValueError(f"block_table has {tokens.batch} rows, but the call {batch} sequences")
    if tokens.device != layout.device:
        raise ValueError(f"block_table is on {tokens.device}, but the storage is on {layout.device}; move it there")


def check_append(layout: LayerLayout, tokens: TokensLayout, k_new: torch.Tensor, v_new: torch.Tensor) -> None:
    """Check an append; the new rows may have any strides."""
    device, heads, _, _, dim, v_dim = layout
    shape, dtype = k_new.shape, k_new.dtype
    if (
        len(shape) != 4
        or shape[1] != heads
        or shape[3] != dim
        or v_new.shape != (*shape[:3], v_dim)
        or dtype not in FLOAT_DTYPES
        or v_new.dtype is not dtype
        or k_new.device != device
        or v_new.device != device
    ):
        check_tensor(k_new, "k_new", shape=(None, heads, None, dim), dtypes=FLOAT_DTYPES, device=device)
        check_tensor(v_new, "v_new", shape=(*shape[:3], v_dim), dtypes=(dtype,), device=device)
    if shape[0] != tokens[1] or device != tokens[0]:
        check_batch(layout, tokens, shape[0])


def check_queries(layout: LayerLayout, out: torch.Tensor, q: torch.Tensor) -> None:
    """Check queries ``[batch, num_q_heads, rows, head_dim]``, any strides, and the place of their outputs: last axis
    contiguous, and no element's memory is another's."""
    device, heads, _, _, dim, v_dim = layout
    shape, dtype = q.shape, q.dtype
    if (
        len(shape) != 4
        or not shape[1]
        or shape[1] % heads
        or not shape[2]
        or shape[3] != dim
        or out.shape != (*shape[:3], v_dim)
        or dtype not in FLOAT_DTYPES
        or out.dtype is not dtype
        or q.device != device
        or out.device != device
    ):
        check_tensor(q, "q", shape=(None, None, None, dim), dtypes=FLOAT_DTYPES, device=device)
        if not shape[1] or shape[1] % heads:
            raise ValueError(f"q has {shape[1]} heads, which is no multiple of the storage's {heads} KV heads")
        if not shape[2]:
            raise ValueError("q has no rows")
        check_tensor(out, "out", shape=(*shape[:3], v_dim), dtypes=(dtype,), device=device)
    # The cache's layers hand over rows before heads.
    if not out.is_contiguous() and out.stride() != (shape[1] * shape[2] * v_dim, v_dim, shape[1] * v_dim, 1):
        check_disjoint(out, "out")


def check_options(
    layout: LayerLayout, batch: int, num_q_heads: int, scoring: Scoring, held: FirstTokensLayout | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Check what attention may be given beside queries and tokens. Returns ``key_mask``, last axis contiguous, and
    ``sink_logits``, contiguous; copied if not."""
    device = layout.device
    _, softcap, sink_logits, key_mask, _ = scoring
    if key_mask is not None:
        if (
            key_mask.ndim != 2
            or key_mask.shape[0] != batch
            or key_mask.dtype is not torch.bool
            or key_mask.device != device
        ):
            check_tensor(key_mask, "key_mask", shape=(batch, None), dtypes=(torch.bool,), device=device)
        key_mask = rows_contiguous(key_mask)
    if softcap is not None:
        check_softcap(softcap)
    if sink_logits is not None:
        dtypes = (*FLOAT_DTYPES, torch.float64)
        check_tensor(sink_logits, "sink_logits", shape=(num_q_heads,), dtypes=dtypes, device=device)
        sink_logits = sink_logits.contiguous()
    if held is not None and held != (device, batch, layout.num_kv_heads, layout.head_dim, layout[5]):
        want = FirstTokensLayout(device, batch, layout.num_kv_heads, layout.head_dim, layout.v_head_dim)
        raise ValueError(f"first_tokens are {held._asdict()}, but the call is {want._asdict()}")
    return key_mask, sink_logits


def check_attend(
    layout: LayerLayout,
    tokens: TokensLayout,
    out: torch.Tensor,
    q: torch.Tensor,
    scoring: Scoring,
    held: FirstTokensLayout | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Check attention from the blocks. Returns what `check_options` does."""
    check_queries(layout, out, q)
    batch = q.shape[0]
    if batch != tokens[1] or layout[0] != tokens[0]:
        check_batch(layout, tokens, batch)
    if held is None and scoring.key_mask is None and scoring.sink_logits is None and scoring.softcap is None:
        return None, None
    return check_options(layout, batch, q.shape[1], scoring, held)
