"""What native kernels may assume of the tensors whose addresses they get: dtype, device, shape and strides.

C and Triton follow addresses and know nothing of tensors, so every tensor passes through this file on its way to them.
What lives longer than a step, a layer's storage and its first tokens, is checked once; the rest in every call, by
comparisons that cost a tenth of a microsecond each. Only where one fails does `checks` find out what is wrong. A layout
that a kernel cannot read is copied, or refused where nobody may copy it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

from .checks import (
    FLOAT_DTYPES,
    check_contiguous,
    check_disjoint,
    check_native_geometry,
    check_sink_layout,
    check_softcap,
    check_tensor,
)
from .sink_tokens import SinkTokens
from .storage import KvCacheQuant

K = TypeVar("K")
V = TypeVar("V")


class OncePerObject(Generic[K, V]):
    """What ``make`` answers for an object, asked once per object and forgotten together with it."""

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make = make
        self._known: dict[int, tuple[V, weakref.ref]] = {}

    def __call__(self, x: K) -> V:
        entry = self._known.get(id(x))
        return self._add(x) if entry is None else entry[0]

    def _add(self, x: K) -> V:
        value, key = self._make(x), id(x)
        # No Python runs when the object goes: an exception in there would leave addresses of memory that is no more.
        self._known[key] = (value, weakref.ref(x, functools.partial(self._known.pop, key)))
        return value


class LayerLayout(NamedTuple):
    """Sizes of a layer's storage, whose tensors have been checked."""

    device: torch.device
    num_kv_heads: int
    num_blocks: int
    block_size: int
    head_dim: int
    v_head_dim: int


class SinkLayout(NamedTuple):
    """Sizes of first tokens that have been checked."""

    device: torch.device
    batch: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int


def check_layer(cache: KvCacheQuant, backend: str, tile_order: str) -> LayerLayout:
    """Check the storage of a layer that ``backend`` is to read."""
    if cache.tile_order != tile_order:
        raise ValueError(f"backend {backend!r} reads tile_order {tile_order!r}, not {cache.tile_order!r}")
    device = cache.k.device
    check_tensor(cache.k, "k", shape=(None,) * 4, dtypes=(torch.int8,), device=device)
    slots = cache.k.shape[:3]
    check_tensor(cache.v, "v", shape=(*slots, None), dtypes=(torch.int8,), device=device)
    check_native_geometry(cache)
    for name, x in (("k_scales", cache.k_scales), ("v_scales", cache.v_scales)):
        check_tensor(x, name, shape=slots, dtypes=(torch.float16,), device=device)
    for name, x in (("k", cache.k), ("v", cache.v), ("k_scales", cache.k_scales), ("v_scales", cache.v_scales)):
        check_contiguous(x, name)
    if cache.key_center is not None:
        shape = (cache.num_kv_heads, cache.head_dim)
        check_tensor(cache.key_center, "key_center", shape=shape, dtypes=(torch.float32,), device=device)
        check_contiguous(cache.key_center, "key_center")
    return LayerLayout(device, slots[0], slots[1], slots[2], cache.head_dim, cache.v_head_dim)


def check_first_tokens(sink_tokens: SinkTokens) -> SinkLayout:
    """Check the tensors of first tokens; `check_decode` compares their sizes with a call's."""
    k, v, row = sink_tokens.k, sink_tokens.v, sink_tokens.row
    check_tensor(k, "sink_tokens.k", shape=(None,) * 4, dtypes=FLOAT_DTYPES, device=k.device)
    check_tensor(v, "sink_tokens.v", shape=(*k.shape[:3], None), dtypes=(k.dtype,), device=k.device)
    check_tensor(row, "sink_tokens.row", shape=(None,), dtypes=(torch.int32,), device=k.device)
    check_sink_layout(sink_tokens, len(row), k.shape[1], k.shape[3], v.shape[3], k.device)
    return SinkLayout(k.device, len(row), k.shape[1], k.shape[3], v.shape[3])


def check_table(
    device: torch.device, batch: int, block_table: torch.Tensor, lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block table ``[batch, max_blocks]``, last axis contiguous, and lengths ``[batch]``, contiguous; copied if not."""
    shape = block_table.shape
    if (
        len(shape) != 2
        or shape[0] != batch
        or lens.shape != (batch,)
        or block_table.dtype is not torch.int32
        or lens.dtype is not torch.int32
        or block_table.device != device
        or lens.device != device
    ):
        check_tensor(block_table, "block_table", shape=(batch, None), dtypes=(torch.int32,), device=device)
        check_tensor(lens, "lengths", shape=(batch,), dtypes=(torch.int32,), device=device)
    if not block_table.is_contiguous():
        block_table = rows_contiguous(block_table)
    return block_table, lens if lens.is_contiguous() else lens.contiguous()


def check_append(
    layout: LayerLayout, k_new: torch.Tensor, v_new: torch.Tensor, block_table: torch.Tensor, lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check an append; the new rows may have any strides. Returns what `check_table` does."""
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
    return check_table(device, shape[0], block_table, lens)


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
            raise ValueError(f"q has {shape[1]} heads, which is no multiple of the cache's {heads} KV heads")
        if not shape[2]:
            raise ValueError("q has no rows")
        check_tensor(out, "out", shape=(*shape[:3], v_dim), dtypes=(dtype,), device=device)
    # The cache's layers hand over rows before heads.
    if not out.is_contiguous() and out.stride() != (shape[1] * shape[2] * v_dim, v_dim, shape[1] * v_dim, 1):
        check_disjoint(out, "out")


def check_options(
    layout: LayerLayout,
    batch: int,
    num_q_heads: int,
    kv_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    sink_layout: SinkLayout | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Check what attention may be given beside queries and table. Returns ``kv_start`` and ``sinks``, contiguous, and
    between them ``key_mask``, last axis contiguous; copied if not."""
    device = layout.device
    if kv_start is not None:
        check_tensor(kv_start, "kv_start", shape=(batch,), dtypes=(torch.int32,), device=device)
        kv_start = kv_start.contiguous()
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
    if sinks is not None:
        check_tensor(sinks, "sinks", shape=(num_q_heads,), dtypes=(*FLOAT_DTYPES, torch.float64), device=device)
        sinks = sinks.contiguous()
    if sink_layout is not None and sink_layout != (device, batch, layout.num_kv_heads, layout.head_dim, layout[5]):
        want = SinkLayout(device, batch, layout.num_kv_heads, layout.head_dim, layout.v_head_dim)
        raise ValueError(f"sink_tokens are {sink_layout._asdict()}, but the call is {want._asdict()}")
    return kv_start, key_mask, sinks


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied unless the elements of a row lie one after the other. Rows of fewer than two elements do."""
    return x if x.stride()[-1] == 1 or x.shape[-1] < 2 else x.contiguous()


def check_decode(
    layout: LayerLayout,
    out: torch.Tensor,
    q: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    kv_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    sink_layout: SinkLayout | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Check decode attention. Returns what `check_table` and `check_options` do."""
    check_queries(layout, out, q)
    batch, num_q_heads = q.shape[:2]
    block_table, lens = check_table(layout.device, batch, block_table, lens)
    if kv_start is None and key_mask is None and softcap is None and sinks is None and sink_layout is None:
        return block_table, lens, None, None, None
    options = check_options(layout, batch, num_q_heads, kv_start, key_mask, softcap, sinks, sink_layout)
    return block_table, lens, *options
