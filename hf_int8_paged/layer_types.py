"""Kinds of a model's layers, as transformers' own caches see them, in all versions of transformers that we support."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer, get_layer_types_and_kwargs

_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding")


def layer_types(config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """For each layer its type and the arguments of transformers' cache layer for it.

    Args:
        config: of the decoder.
    """
    kinds, kwargs = get_layer_types_and_kwargs(config)
    if isinstance(kwargs, dict):  # one for all layers, before transformers had configurations of single layers
        without_window = {name: value for name, value in kwargs.items() if name != "sliding_window"}
        kwargs = [kwargs if kind in _WINDOWED else without_window for kind in kinds]
    return list(zip(kinds, kwargs, strict=True))


@functools.cache
def dense_dtypes(keys: torch.dtype, values: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """dtypes that a `DynamicCache` begins to hold keys and values of these dtypes in. Before transformers 5.24 values
    begin with the keys' dtype."""
    layer = DynamicLayer()
    layer.lazy_initialization(torch.empty(1, 1, 0, 1, dtype=keys), torch.empty(1, 1, 0, 1, dtype=values))
    assert layer.keys is not None
    assert layer.values is not None
    return torch.promote_types(layer.keys.dtype, keys), torch.promote_types(layer.values.dtype, values)
