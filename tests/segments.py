"""Storages of several segments for tests, and their contents as one tensor, whatever the segments."""

from __future__ import annotations

from typing import Any

import torch

from hf_int8_paged.kernels import KvCacheQuant, alloc_paged_int8_layer, grow_paged_int8_layer, load_backend

#: The tensors of a storage.
STORES = ("k", "v", "k_scales", "v_scales")


def in_segments(
    num_blocks: int, block_size: int, kv_heads: int, head_dim: int, *, backend: str, **options: Any
) -> KvCacheQuant:
    """`alloc_paged_int8_layer` in up to three segments, where the backend reads several."""
    sizes = [num_blocks]
    if load_backend(backend).SEGMENTS:
        sizes = sorted({min(num_blocks, 1), -(-num_blocks // 2), num_blocks})
    storage = alloc_paged_int8_layer(sizes[0], block_size, kv_heads, head_dim, backend=backend, **options)
    for size in sizes[1:]:
        storage = grow_paged_int8_layer(storage, size)
    return storage


def whole(storage: KvCacheQuant, name: str) -> torch.Tensor:
    """One of ``STORES``, of all blocks in the order of their ids: a copy if there are several segments."""
    parts = [getattr(segment, name) for segment in storage.segments]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def put_whole(storage: KvCacheQuant, name: str, content: torch.Tensor) -> None:
    """Make this one of ``STORES``, of all blocks, in place."""
    sizes = [segment.num_blocks for segment in storage.segments]
    for segment, part in zip(storage.segments, content.split(sizes, 1), strict=True):
        getattr(segment, name).copy_(part)


def fill_blocks(storage: KvCacheQuant, blocks: list[int], value: int, scale: float) -> None:
    """Make every slot of these blocks hold ``value`` with this scale."""
    for name in STORES:
        content = whole(storage, name).clone()
        content[:, blocks] = scale if name.endswith("scales") else value
        put_whole(storage, name, content)


def set_scale(storage: KvCacheQuant, name: str, where: tuple[int, int, int], scale: float) -> None:
    """Give the slot (head, block, slot) this scale, in ``k_scales`` or ``v_scales``."""
    content = whole(storage, name).clone()
    content[where] = scale
    put_whole(storage, name, content)
