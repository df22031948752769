"""A step of a preallocated layer that the device counts alone: compiled, or captured in a CUDA graph.

Nothing here may depend on a value of the device, nor on a number of the host that changes from step to step: what is
traced once serves every step of its shape. A step that does not fit cannot raise; it writes nothing, the length stays,
and its values are NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..full import CacheFullError
from ..kernels import MAX_DECODE_ROWS, mean_key
from ..layer_checks import check_states
from ..pool_centring import MIN_CENTER_TOKENS
from ..seam.views import stands_for

if TYPE_CHECKING:
    from .preallocated_room import PreallocatedRoom


def step_on_device(
    layer: Any, room: PreallocatedRoom, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append new tokens within a compiled forward pass.

    Args:
        layer: the cache layer that the result stands for.
        room: its room.
        keys: ``[batch, num_kv_heads, tokens, head_dim]``.
        values: ``[batch, num_kv_heads, tokens, v_head_dim]``.

    Returns:
        Dense keys and values of ``max_cache_len`` positions; attention that reads the blocks ignores them, and the
        compiler drops what makes them.
    """
    if not room.matches(keys, values):
        _allocate_all(room, keys, values)
    past = append_on_device(room, keys, values)
    return stands_for(layer, *dense_on_device(room, keys, values, past))


@torch.compiler.disable
def _allocate_all(first: PreallocatedRoom, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Allocate within a compiled forward pass, which breaks its graph. One break serves all layers: the others are
    allocated too, as if their keys and values were like those of the first."""
    if first.memory is not None and first.length:
        check_states(first.index, keys, values, first.memory.shape)
    first.allocate(keys, values)
    for room in first.sequences.rooms:
        if room.memory is None:
            room.allocate(keys, values)


def append_on_device(
    room: PreallocatedRoom, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Append new tokens, if they fit, and note in ``memory.fits`` whether they do.

    Returns:
        Keys and values of all positions before the step, where attention reads the past and the step's own tokens in
        full precision, else ``None``.
    """
    memory, sequences = room.allocated, room.sequences
    batch, tokens = keys.shape[0], keys.shape[2]
    sequences.check_batch(batch)
    if tokens > sequences.max_cache_len:
        raise CacheFullError(f"{tokens} tokens per sequence came, but max_cache_len is {sequences.max_cache_len}")
    if sequences.batch_size is None:
        sequences.batch_size = batch
    sequences.known = False
    fits = memory.length + tokens <= sequences.max_cache_len
    memory.fits.copy_(fits)
    past = memory.gather_all(batch, torch.promote_types(keys.dtype, values.dtype)) if tokens > MAX_DECODE_ROWS else None
    if tokens > 1 or room.may_be_empty:
        first = memory.length == 0
        if memory.first_tokens is not None:
            memory.first_tokens.keep(keys, values, known=first)
        center = memory.storage.key_center
        if center is not None and tokens >= MIN_CENTER_TOKENS:
            center.copy_(torch.where(first, mean_key(keys), center))
    room.may_be_empty, room.dtypes = False, (keys.dtype, values.dtype)
    skipped = max(tokens - memory.capacity, 0)
    # A row that does not fit is sent where the table has no block.
    table = torch.where(fits, memory.table[:batch], -1)
    lens_before = torch.where(fits, memory.lens[:batch] + skipped, 0)
    memory.append(keys[:, :, skipped:], values[:, :, skipped:], table, lens_before)
    memory.lens.add_(torch.where(fits, tokens, 0))
    return past


def dense_on_device(
    room: PreallocatedRoom,
    keys: torch.Tensor,
    values: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense keys and values of ``max_cache_len`` positions after a step.

    Args:
        room: of the layer.
        keys: of the step, ``[batch, num_kv_heads, tokens, head_dim]``.
        values: ``[batch, num_kv_heads, tokens, v_head_dim]``.
        past: what `append_on_device` returned.
    """
    memory = room.allocated
    tokens = keys.shape[2]
    stored = memory.gather_all(keys.shape[0], torch.promote_types(keys.dtype, values.dtype)) if past is None else past
    dense = [x.to(new.dtype) for x, new in zip(stored, (keys, values), strict=True)]
    if tokens > 1:
        # As in eager steps: a first prompt and a long chunk are seen in full precision, a short chunk from the blocks.
        start = memory.length - torch.where(memory.fits, tokens, 0)
        positions = (start + torch.arange(tokens, device=keys.device)).clamp(max=memory.max_cache_len - 1)
        for i, new in enumerate((keys, values)):
            rows = new if past is not None else torch.where(start == 0, new, dense[i].index_select(2, positions))
            dense[i] = dense[i].index_copy(2, positions, rows)
    dense[1] = torch.where(memory.fits, dense[1], torch.nan)
    return dense[0], dense[1]
