"""Key centres for continuous batching: one per model and layer, fixed before the first request.

A centre must be the same for all requests, as they share blocks, and must not depend on who came first, as equal
prefixes are to be equal. So it is the mean of the keys of a calibration text that the model reads once. Tokens drawn
from the vocabulary serve as well as a real text (`eval/batching_centers.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cache import PagedInt8Cache
from ..cache_argument import CACHE_ARGUMENT
from ..layer import PagedInt8Layer

#: Tokens of the calibration text where the caller gives none: drawn from the vocabulary.
CALIBRATION_TOKENS = 256
_known: weakref.WeakKeyDictionary[PreTrainedModel, dict[int, torch.Tensor]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def key_centers(model: PreTrainedModel, input_ids: torch.Tensor | list[int] | None = None) -> dict[int, torch.Tensor]:
    """Mean keys of a text, by layer, for `PagedInt8BatchingManager` and `generate_batch`.

    Args:
        model: a causal language model.
        input_ids: token ids of a calibration text, int64 ``[tokens]``, at least 16. ``None`` takes 256 tokens that are
            drawn from the vocabulary, always the same ones, and remembers the result as long as the model lives.

    Returns:
        Of each layer the mean key, float32 ``[num_kv_heads, head_dim]``. ``torch.save`` keeps it beside the model.

    Raises:
        ValueError: fewer than 16 tokens.
    """
    if input_ids is None:
        if model not in _known:
            size = model.config.get_text_config().vocab_size
            drawn = torch.randint(size, (CALIBRATION_TOKENS,), generator=torch.Generator().manual_seed(0))
            _known[model] = key_centers(model, drawn)
        return _known[model]
    ids = torch.as_tensor(input_ids, dtype=torch.long, device=model.device).reshape(1, -1)
    if ids.shape[1] < 16:
        raise ValueError(f"a calibration text must have at least 16 tokens, got {ids.shape[1]}")
    before = model.config._attn_implementation
    model.set_attn_implementation("int8_paged")
    try:
        cache = PagedInt8Cache(model.config)
        model(ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    finally:
        model.set_attn_implementation(before)
    centers = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PagedInt8Layer) and layer.is_initialized and layer.storage.key_center is not None:
            centers[index] = layer.storage.key_center.clone()
    return centers


def check_centers(centers: Any, layers: int) -> None:
    """Raise ``ValueError`` unless these may be the keys' centres of a model with so many layers. `check_center` checks
    their sizes, where those of the blocks are known."""
    if not isinstance(centers, Mapping):
        raise ValueError(
            "centers must be what key_centers(model) returns, a mean key for each layer's index, or {} for none; got "
            + type(centers).__name__
        )
    for layer, center in centers.items():
        if not isinstance(layer, int) or not 0 <= layer < layers:
            raise ValueError(f"centers has the layer {layer!r}; the model has 0 to {layers - 1}")
        if not isinstance(center, torch.Tensor) or not center.is_floating_point():
            said = f"{center.dtype} tensor" if isinstance(center, torch.Tensor) else type(center).__name__
            raise ValueError(f"centers[{layer}] must be a tensor of floating point numbers, got {said}")


def check_center(layer: int, center: torch.Tensor, num_kv_heads: int, head_dim: int) -> None:
    """Raise ``ValueError`` unless this is the centre of keys of so many heads and such a width."""
    if center.shape != (num_kv_heads, head_dim):
        raise ValueError(
            f"centers[{layer}] has the shape {list(center.shape)}, but the layer has keys [num_kv_heads, head_dim] = "
            f"{[num_kv_heads, head_dim]}"
        )
