"""What both kinds of cache layer check of new keys and values, before anything changes, and which dtypes they take."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
from transformers.cache_utils import DynamicLayer

from .kernels import FLOAT_DTYPES


class LayerShape(NamedTuple):
    """What a layer's first keys and values fix for all that follow.

    Attributes:
        num_kv_heads: heads of the keys, and of the values.
        head_dim: width of a key row.
        v_head_dim: width of a value row.
        device: where the layer's blocks are.
    """

    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    device: torch.device


def shape_of(keys: torch.Tensor, values: torch.Tensor) -> LayerShape:
    """Of keys ``[batch, num_kv_heads, tokens, head_dim]`` and values ``[batch, num_kv_heads, tokens, v_head_dim]``."""
    return LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.device)


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


def check_states(index: int, keys: torch.Tensor, values: torch.Tensor, shape: LayerShape) -> None:
    """Check later keys and values of a layer; the dtype may change from step to step, as it does under autocast.

    Args:
        index: the layer's index in the model.
        keys: ``[batch, num_kv_heads, new_tokens, head_dim]``.
        values: ``[batch, num_kv_heads, new_tokens, v_head_dim]``.
        shape: of those that the layer holds.

    Raises:
        TypeError: not tensors.
        ValueError: another dtype than float32, float16 and bfloat16; other heads, widths or device than the layer's, or
            values that do not fit the keys.
    """
    num_kv_heads, head_dim, v_head_dim, device = shape
    if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.dim() == 4:
        batch, heads, tokens, dim = keys.shape
        if (
            heads == num_kv_heads
            and dim == head_dim
            and values.shape == (batch, heads, tokens, v_head_dim)
            and keys.dtype in FLOAT_DTYPES
            and values.dtype in FLOAT_DTYPES
            and keys.device == device == values.device
        ):
            return  # what every step of a model passes; below is found out what is wrong
    check_first_states(index, keys, values)
    if (*keys.shape[1::2], values.shape[3]) != shape[:3]:
        raise ValueError(
            f"layer {index} holds {num_kv_heads} KV heads of width {head_dim} (values {v_head_dim}), but keys "
            f"{list(keys.shape)} and values {list(values.shape)} came; is this another model's cache?"
        )
    if keys.device != device:
        raise ValueError(
            f"layer {index} is on {device}, but keys came on {keys.device}; reset() the cache, or use one per device"
        )


class StepLengths(Protocol):
    """How far the newest step has come, for messages."""

    @property
    def length(self) -> int: ...

    @property
    def step_start(self) -> int: ...

    @property
    def batch_size(self) -> int | None: ...


def interrupted(index: int, start: int, keys: torch.Tensor, step: StepLengths) -> ValueError:
    """The error for keys that do not continue the step which the layers before this one have begun.

    Args:
        index: the layer's index in the model.
        start: tokens that it holds.
        keys: ``[batch, num_kv_heads, new_tokens, head_dim]``.
        step: the newest one.
    """
    return ValueError(
        f"layer {index} holds {start} tokens and got {keys.shape[2]} more for {keys.shape[0]} sequences, while the "
        f"layers before it hold {step.length} for {step.batch_size}; if a forward pass was interrupted, "
        f"{way_back(step.step_start, step.length)}"
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
