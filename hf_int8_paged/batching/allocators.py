"""The engine's allocators, with pages of int8 blocks: full attention, and rings for sliding windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.generation.continuous_batching.cache_allocators import (
    CachePool,
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)

from ..kernels import MAX_DECODE_ROWS, KvCacheQuant
from .centers import check_center
from .pages import BLOCK_SIZE, BlockBytes, bytes_per_page, expanded, ring, seen_from, whole_storage

if TYPE_CHECKING:
    from .cache import Int8Options

    _Base = FullAttentionCacheAllocator
else:
    _Base = object


class Int8Pages(_Base):
    """What both kinds of allocators have in common.

    Attributes:
        options: how rows are stored; the cache sets it before the memory is registered.
        window: sliding window in tokens, or None.
        storages: of each layer, by its index in the model.
    """

    options: Int8Options
    window: int | None = None
    storages: dict[int, KvCacheQuant]

    @classmethod
    def get_bytes_per_page(
        cls, num_key_value_heads: int, head_dim: int, cache_dtype: torch.dtype, page_size: int
    ) -> int:
        """Bytes of a page of int8 rows and scales; ``cache_dtype`` makes no difference."""
        return bytes_per_page(num_key_value_heads, head_dim, page_size)

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: torch.Tensor, pool: CachePool
    ) -> None:
        """Take the engine's memory, uint8 ``[bytes]``. Its first two sectors, which the engine never gives out, are not
        used: blocks are counted from the third."""
        self.bytes_per_sector = bytes_per_sector
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, cache_tensor, pool)
        options, run = self.options, self.tokens_per_page // BLOCK_SIZE
        sizes = (self.num_pages, self.tokens_per_page, self.num_key_value_heads, self.head_dim)
        whole = whole_storage(cache_tensor, *sizes, options.backend)
        self._copy_view: Any = BlockBytes(whole, self.pages_per_block * run, 2 * self.blocks_per_sector)
        self.storages = {
            layer: seen_from(whole, i * run, options.rotation, self._center_of(layer, cache_tensor.device))
            for i, layer in enumerate(self.layer_indices)
        }

    def _center_of(self, layer: int, device: torch.device) -> torch.Tensor | None:
        center = self.options.centers.get(layer)
        if center is None:
            return None
        check_center(layer, center, self.num_key_value_heads, self.head_dim)
        return center.to(device, torch.float32).contiguous()

    def copy_blocks(self, source_block_ids: list[int], dest_block_ids: list[int]) -> None:
        """Copy whole blocks, all layers, in place."""
        self._copy_view.copy(source_block_ids, dest_block_ids)

    def tables(self, requests: list[str], lens: np.ndarray) -> np.ndarray:
        """Block table of the kernels for the first layer's storage, int32 ``[batch, blocks]``; see `pages`.

        Args:
            requests: ids of requests that have blocks for their tokens.
            lens: int64 ``[batch]`` tokens of each.
        """
        held = [self.block_table[request] for request in requests]
        blocks = np.full((len(held), max(map(len, held), default=0)), -1, dtype=np.int64)
        for row, own in zip(blocks, held):
            row[: len(own)] = own
        blocks = np.where(blocks < 0, -1, blocks - self._copy_view.first)
        return expanded(blocks, self._copy_view.blocks_each, self.tokens_per_page // BLOCK_SIZE)


class Int8FullAllocator(Int8Pages, FullAttentionCacheAllocator):
    """Blocks of layers with full attention."""


class Int8SlidingAllocator(Int8Pages, SlidingAttentionCacheAllocator):
    """Blocks of layers with a sliding window: a ring.

    A step of up to 16 rows writes its tokens before attention reads them, so the ring holds as many tokens more than
    the window, and the rest of the block that the newest one stands in.
    """

    @property
    def window(self) -> int:  # type: ignore[override]
        return self.sliding_window

    @property
    def ring_pages(self) -> int:
        """Pages of a sequence that is longer than its window."""
        blocks = -(-(self.sliding_window + MAX_DECODE_ROWS - 2) // BLOCK_SIZE) + 1
        return -(-blocks * BLOCK_SIZE // self.tokens_per_page)

    def _compute_blocks_needed(self, allocated_blocks: int, past_length: int, query_length: int) -> int:
        needed = -(-(past_length + query_length) // self.tokens_per_page)
        return max(0, min(needed, self.ring_pages) - allocated_blocks)

    def tables(self, requests: list[str], lens: np.ndarray) -> np.ndarray:
        table = super().tables(requests, lens)
        return ring(table, lens, self.ring_pages * (self.tokens_per_page // BLOCK_SIZE))
