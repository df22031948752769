"""The tensors that cross to Triton kernels, checked by `layouts`, and copied where index products would overflow.

Kernels take addresses, strides of those axes that may have any, and nothing else: every other axis is contiguous. They
multiply the places of some axes with a stride in 32 bits, which is enough for all but freak strides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..calls import Tokens
from ..first_tokens import FirstTokens
from ..layouts import (
    FirstTokensLayout,
    LayerLayout,
    TokensLayout,
    check_first_tokens,
    check_layer,
    check_tokens,
)
from ..storage import KvCacheQuant

TILE_ORDER = "v_transposed"


class Rows(NamedTuple):
    """What kernels are compiled for, of a layer's storage."""

    head_dim: int
    v_dim: int
    block_size: int
    rotated: bool


class Layer(NamedTuple):
    """A layer's storage, checked: its sizes, what kernels are compiled for, and how many elements lie from head to head
    of its keys, values and their scales."""

    layout: LayerLayout
    rows: Rows
    head_strides: tuple[int, int, int, int]


#: Under this name what is known of an object stands in its notes.
NOTE = "triton"


def layer_of(storage: KvCacheQuant) -> Layer:
    """What is known of a layer's storage: checked once, and kept with it."""
    layout = check_layer(storage, "triton", TILE_ORDER, segments=False)
    slots = layout.num_blocks * layout.block_size
    rows = Rows(layout.head_dim, layout.v_head_dim, layout.block_size, storage.rotation is not None)
    layer = Layer(layout, rows, (slots * layout.head_dim, slots * layout.v_head_dim, slots, slots))
    storage.notes[NOTE] = layer
    return layer


def tokens_of(tokens: Tokens) -> TokensLayout:
    """Sizes of a step's tokens: checked once, and kept with them."""
    layout = tokens.notes[NOTE] = check_tokens(tokens)
    return layout


def first_layout(first_tokens: FirstTokens | None) -> FirstTokensLayout | None:
    """Sizes of first tokens, checked once."""
    if first_tokens is None:
        return None
    layout = first_tokens.notes.get(NOTE)
    if layout is None:
        layout = first_tokens.notes[NOTE] = check_first_tokens(first_tokens)
    return layout


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
