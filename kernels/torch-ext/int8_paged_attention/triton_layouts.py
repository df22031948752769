"""The tensors that cross to Triton kernels, checked by `layouts`, and copied where index products would overflow.

Kernels take addresses, strides of those axes that may have any, and nothing else: every other axis is contiguous. They
multiply the places of some axes with a stride in 32 bits, which is enough for all but freak strides.
"""

from __future__ import annotations

import torch

from .first_tokens import FirstTokens
from .layouts import FirstTokensLayout, LayerLayout, OncePerObject, check_first_tokens, check_layer
from .storage import KvCacheQuant

TILE_ORDER = "v_transposed"


def _make_layer(storage: KvCacheQuant) -> tuple[LayerLayout, tuple[int, int, int, int]]:
    layout = check_layer(storage, "triton", TILE_ORDER)
    slots = layout.num_blocks * layout.block_size
    return layout, (slots * layout.head_dim, slots * layout.v_head_dim, slots, slots)


#: Sizes of a layer's storage, checked once, and how many elements lie from head to head of its keys, values and their
#: scales.
layer_of = OncePerObject(_make_layer)
_first_layout = OncePerObject(check_first_tokens)


def first_layout(first_tokens: FirstTokens | None) -> FirstTokensLayout | None:
    """Sizes of first tokens, checked once."""
    return None if first_tokens is None else _first_layout(first_tokens)


def first_pointers(first_tokens: FirstTokens | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors of first tokens, in the kernels' order, or five times ``None``."""
    if first_tokens is None:
        return (None,) * 5
    return first_tokens.k, first_tokens.v, first_tokens.row, first_tokens.first, first_tokens.stop


def in_32_bits(x: torch.Tensor, axes: int = 1) -> torch.Tensor:
    """``x``, or a copy if offsets along one of the last ``axes`` axes pass 2**31."""
    strides, shape = x.stride(), x.shape
    for axis in range(1, axes + 1):
        if strides[-axis] * (shape[-axis] - 1) >= 1 << 31:
            return x.clone(memory_format=torch.contiguous_format)
    return x
