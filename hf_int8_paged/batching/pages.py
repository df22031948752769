"""The engine's memory as int8 blocks: which bytes of its flat tensor are which layer's, and block tables for kernels.

The engine divides one flat tensor of bytes into sectors, a sector into blocks of a kind of layers, and a block into
pages, one for each of these layers. Here a page is ``page_size / 16`` blocks of the kernels. All keys lie together,
head by head, then all values, the scales of keys and those of values, each in the order of pages. So kernels read the
whole memory as one storage, and the storage of layer i is the same memory seen from i pages on: one block table, the
first layer's, serves all layers of the kind.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ..kernels import INT8, KvCacheQuant, Segment, copy_blocks, read_blocks, resolve_backend, write_blocks

#: Tokens of a block of the kernels.
BLOCK_SIZE = 16


def bytes_per_page(num_kv_heads: int, head_dim: int, page_size: int) -> int:
    """Bytes of the keys and values of ``page_size`` tokens in one layer, with their scales."""
    return INT8.bytes_per_token(num_kv_heads, head_dim, head_dim) * page_size


def whole_storage(
    memory: torch.Tensor, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, backend: str | None
) -> KvCacheQuant:
    """The engine's memory as one storage.

    Args:
        memory: uint8 ``[bytes]``, at least those of ``num_pages`` pages.
        num_pages: pages that may be in use.
        page_size: tokens of a page, a multiple of 16.
        num_kv_heads: KV heads of every layer.
        head_dim: width of keys and values of every layer.
        backend: name of the kernels' backend; None takes the best one for the memory's device.

    Raises:
        ValueError: the backend cannot serve these sizes.
    """
    serving = resolve_backend(backend, memory.device, BLOCK_SIZE, head_dim, head_dim)
    slots = (num_kv_heads, num_pages * (page_size // BLOCK_SIZE), BLOCK_SIZE)
    parts, start = [], 0
    for shape, dtype in 2 * [((*slots, head_dim), INT8.dtype)] + 2 * [(slots, INT8.scale_dtype)]:
        stop = start + int(np.prod(shape)) * dtype.itemsize
        parts.append(memory[start:stop].view(dtype).view(shape))
        start = stop
    k, v, k_scales, v_scales = parts
    return KvCacheQuant(k, v, k_scales, v_scales, backend=serving.NAME, tile_order=serving.TILE_ORDER)


def seen_from(
    whole: KvCacheQuant, first_block: int, rotation: str | None, key_center: torch.Tensor | None
) -> KvCacheQuant:
    """The storage of a layer: the whole memory, whose block 0 is block ``first_block``.

    The last blocks of the last head reach past the keys, values or scales that they belong to. No table has them.
    """

    def shifted(x: torch.Tensor) -> torch.Tensor:
        offset = x.storage_offset() + first_block * x.stride(1)
        return torch.as_strided(x, x.shape, x.stride(), offset)

    parts = Segment(*(shifted(x) for x in whole.segments[0]))
    return replace(whole, **parts._asdict(), rotation=rotation, key_center=key_center)


def expanded(blocks: np.ndarray, blocks_each: int, run: int) -> np.ndarray:
    """Block table of the kernels: the first ``run`` blocks of each block of the engine.

    Args:
        blocks: int64 ``[batch, count]`` blocks of the engine; negative ones are holes.
        blocks_each: blocks of the kernels in a block of the engine, all layers.
        run: blocks of the kernels in a page.

    Returns:
        int32 ``[batch, count * run]``.
    """
    ids = blocks[:, :, None] * blocks_each + np.arange(run)
    return np.where(blocks[:, :, None] < 0, -1, ids).reshape(len(blocks), -1).astype(np.int32)


def ring(table: np.ndarray, lens: np.ndarray, length: int) -> np.ndarray:
    """Block table of windows whose blocks are used over and over.

    Args:
        table: int32 ``[batch, count]`` blocks in the order of their first use; negative where there is none.
        lens: int64 ``[batch]`` tokens of each sequence.
        length: blocks after which the first one is used again.

    Returns:
        int32 ``[batch, longest]``: block j of a sequence is entry ``j % length`` of its table. Those that newer blocks
        have overwritten, and those past the last token, are holes.
    """
    counts = -(-lens // BLOCK_SIZE)
    j = np.arange(max(int(counts.max(initial=0)), 1))
    held = np.pad(table, ((0, 0), (0, max(length - table.shape[1], 0))), constant_values=-1)
    present = (j < counts[:, None]) & (j >= counts[:, None] - length)
    return np.where(present, held[:, j % length], -1).astype(np.int32)


class BlockBytes:
    """Blocks of the engine as rows of bytes, as its offloading reads and writes them.

    Args:
        whole: the memory.
        blocks_each: blocks of the kernels in a block of the engine.
        first: first block of the engine that has memory.
    """

    def __init__(self, whole: KvCacheQuant, blocks_each: int, first: int):
        self.whole, self.blocks_each, self.first = whole, blocks_each, first

    @property
    def device(self) -> torch.device:
        return self.whole.device

    def kernel_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """int64 ``[count * blocks_each]`` blocks of the kernels in blocks of the engine, int64 ``[count]``."""
        run = torch.arange(self.blocks_each, device=blocks.device)
        return ((blocks - self.first)[:, None] * self.blocks_each + run).flatten()

    def index_select(self, dim: int, index: torch.Tensor) -> torch.Tensor:
        """uint8 ``[count, bytes_per_block]``: what blocks ``index``, int64 ``[count]``, hold. ``dim`` must be 0."""
        read = read_blocks(self.whole, self.kernel_blocks(index))
        return torch.cat([_by_block(x, len(index)) for x in read], dim=1)

    def index_copy_(self, dim: int, index: torch.Tensor, source: torch.Tensor) -> None:
        """Write what `index_select` has read to blocks ``index``, in place. ``dim`` must be 0."""
        parts, start = [], 0
        for x in self.whole.segments[0]:
            shape = (len(index), x.shape[0], self.blocks_each, *x.shape[2:])
            stop = start + int(np.prod(shape[1:])) * x.dtype.itemsize
            rows = source[:, start:stop].contiguous().view(x.dtype).view(shape)
            parts.append(rows.transpose(0, 1).flatten(1, 2))
            start = stop
        write_blocks(self.whole, self.kernel_blocks(index), Segment(*parts))

    def copy(self, source: list[int], target: list[int]) -> None:
        """Copy blocks of the engine, all their pages, in place."""
        src, dst = (self.kernel_blocks(torch.tensor(ids, dtype=torch.long)).to(self.device) for ids in (source, target))
        copy_blocks(self.whole, src.int(), dst.int())


def _by_block(x: torch.Tensor, count: int) -> torch.Tensor:
    """``[heads, count * blocks_each, ...]`` -> uint8 ``[count, bytes]``."""
    rows = x.unflatten(1, (count, -1)).transpose(0, 1).contiguous()
    return rows.view(count, -1).view(torch.uint8)
