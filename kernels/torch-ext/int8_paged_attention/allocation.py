"""Allocating the storage of one attention layer, and making it larger."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from .backends import Backend, load_backend, resolve_backend
from .checks import check_geometry
from .conditioning import ROTATIONS
from .formats import INT8, format_called
from .storage import TILE_ORDERS, Empty, KvCacheQuant, Segment


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
    format: str = INT8.name,
    empty: Empty | None = None,
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
        center_keys: allocate a key centre, zero at first (``storage.key_center``). Set its values before the
            first append.
        format: name of the format of the rows, one of ``FORMATS``.
        empty: makes the memory, now and when the storage grows: ``empty(shape, dtype, device)`` returns an
            uninitialised contiguous tensor, which need not be on ``device`` as long as no kernel is given it. ``None``
            leaves it to the backend.

    Returns:
        The storage.

    Raises:
        ValueError: impossible sizes, an unknown name, or a backend that cannot serve this device, geometry or format.
    """
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    check_geometry(num_blocks, block_size, num_kv_heads, head_dim, v_head_dim)
    if rotation is not None and rotation not in ROTATIONS:
        raise ValueError(f"unknown rotation {rotation!r}; choose one of {', '.join(ROTATIONS)}, or None")
    device = torch.device(device)
    serving = resolve_backend(backend, device, block_size, head_dim, v_head_dim, format)
    order = serving.TILE_ORDER if tile_order is None else tile_order
    if order not in TILE_ORDERS:
        raise ValueError(f"unknown tile_order {tile_order!r}; choose one of {', '.join(TILE_ORDERS)}")
    if order != serving.TILE_ORDER and serving.NAME != "reference":
        raise ValueError(f"backend {serving.NAME!r} reads tile_order {serving.TILE_ORDER!r}, not {order!r}")
    if order == "dot4" and head_dim % 4:
        raise ValueError(f"tile_order 'dot4' needs a head_dim that is a multiple of 4, got {head_dim}")
    center = torch.zeros(num_kv_heads, head_dim, dtype=torch.float32, device=device) if center_keys else None
    return KvCacheQuant(
        *_segment(serving, (num_kv_heads, num_blocks, block_size), head_dim, v_head_dim, device, format, empty),
        backend=serving.NAME,
        tile_order=order,
        rotation=rotation,
        key_center=center,
        format=format,
        empty=empty,
    )


def grow_paged_int8_layer(storage: KvCacheQuant, num_blocks: int) -> KvCacheQuant:
    """A storage with more blocks, of which the first ones are those of ``storage``.

    Where the backend reads several segments, nothing is copied: the result shares the memory of the old blocks with
    ``storage``, at the same addresses, and the new ones are one more segment. Elsewhere all is copied to new memory.
    The new blocks are uninitialised. ``storage`` itself does not change.

    Args:
        storage: the layer's storage.
        num_blocks: blocks that the result has; more than ``storage`` has.

    Returns:
        The larger storage, with the same key centre.

    Raises:
        ValueError: ``storage`` has as many blocks already.
    """
    held = storage.num_blocks
    if num_blocks <= held:
        raise ValueError(f"num_blocks must be more than the storage's {held}, got {num_blocks}")
    serving = load_backend(storage.backend)
    keep = bool(held) and serving.SEGMENTS
    slots = (storage.num_kv_heads, num_blocks - held if keep else num_blocks, storage.block_size)
    make = storage.empty or (partial(serving.empty, filled_slowly=True) if keep else None)
    new = _segment(serving, slots, storage.head_dim, storage.v_head_dim, storage.device, storage.format, make)
    if keep:
        if storage.empty is None:
            serving.filled(storage.segments[-1])
        return replace(storage, more=(*storage.more, new))
    for old, larger in zip(storage.segments[0], new, strict=True):
        larger[:, :held].copy_(old)
    return replace(storage, **new._asdict(), more=())


def _segment(
    serving: Backend,
    slots: tuple[int, int, int],
    head_dim: int,
    v_head_dim: int,
    device: torch.device,
    format: str,
    empty: Empty | None,
) -> Segment:
    """Uninitialised memory for ``slots``, that is KV heads, blocks and tokens of each; by default a backend's own,
    which a prompt fills at once."""
    rows, make = format_called(format), empty or serving.empty
    return Segment(
        k=make((*slots, head_dim), rows.dtype, device),
        v=make((*slots, v_head_dim), rows.dtype, device),
        k_scales=make(slots, rows.scale_dtype, device),
        v_scales=make(slots, rows.scale_dtype, device),
    )
