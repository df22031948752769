"""One-line argument checks. Each raises ``ValueError`` that names the argument, what it was and what would work."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch

from .first_tokens import MAX_FIRST_TOKENS, FirstTokens
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
        raise ValueError(f"{name} is on {x.device}, but the storage is on {device}; move it there")


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
            raise ValueError(f"{name} holds block id {wrong}, but the storage has {num_blocks} blocks")


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


def check_contiguous(x: torch.Tensor, name: str) -> None:
    """Check that the elements of ``x`` lie in memory in their order."""
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")


def check_disjoint(x: torch.Tensor, name: str) -> None:
    """Check that ``x`` can be written to: last axis contiguous, and no two elements at one address.

    Axes that do not nest, which nothing but ``as_strided`` makes, are refused even where no addresses meet.
    """
    if not x.numel():
        return
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous in its last axis, got stride {x.stride(-1)}")
    extent = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride < extent:
            raise ValueError(f"{name} must not hold an address twice, got shape {list(x.shape)}, strides {x.stride()}")
        extent += (size - 1) * stride


def check_native_geometry(storage: KvCacheQuant) -> None:
    """Check the sizes of a storage that native kernels are to read, and the names of what was done to its rows."""
    check_geometry(storage.num_blocks, storage.block_size, storage.num_kv_heads, storage.head_dim, storage.v_head_dim)
    for name, dim in (("head_dim", storage.head_dim), ("v_head_dim", storage.v_head_dim)):
        if dim > MAX_NATIVE_HEAD_DIM:
            raise ValueError(f"{name} must be at most {MAX_NATIVE_HEAD_DIM} for native kernels, got {dim}")
    if storage.rotation not in (None, "hadamard"):
        raise ValueError(f"rotation must be 'hadamard' or None, got {storage.rotation!r}")


def check_integer(value: int, name: str) -> int:
    """``value`` as an int; ``TypeError`` if it is no integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def clamp_window(window: int | None, capacity: int) -> int | None:
    """Check a window. One that is wider than ``capacity``, what a table covers, hides nothing: that wide then."""
    if window is None:
        return None
    window = check_integer(window, "window")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    return min(window, max(capacity, 1))


def clamp_mask_start(start: int, key_mask: torch.Tensor | None, capacity: int) -> int:
    """Where a mask starts, 0 without one. Farther than a mask's width before the first position or than ``capacity``
    behind it, it shows nothing: that far then."""
    start = check_integer(start, "key_mask_start")
    return 0 if key_mask is None else max(min(start, capacity), -key_mask.shape[1])


def check_softcap(softcap: float) -> None:
    """Check a bound on the scores."""
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")


def check_scale(scale: float) -> None:
    """Check the factor on q.k."""
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_range(start: int, stop: int | None, capacity: int) -> tuple[int, int]:
    """Check positions ``start`` to ``stop``, default ``capacity``; returns both."""
    start = check_integer(start, "start")
    stop = capacity if stop is None else check_integer(stop, "stop")
    if not 0 <= start <= stop <= capacity:
        raise ValueError(f"need 0 <= start <= stop <= {capacity} (what block_table covers), got {start} and {stop}")
    return start, stop


def check_first_tokens(first_tokens: FirstTokens, storage: KvCacheQuant, batch: int) -> None:
    """Check full-precision first tokens; their places only where they are on the host."""
    if not isinstance(first_tokens, FirstTokens):
        raise TypeError(f"first_tokens must be FirstTokens, got {type(first_tokens).__name__}")
    check_first_layout(first_tokens, batch, storage.num_kv_heads, storage.head_dim, storage.v_head_dim, storage.device)
    check_first_places(first_tokens)


def check_first_layout(
    first_tokens: FirstTokens, batch: int, heads: int, head_dim: int, v_head_dim: int, device: torch.device
) -> None:
    """Check dtypes, device, shapes and strides of first tokens."""
    k, v = first_tokens.k, first_tokens.v
    check_tensor(k, "first_tokens.k", shape=(None, heads, None, head_dim), dtypes=FLOAT_DTYPES, device=device)
    if not 1 <= k.shape[2] <= MAX_FIRST_TOKENS:
        raise ValueError(f"first_tokens.k must hold 1 to {MAX_FIRST_TOKENS} tokens per sequence, got {k.shape[2]}")
    check_tensor(v, "first_tokens.v", shape=(*k.shape[:3], v_head_dim), dtypes=(k.dtype,), device=device)
    check_contiguous(k, "first_tokens.k")
    check_contiguous(v, "first_tokens.v")
    for name in ("row", "first", "stop"):
        x = getattr(first_tokens, name)
        check_tensor(x, f"first_tokens.{name}", shape=(batch,), dtypes=(torch.int32,), device=device)
        check_contiguous(x, f"first_tokens.{name}")


def check_first_places(first_tokens: FirstTokens) -> None:
    """Check which rows and positions first tokens have; only where these are on the host."""
    k, row, first, stop = first_tokens.k, first_tokens.row, first_tokens.first, first_tokens.stop
    limit = check_integer(first_tokens.limit, "first_tokens.limit")
    if k.device.type != "cpu" or not len(row):
        return
    if int(row.min()) < 0 or int(row.max()) >= len(k):
        raise ValueError(f"first_tokens.row must be between 0 and {len(k) - 1}, got {row.tolist()}")
    if int(first.min()) < 0 or int((stop.long() - first).max()) > k.shape[2] or int(stop.max()) > limit:
        raise ValueError(
            f"first_tokens: first must not be negative and stop at most first + {k.shape[2]} and limit = {limit}, "
            f"got first = {first.tolist()} and stop = {stop.tolist()}"
        )
