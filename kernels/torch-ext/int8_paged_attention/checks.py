"""One-line argument checks. Each raises ``ValueError`` that names the argument, what it was and what would work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .sink_tokens import MAX_SINK_TOKENS, SinkTokens
from .storage import KvCacheQuant

#: dtypes of keys, values and queries that every backend takes.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Widest rows that a layer may hold; latents of multi-head latent attention have 512 elements.
MAX_HEAD_DIM = 1024
#: Widest rows that the native kernels take; wider ones are served by the reference backend.
MAX_NATIVE_HEAD_DIM = 256


def check_tensor(
    x: torch.Tensor,
    name: str,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Check shape (``None`` matches any size), dtype and device of ``x``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != len(shape) or any(want is not None and have != want for have, want in zip(x.shape, shape)):
        want = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{want}], got {list(x.shape)}")
    if x.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {names}, got {str(x.dtype).removeprefix('torch.')}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the cache is on {device}; move it there")


def check_geometry(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, v_head_dim: int) -> None:
    """Check the sizes that a layer's storage is made with."""
    if num_blocks < 0:
        raise ValueError(f"num_blocks must not be negative, got {num_blocks}")
    if block_size <= 0 or block_size % 16:
        raise ValueError(f"block_size must be a positive multiple of 16, got {block_size}")
    if num_kv_heads <= 0:
        raise ValueError(f"num_kv_heads must be positive, got {num_kv_heads}")
    for name, dim in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
        if not 0 < dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must be between 1 and {MAX_HEAD_DIM}, got {dim}")


def check_block_ids(ids: torch.Tensor, name: str, num_blocks: int, *, lowest: int | None = None) -> None:
    """Check block ids, only where they are on the host, so that nothing waits for a device.

    Every id must be below ``num_blocks`` and, if given, at least ``lowest``.
    """
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(x) for x in torch.aminmax(ids))
        if high >= num_blocks or (lowest is not None and low < lowest):
            wrong = high if high >= num_blocks else low
            raise ValueError(f"{name} holds block id {wrong}, but the cache has {num_blocks} blocks")


def check_destinations(src: torch.Tensor, dst: torch.Tensor) -> None:
    """Check that no block is copied to twice, or copied from and to; only where the ids are on the host."""
    if dst.device.type != "cpu" or not dst.numel():
        return
    ids, counts = torch.cat((dst, src.unique())).unique(return_counts=True)
    twice = ids[counts > 1]
    if len(twice):
        raise ValueError(f"dst must not hold a block id twice, nor one of src, got {int(twice[0])}")


def check_lengths(lengths: torch.Tensor, name: str, capacity: int, *, new_tokens: int = 0) -> None:
    """Check that lengths lie in [0, capacity - new_tokens]; only where they are on the host."""
    if lengths.device.type == "cpu" and lengths.numel():
        lowest, highest = (int(x) for x in torch.aminmax(lengths))
        if lowest < 0 or highest + new_tokens > capacity:
            wrong = lowest if lowest < 0 else highest
            more = f" plus {new_tokens} new tokens" if new_tokens else ""
            raise ValueError(f"{name} must be between 0 and {capacity} (what block_table covers), got {wrong}{more}")


def check_sink_tokens(sink_tokens: SinkTokens, cache: KvCacheQuant, batch: int) -> None:
    """Check full-precision first tokens; their places only where they are on the host."""
    k, v, row, first, stop, limit = sink_tokens
    rows = (None, cache.num_kv_heads, None)
    check_tensor(k, "sink_tokens.k", shape=(*rows, cache.head_dim), dtypes=FLOAT_DTYPES, device=cache.device)
    if not 1 <= k.shape[2] <= MAX_SINK_TOKENS:
        raise ValueError(f"sink_tokens.k must hold 1 to {MAX_SINK_TOKENS} tokens per sequence, got {k.shape[2]}")
    check_tensor(v, "sink_tokens.v", shape=(*k.shape[:3], cache.v_head_dim), dtypes=(k.dtype,), device=cache.device)
    for name, x in (("k", k), ("v", v)):
        if not x.is_contiguous():
            raise ValueError(f"sink_tokens.{name} must be contiguous, got strides {x.stride()}")
    for name, x in (("row", row), ("first", first), ("stop", stop)):
        check_tensor(x, f"sink_tokens.{name}", shape=(batch,), dtypes=(torch.int32,), device=cache.device)
        if not x.is_contiguous():
            raise ValueError(f"sink_tokens.{name} must be contiguous, got strides {x.stride()}")
    if cache.device.type == "cpu" and batch:
        if int(row.min()) < 0 or int(row.max()) >= len(k):
            raise ValueError(f"sink_tokens.row must be between 0 and {len(k) - 1}, got {row.tolist()}")
        if int(first.min()) < 0 or int((stop - first).max()) > k.shape[2] or int(stop.max()) > limit:
            raise ValueError(
                f"sink_tokens: first must not be negative and stop at most first + {k.shape[2]} and limit = {limit}, "
                f"got first = {first.tolist()} and stop = {stop.tolist()}"
            )
