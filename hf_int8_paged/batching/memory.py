"""How many int8 blocks have room: the engine's arithmetic of memory, without what int8 blocks do not need."""

from __future__ import annotations

from typing import Any

from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

from ..byte_sizes import bytes_as_text


class Int8Memory(PagedAttentionMemoryHandler):
    """Without masks, and without copies of keys and values that are read from the cache, repeated for all query
    heads."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.num_attention_masks = 0
        self.kv_heads_at_peak = 0

    def _check_footprint(self, max_batch_tokens: int, num_sectors: int) -> tuple[int, int]:
        """Raise ``MemoryError`` if this takes more than the memory that may be used, and say how many blocks do not."""
        asked, limit = self.cb_config, self.available_memory
        if num_sectors > 0 and self.compute_memory_footprint(max_batch_tokens, num_sectors) <= limit:
            return super()._check_footprint(max_batch_tokens, num_sectors)
        step = self.compute_memory_footprint(max_batch_tokens, 0)
        sectors = max(0, limit - step) // self.bytes_per_cache_sector
        room = sectors * self.bytes_per_sector // self.bytes_per_block
        wanted = "int8 blocks" if asked.num_blocks is None else f"num_blocks={asked.num_blocks}: int8 blocks"
        raise MemoryError(
            f"{wanted} of {asked.page_size} tokens, {bytes_as_text(self.bytes_per_block)} each, have no room: "
            f"{bytes_as_text(max(0, limit))} may be used, max_memory_percent={asked.max_memory_percent} of what is "
            f"free, and steps of {max_batch_tokens} tokens take {bytes_as_text(step)} of it; "
            + (f"ask for at most {room} blocks" if room else "make max_batch_tokens smaller or that share larger")
        )


class HasRoomError(Exception):
    """The blocks have room: nothing is wrong."""


class Measuring(Int8Memory):
    """Ends where the blocks would be allocated."""

    def _check_footprint(self, max_batch_tokens: int, num_sectors: int) -> tuple[int, int]:
        super()._check_footprint(max_batch_tokens, num_sectors)
        raise HasRoomError
