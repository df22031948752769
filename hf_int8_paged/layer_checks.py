"""What both kinds of cache layer check of new keys and values, before anything changes, and which dtypes they take."""

from __future__ import annotations

import functools

import torch
from transformers.cache_utils import DynamicLayer

from .kernels import FLOAT_DTYPES


def check_first_states(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Check the first keys and values of a layer, which decide its heads, widths and device.

    Args:
        index: the layer's index in the model.
        keys: ``[batch, num_kv_heads, new_tokens, head_dim]``.
        values: ``[batch, num_kv_heads, new_tokens, v_head_dim]``.

    Raises:
        TypeError: not tensors.
        ValueError: another dtype than float32, float16 and bfloat16; values with other sequences, heads or tokens than
            the keys, or on another device.
    """
    for name, states in (("keys", keys), ("values", values)):
        if not isinstance(states, torch.Tensor):
            raise TypeError(f"layer {index}: {name} must be a torch.Tensor, got {type(states).__name__}")
        if states.ndim != 4 or not states.shape[1] or not states.shape[3]:
            raise ValueError(
                f"layer {index}: {name} must be [batch, num_kv_heads, tokens, head_dim] with at least one head and one "
                f"element, got {list(states.shape)}"
            )
        if states.dtype not in FLOAT_DTYPES:
            raise ValueError(f"layer {index}: {name} must be float32, float16 or bfloat16, got {states.dtype}")
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"layer {index}: keys {list(keys.shape)} and values {list(values.shape)} must have the same sequences, "
            "heads and tokens"
        )
    if keys.device != values.device:
        raise ValueError(f"layer {index}: keys are on {keys.device}, but values on {values.device}")


def check_states(
    index: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_shape: tuple[int, int],
    value_shape: tuple[int, int],
    device: torch.device,
) -> None:
    """Check later keys and values of a layer; the dtype may change from step to step, as it does under autocast.

    Args:
        index: the layer's index in the model.
        keys: ``[batch, num_kv_heads, new_tokens, head_dim]``.
        values: ``[batch, num_kv_heads, new_tokens, v_head_dim]``.
        key_shape: heads and width of the keys that the layer holds.
        value_shape: likewise for the values.
        device: where the layer is.

    Raises:
        TypeError: not tensors.
        ValueError: another dtype than float32, float16 and bfloat16; other heads, widths or device than the layer's, or
            values that do not fit the keys.
    """
    if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.dim() == 4:
        batch, heads, tokens, dim = keys.shape
        if (
            (heads, dim) == key_shape
            and values.shape == (batch, heads, tokens, value_shape[1])
            and keys.dtype in FLOAT_DTYPES
            and values.dtype in FLOAT_DTYPES
            and keys.device == device == values.device
        ):
            return  # what every step of a model passes; below is found out what is wrong
    check_first_states(index, keys, values)
    if (keys.shape[1], keys.shape[3]) != key_shape or (values.shape[1], values.shape[3]) != value_shape:
        raise ValueError(
            f"layer {index} holds {key_shape[0]} KV heads of width {key_shape[1]} (values {value_shape[1]}), but keys "
            f"{list(keys.shape)} and values {list(values.shape)} came; is this another model's cache?"
        )
    if keys.device != device:
        raise ValueError(
            f"layer {index} is on {device}, but keys came on {keys.device}; reset() the cache, or use one per device"
        )


def way_back(kept: int, held: int) -> str:
    """What to do about a forward pass that was interrupted, for messages.

    Args:
        kept: tokens per sequence before it.
        held: tokens per sequence with it.
    """
    if not kept:
        return "reset() forgets its tokens"
    return f"crop({kept - held}) goes back to the {kept} tokens before it, reset() to none"


def check_none_left_out(layers: int, left_out: list[int], kept: int, held: int) -> None:
    """Raise ``ValueError`` if the last forward pass left layers out.

    Args:
        layers: attention layers of the cache.
        left_out: indices of those that the last forward pass has not updated.
        kept: tokens per sequence before it.
        held: tokens per sequence with it.
    """
    if left_out:
        raise ValueError(
            f"the last forward pass updated only {layers - len(left_out)} of the cache's {layers} attention layers "
            f"(not layer {left_out[0]}). If it was interrupted, {way_back(kept, held)}. If this is another model's "
            "cache, make one from this model's config"
        )


def refuse_broken(operation: str | None) -> None:
    """Raise ``RuntimeError`` if ``operation`` is the name of one that was interrupted and could not be undone."""
    if operation is not None:
        raise RuntimeError(
            f"{operation} of this cache was interrupted by an exception and could not be undone; reset() forgets all "
            "tokens, after which the cache can be used again"
        )


def of_one_dtype(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one dtype, as the kernels take them: theirs, or float32, which holds all others exactly."""
    return (keys, values) if keys.dtype == values.dtype else (keys.float(), values.float())


@functools.cache
def dense_dtypes(keys: torch.dtype, values: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """dtypes that a `DynamicCache` begins to hold keys and values of these dtypes in. Before transformers 5.24 values
    begin with the keys' dtype."""
    layer = DynamicLayer()
    layer.lazy_initialization(torch.empty(1, 1, 0, 1, dtype=keys), torch.empty(1, 1, 0, 1, dtype=values))
    assert layer.keys is not None
    assert layer.values is not None
    return torch.promote_types(layer.keys.dtype, keys), torch.promote_types(layer.values.dtype, values)
