"""Whether the memory of a preallocated cache fits into ``max_bytes``."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import torch

from ..byte_sizes import bytes_as_text
from ..full import CacheFullError
from ..kernels import format_called
from ..layer_checks import LayerShape
from .memory import blocks_of_a_sequence

if TYPE_CHECKING:
    from .preallocated import PreallocatedSequences


def check_layer_fits(sequences: PreallocatedSequences, index: int, shape: LayerShape, dtype: torch.dtype) -> None:
    """Raise ``CacheFullError`` unless the memory of a layer fits into ``max_bytes`` beside that of all others.

    Args:
        sequences: of the cache.
        index: of the layer, which has no memory yet, or other memory that stays until the new one is there.
        shape: of its keys and values.
        dtype: of its tokens in full precision.
    """
    options, batch, limit = sequences.options, sequences.max_batch_size, sequences.options.max_bytes
    if limit is None:
        return
    assert isinstance(limit, int)
    shapes = {**sequences.forecast, index: shape[:3]}
    rows = format_called(options.format)

    def needed(max_cache_len: int) -> int:
        total = 0
        for room in sequences.rooms:
            held = room.memory
            if held is not None:
                total += held.storage.nbytes + room.first_tokens_nbytes
            if room.index in shapes and (held is None or room.index == index):
                heads, *dims = shapes[room.index]
                slots = blocks_of_a_sequence(max_cache_len, room.window, options.block_size) * options.block_size
                first_tokens = sequences.sink_tokens * heads * sum(dims) * dtype.itemsize
                total += batch * (slots * rows.bytes_per_token(heads, *dims) + first_tokens)
        return total

    if needed(sequences.max_cache_len) > limit:
        fits = bisect_right(range(sequences.max_cache_len), limit, key=needed) - 1
        raise CacheFullError(
            f"{batch} sequences of max_cache_len={sequences.max_cache_len} take {needed(sequences.max_cache_len)} "
            f"bytes, but max_bytes={limit} ({bytes_as_text(limit)}) holds {max(fits, 0)} tokens of each; lower "
            "max_cache_len or max_batch_size, or raise max_bytes"
        )
