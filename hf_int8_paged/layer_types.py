"""Kinds of a model's layers, as transformers' own caches see them, in all versions of transformers that we support."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

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
