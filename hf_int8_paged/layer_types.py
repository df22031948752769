"""Kinds of a model's layers, as transformers' own caches see them, in all versions of transformers that we support,
and the cache's layers for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    StaticLayer,
    get_layer_types_and_kwargs,
)

from .hybrid import PagedInt8HybridLayer
from .layer import PagedInt8Layer
from .sequences.growing import GrowingSequences
from .sequences.preallocated import PreallocatedSequences
from .static_layer import PagedInt8StaticLayer

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


def growing_layers(config: PreTrainedConfig, sequences: GrowingSequences) -> list:
    """One layer per model layer: paged where keys and values are held per token, transformers' own class elsewhere."""
    layers: list = []
    # Layers that attend to another sequence, an image say, hold its keys: as many as that has, or none without one.
    elsewhere = getattr(config, "cross_attention_layers", None) or ()
    for index, (layer_type, kwargs) in enumerate(layer_types(config)):
        if index in elsewhere:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs))
        elif layer_type in ("full_attention", "sliding_attention", "chunked_attention"):
            # Chunks are windows that the mask narrows further.
            layers.append(PagedInt8Layer(index, sequences, kwargs.get("sliding_window")))
        elif layer_type in ("hybrid", "hybrid_sliding"):
            layers.append(PagedInt8HybridLayer(index, sequences, **kwargs))
        elif layer_type in DYNAMIC_LAYER_TYPE_MAPPING:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs))
        else:
            raise NotImplementedError(
                f"layer {index} of this {config.model_type} model is of type {layer_type!r}, which neither "
                "PagedInt8Cache nor transformers' DynamicCache knows"
            )
    return layers


def preallocated_layers(config: PreTrainedConfig, sequences: PreallocatedSequences) -> list:
    """One preallocated layer per model layer; transformers' own class where nothing is held per token."""
    layers: list = []
    for index, (layer_type, kwargs) in enumerate(layer_types(config)):
        if layer_type in ("full_attention", "sliding_attention", "chunked_attention"):
            layers.append(PagedInt8StaticLayer(index, sequences, kwargs.get("sliding_window")))
        elif not issubclass(STATIC_LAYER_TYPE_MAPPING.get(layer_type, StaticLayer), StaticLayer):
            layers.append(STATIC_LAYER_TYPE_MAPPING[layer_type](max_cache_len=sequences.max_cache_len, **kwargs))
        else:
            raise NotImplementedError(
                f"layer {index} is of type {layer_type!r}, which PagedInt8Cache cannot preallocate; a cache that grows "
                "serves it: leave out max_batch_size"
            )
    return layers


def is_layer_data(config: Any) -> bool:
    """Whether this, given as a cache's first argument, is an iterable of keys and values instead of a config."""
    others = (PreTrainedConfig, str, dict, type, torch.Tensor, torch.nn.Module)
    return isinstance(config, Iterable) and not isinstance(config, others)


def layers_of_data(data: list, sequences: GrowingSequences) -> list:
    """One empty layer for each ``(keys, values)`` or ``(keys, values, window)``.

    Where others have tokens, a layer without them is none that holds any: transformers' own then, as in `DynamicCache`.

    Raises:
        TypeError: not such tuples.
        ValueError: the layers hold different numbers of tokens.
    """
    for entry in data:
        if not isinstance(entry, (tuple, list)) or len(entry) not in (2, 3) or (entry[0] is None) != (entry[1] is None):
            raise TypeError(
                "PagedInt8Cache takes the model's config, or (keys, values) or (keys, values, window) of each layer, "
                f"but among them is a {type(entry).__name__}"
            )
    lengths = {entry[0].shape[2] for entry in data if entry[0] is not None}
    if len(lengths) > 1:
        raise ValueError(
            f"the layers' keys have {' and '.join(map(str, sorted(lengths)))} tokens: sliding windows have dropped "
            "some, and where the others stood is not known; feed the tokens to the model once more"
        )
    layers: list = []
    for index, (keys, _, *window) in enumerate(data):
        if keys is None and lengths:
            layers.append(DynamicLayer())
        else:
            layers.append(
                PagedInt8Layer(index, sequences, int(window[0]) if window and window[0] is not None else None)
            )
    return layers
