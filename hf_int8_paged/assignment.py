"""``layer.keys = tensor``: a dense tensor takes the place of what a layer holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .full import refused_memory
from .kernels import FLOAT_DTYPES

if TYPE_CHECKING:
    from .layer import PagedInt8Layer


def assign(layer: PagedInt8Layer, dense: torch.Tensor, *, values: bool) -> None:
    """Quantize a dense tensor and store it in place of the keys or values that a layer's view shows.

    Sequences that share blocks, with each other or with another cache, get blocks of their own first. The layer's first
    tokens are read from the blocks from then on, as all others are.

    Args:
        layer: a layer that holds tokens.
        dense: float32, float16 or bfloat16, of the shape and on the device of ``layer.keys`` (``layer.values``).
        values: whether it holds values.

    Raises:
        ValueError, TypeError: shape, dtype or device are not those.
        CacheFullError: the pool's budget does not allow blocks of their own, and nothing has changed; or memory was
            refused, and the message says whether something has.
    """
    try:
        _assign(layer, dense, values)
    except BaseException as error:
        full = refused_memory(error, layer.sequences.broken)
        if full is not None:
            raise full from error
        raise


def _assign(layer: PagedInt8Layer, dense: torch.Tensor, values: bool) -> None:
    name = "values" if values else "keys"
    layer.sequences.refuse_if_broken()
    held = layer.stored(values=values)
    if held is None:
        raise ValueError(f"layer {layer.index} holds no {name} yet that could be replaced; call update() first")
    if not isinstance(dense, torch.Tensor) or dense.dtype not in FLOAT_DTYPES:
        got = dense.dtype if isinstance(dense, torch.Tensor) else type(dense).__name__
        raise TypeError(f"{name} must be a float32, float16 or bfloat16 tensor, got {got}")
    if dense.shape != held.shape or dense.device != held.device:
        raise ValueError(
            f"{name} to assign must be {list(held.shape)} on {held.device}, as layer {layer.index} holds them, got "
            f"{list(dense.shape)} on {dense.device}; crop() and batch_select_indices() change the shape"
        )
    first, stop = held.content.start, held.content.stop
    kept = layer.gather(first, stop, torch.float32)[not values]
    sequences: Any = layer.sequences
    sequences.unshare()
    # From here on an exception leaves some tokens replaced and others not.
    sequences.broken = f"an assignment of {name}"
    layer.store_anew(*((kept, dense) if values else (dense, kept)), first)
    layer.room.kept_rows = None  # type: ignore[attr-defined]
    sequences.broken = None
