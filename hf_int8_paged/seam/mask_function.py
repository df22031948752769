"""The ``int8_paged`` mask function: what transformers makes before the first layer. Its pattern is noted for the
attention function, and padding for the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from .masks import needs_additive_masks
from .padding import last_asked, version

#: Attribute of a mask that is causal, with the layer's window and padding, and nothing else: a `Pattern`.
_PATTERN = "_int8_paged_pattern"


class Pattern(NamedTuple):
    """What a mask of several rows consists of.

    Attributes:
        padding: the padding mask, bool ``[batch, tokens]``, or None.
        window: sliding window in tokens, or None.
        version: the mask's version counter when it was made: whoever writes into the mask afterwards changes it.
    """

    padding: torch.Tensor | None
    window: int | None
    version: int


def int8_paged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    *,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask for `int8_paged_attention`: transformers' SDPA mask, except where decode attention needs less.

    Args:
        batch_size: sequences.
        q_length: query rows per sequence.
        kv_length: keys that the mask covers.
        q_offset: position of the first query row.
        kv_offset: position of the first key.
        mask_function: transformers' pattern, called with index tensors.
        attention_mask: bool ``[batch_size, seen tokens]``, True for tokens, or ``None`` without padding.
        local_size: window or chunk size of the pattern, if it has one.
        allow_is_causal_skip: whether ``None`` may stand for a causal mask.

    Returns:
        ``None`` where nothing but causality and the layer's window restricts attention; a view of the padding
        mask, ``[batch_size, 1, 1, kv_length]``, for a single row; else bool ``[batch_size, 1, q_length, kv_length]``.
    """
    asked = None if torch.compiler.is_compiling() else last_asked()
    # A position on the device is not read: that would wait for it. The mask of a single row does without.
    on_device = isinstance(q_offset, torch.Tensor)
    unread = on_device and q_length == 1
    if torch.compiler.is_compiling():
        # Nor can the compiler look into the pattern of a window.
        unread = on_device or mask_function is not causal_mask_function
    plain = not unread and _only_causal(mask_function, local_size, q_offset, kv_offset)
    if attention_mask is not None and attention_mask.shape[1] < kv_offset + kv_length:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, kv_offset + kv_length - attention_mask.shape[1]))
    additive = needs_additive_masks(kwargs["config"]) if "config" in kwargs else False
    may_skip = not additive and (allow_is_causal_skip or attention_mask is not None)
    if plain and may_skip and q_length == 1 and q_offset > 0:
        return None if attention_mask is None else attention_mask[:, None, None, kv_offset : kv_offset + kv_length]
    # Where a preallocated cache is empty, the mask of its first prompt is that of any first prompt.
    columns = q_length if plain and on_device and int(q_offset) == 0 and not additive else kv_length
    mask = (eager_mask if additive else sdpa_mask)(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=columns,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask
        if columns == kv_length or attention_mask is None
        else attention_mask[:, :columns],
        local_size=local_size,
        # Without a mask, rows count as the newest of the keys. Those of a preallocated cache of transformers, which
        # shows all its positions, are not.
        allow_is_causal_skip=allow_is_causal_skip and columns == q_length,
        **kwargs,
    )
    if mask is not None and columns < kv_length:
        mask = torch.nn.functional.pad(mask, (0, kv_length - columns))
    if plain and mask is not None:
        window = None if mask_function is causal_mask_function else local_size
        setattr(mask, _PATTERN, Pattern(attention_mask, window, version(mask)))
        if attention_mask is not None and asked is not None and asked.sizes == (kv_length, kv_offset):
            asked.padding.leave(attention_mask, mask)
    return mask


def pattern_of(mask: torch.Tensor | None) -> Pattern | None:
    """What `int8_paged_mask` noted of the mask, unless somebody has written into it since."""
    pattern: Pattern | None = getattr(mask, _PATTERN, None)
    return pattern if pattern is None or mask is None or pattern.version == version(mask) else None


def _only_causal(mask_function: Callable, local_size: int | None, q_offset: int, kv_offset: int) -> bool:
    """Whether the pattern is causal, or causal with exactly the window that the keys' offset shows, no more."""
    if mask_function is causal_mask_function:
        return True
    window_names = ["sliding_window_overlay.<locals>.inner_mask", causal_mask_function.__qualname__]
    parts = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    if mask_function.__qualname__ != "and_masks.<locals>.and_mask" or len(parts) != 1:
        return False
    names = [getattr(part, "__qualname__", "") for part in parts[0]]
    return names == window_names and local_size is not None and kv_offset == max(int(q_offset) - local_size + 1, 0)
