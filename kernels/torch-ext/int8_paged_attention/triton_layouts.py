"""The tensors that cross to Triton kernels, checked by `layouts`, and copied where index products would overflow.

Kernels take addresses, strides of those axes that may have any, and nothing else: every other axis is contiguous. They
multiply the places of some axes with a stride in 32 bits, which is enough for all but freak strides.
"""

from __future__ import annotations

import torch

from .layouts import LayerLayout, OncePerObject, SinkLayout, check_first_tokens, check_layer
from .sink_tokens import SinkTokens
from .storage import KvCacheQuant

TILE_ORDER = "v_transposed"


def _make_layer(cache: KvCacheQuant) -> tuple[LayerLayout, tuple[int, int, int, int]]:
    layout = check_layer(cache, "triton", TILE_ORDER)
    slots = layout.num_blocks * layout.block_size
    return layout, (slots * layout.head_dim, slots * layout.v_head_dim, slots, slots)


#: Sizes of a layer's storage, checked once, and how many elements lie from head to head of its keys, values and their
#: scales.
layer_of = OncePerObject(_make_layer)
_sink_layout = OncePerObject(check_first_tokens)


def sink_layout(sink_tokens: SinkTokens | None) -> SinkLayout | None:
    """Sizes of first tokens, checked once."""
    return None if sink_tokens is None else _sink_layout(sink_tokens)


def sink_pointers(sink_tokens: SinkTokens | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors of first tokens, in the kernels' order, or five times ``None``."""
    if sink_tokens is None:
        return (None,) * 5
    return sink_tokens.k, sink_tokens.v, sink_tokens.row, sink_tokens.first, sink_tokens.stop


def in_32_bits(x: torch.Tensor, axes: int = 1) -> torch.Tensor:
    """``x``, or a copy if offsets along one of the last ``axes`` axes pass 2**31."""
    strides, shape = x.stride(), x.shape
    for axis in range(1, axes + 1):
        if strides[-axis] * (shape[-axis] - 1) >= 1 << 31:
            return x.clone(memory_format=torch.contiguous_format)
    return x
